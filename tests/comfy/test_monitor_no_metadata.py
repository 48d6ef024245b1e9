"""``--disable-metadata``: nothing is stored. In a process of its own, as ComfyUI reads the switch when it starts."""

import textwrap
from pathlib import Path

import pytest
from PIL import Image

from tests.comfy.script import printed
from tests.comfy.server import REPOSITORY

SCRIPT = """
    import importlib.util, json, sys
    sys.argv = ["main.py", "--cpu", *sys.argv[1:]]
    import comfy.options
    comfy.options.enable_args_parsing()
    import folder_paths, torch
    from comfy.cli_args import args
    from comfy_api.latest import io
    folder_paths.set_output_directory({folder!r})
    path = {path!r}
    spec = importlib.util.spec_from_file_location("nodes_metadata", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    node = module.SaveImageWithMetadataTPU
    hidden = {{io.Hidden.prompt: {{"1": {{}}}}, io.Hidden.extra_pnginfo: {{"workflow": {{"nodes": []}}}}}}
    node = node.PREPARE_CLASS_CLONE(hidden)
    found = []
    for disabled in (args.disable_metadata, False):
        args.disable_metadata = disabled
        result = node.execute(torch.zeros(1, 4, 4, 3), "a", with_workflow=True, metadata_extra='{{"Author": "A"}}')
        found.append([disabled, result.ui["images"][0]["filename"], result.result[0].extra])
    print(json.dumps(found))
"""


@pytest.mark.server
def test_the_switch_keeps_all_metadata_out_of_files(comfyui_checkout, tmp_path):
    path = REPOSITORY / "custom_nodes" / "ComfyUI-TPU-Monitor" / "nodes_metadata.py"
    script = textwrap.dedent(SCRIPT).format(folder=str(tmp_path), path=str(path))
    found = printed(script, comfyui_checkout, "--disable-metadata")
    assert [(disabled, extra) for disabled, _, extra in found] == [(True, {}), (False, {"Author": "A"})]
    assert [stored(tmp_path / name) for _, name, _ in found] == [set(), {"prompt", "workflow", "Author"}]


def stored(path: Path) -> set[str]:
    with Image.open(path) as image:
        return set(image.text)
