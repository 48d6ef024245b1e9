"""The compile cache repairs itself: what a kill or a full disk left unfinished does not cost a compilation for ever."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

DRIVER = textwrap.dedent("""
    import logging, warnings
    warnings.simplefilter("always")
    logging.basicConfig(level=logging.WARNING)
    from comfyui_tpu.runtime import compile_cache
    compile_cache.enable()
    import jax, jax.numpy as jnp
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    print(jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((64, 64))))
""")


def run(folder):
    environment = {**os.environ, "COMFYUI_TPU_CACHE": str(folder), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", DRIVER], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_unfinished_entries_are_removed_and_written_again(tmp_path):
    run(tmp_path)
    entries = sorted((tmp_path / "xla").glob("*-cache"))
    assert entries
    whole = {path: path.read_bytes() for path in entries}
    for number, path in enumerate(entries):
        path.write_bytes(whole[path][: len(whole[path]) // 2] if number else b"")
    log = run(tmp_path)
    assert log.count("removing the unfinished entry") == len(entries)
    assert "Error reading persistent compilation cache" not in log
    assert {path: len(path.read_bytes()) > 0 for path in entries} == dict.fromkeys(entries, True)
    log = run(tmp_path)
    assert "removing" not in log
