"""The node packs' schemas as the server would send them, without a server."""

from __future__ import annotations

import functools
from pathlib import Path

from tests.comfy.script import printed
from tests.comfy.server import REPOSITORY

PACKS = sorted((REPOSITORY / "custom_nodes").glob("ComfyUI-*"))

SCRIPT = """
import asyncio, json, pathlib, sys
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import nodes
found = {}
for pack in sys.stdin.read().split("\\n"):
    before = set(nodes.NODE_CLASS_MAPPINGS)
    assert asyncio.run(nodes.load_custom_node(pack)), pack
    new = [name for name in nodes.NODE_CLASS_MAPPINGS if name not in before]
    found[pathlib.Path(pack).name] = {name: nodes.NODE_CLASS_MAPPINGS[name].GET_NODE_INFO_V1() for name in new}
print(json.dumps(found))
"""


@functools.cache
def schemas(comfyui: Path) -> dict[str, dict[str, dict]]:
    """Pack → node id → what ``/object_info`` says of it, in the pack's own order."""
    return printed(SCRIPT, comfyui, given="\n".join(map(str, PACKS)), seconds=180)
