"""The monitor's nodes: metadata, showing values, JSON, lists, switches, pipes, primitives."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from comfyui_tpu.comfy.checked import checked
from comfyui_tpu.comfy.frontend import register_frontend
from comfyui_tpu.comfy.unload import install_unload_hook

from . import nodes_flow, nodes_json, nodes_metadata


class TPUMonitorExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return checked([*nodes_metadata.NODES, *nodes_json.NODES, *nodes_flow.NODES])


async def comfy_entrypoint() -> TPUMonitorExtension:
    # Here and not in ComfyExtension.on_load, which ComfyUI 0.3.75 never calls.
    install_unload_hook()
    register_frontend()
    return TPUMonitorExtension()
