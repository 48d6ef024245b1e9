"""A second process with a warm compile cache: ready to step within seconds, and nothing is compiled anew.

Timed is what a sampler waits for besides loading weights: from asking the transformer for its program until it can run
(tracing, lowering, reading the executable). Starting Python and importing torch and JAX is not in it.
"""

import textwrap
from pathlib import Path

import pytest

from tests.checkpoints import write
from tests.comfy.script import printed

WARM_SECONDS = 5.0

# Prints: seconds until the transformer's program was ready, how often the cache had and lacked a program, the latents.
PROCESS = textwrap.dedent("""
    import collections, hashlib, json, sys
    import jax, torch
    from comfyui_tpu.models.flux2 import Flux2
    from comfyui_tpu.models.wan import WanTextToVideo
    from comfyui_tpu.runtime import program
    events = collections.Counter()
    jax.monitoring.register_event_listener(lambda name, **details: events.update([name.rsplit("/", 1)[-1]]))
    family, folder = sys.argv[1:]
    with torch.inference_mode():
        if family == "wan":
            model = WanTextToVideo.open(folder)
            text = torch.ones(1, 512, model.transformer.config.text_dim)
            latents = model.sample(text, text, height=256, width=256, num_frames=17, num_inference_steps=1,
                                   guidance_scale=5.0, seed=1, flow_shift=3.0)
        else:
            model = Flux2.open(folder)
            text = torch.ones(1, 512, model.transformer.config.joint_attention_dim)
            latents = model.sample(text, height=256, width=256, num_inference_steps=1, guidance_scale=4.0, seed=1)
    made = list(program._programs.values())
    assert len(made) == 1, [each for each in program._programs]
    print(json.dumps({
        "seconds": made[0].trace_seconds + made[0].compile_seconds,
        "hits": events["cache_hits"], "misses": events["cache_misses"],
        "latents": hashlib.sha256(latents.float().numpy().tobytes()).hexdigest(),
    }))
""")


def started(cache: Path, family: str, folder: Path) -> dict:
    """What a process of its own reports, with its compile cache in ``cache``."""
    environment = {
        "COMFYUI_TPU_CACHE": str(cache),
        # JAX keeps what took longer than a second. How long the tiny programs take depends on the machine.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return printed(PROCESS, cache, family, str(folder), seconds=300, environment=environment)


@pytest.mark.parametrize(("family", "checkpoint"), [("wan", "wan21-tiny"), ("flux2", "flux2-tiny")])
def test_a_second_process_compiles_nothing_and_is_ready_within_five_seconds(tmp_path, family, checkpoint):
    folder, cache = write(checkpoint, tmp_path / checkpoint), tmp_path / "cache"
    cache.mkdir()
    cold = started(cache, family, folder)
    assert cold["misses"] > 0
    warm = [started(cache, family, folder)]
    # The least of a few counts: a busy machine only adds to it.
    while min(each["seconds"] for each in warm) > WARM_SECONDS and len(warm) < 4:
        warm.append(started(cache, family, folder))
    print(f"\n{checkpoint}: cold {cold['seconds']:.1f} s, warm {[round(each['seconds'], 2) for each in warm]} s")
    assert [each["misses"] for each in warm] == [0] * len(warm)
    assert all(each["hits"] >= cold["misses"] for each in warm)
    assert {each["latents"] for each in warm} == {cold["latents"]}
    assert min(each["seconds"] for each in warm) <= WARM_SECONDS
