"""Loading the packs must cost ComfyUI's start next to nothing, and must leave the TPU to whoever uses it first."""

import textwrap

import pytest

from tests.comfy.script import printed
from tests.comfy.server import REPOSITORY

PACKS = sorted(str(pack) for pack in (REPOSITORY / "custom_nodes").glob("ComfyUI-*"))


@pytest.mark.server
def test_the_packs_import_fast_and_without_jax(comfyui_checkout):
    script = textwrap.dedent(f"""
        import asyncio, importlib.util, json, sys, time
        sys.argv = ["main.py", "--cpu"]
        import comfy.options
        comfy.options.enable_args_parsing()
        import nodes  # what ComfyUI has loaded before it comes to custom nodes
        before, start = set(sys.modules), time.process_time()
        loaded = [pack for pack in {PACKS!r} if asyncio.run(nodes.load_custom_node(pack))]
        seconds = time.process_time() - start
        packages = sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})
        print(json.dumps([loaded, seconds, packages]))
    """)
    loaded, seconds, packages = printed(script, comfyui_checkout)
    assert loaded == PACKS
    assert seconds < len(PACKS)
    assert not {"jax", "jaxlib", "torchax", "diffusers"} & set(packages)
