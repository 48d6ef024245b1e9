"""``--disable-metadata``: nothing is stored. In a process of its own, as ComfyUI reads the switch when it starts."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from PIL import Image

from tests.comfy.server import REPOSITORY

SCRIPT = """
    import importlib.util, json, sys
    sys.argv = ["main.py", "--cpu", *sys.argv[1:]]
    import comfy.options
    comfy.options.enable_args_parsing()
    import folder_paths, torch
    from comfy_api.latest import io
    folder_paths.set_output_directory({folder!r})
    path = {path!r}
    spec = importlib.util.spec_from_file_location("nodes_metadata", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    node = module.SaveImageWithMetadataTPU
    hidden = {{io.Hidden.prompt: {{"1": {{}}}}, io.Hidden.extra_pnginfo: {{"workflow": {{"nodes": []}}}}}}
    node = node.PREPARE_CLASS_CLONE(hidden)
    extra = json.dumps({{"Author": "A"}})
    saved = node.execute(image=torch.zeros(1, 4, 4, 3), filename_prefix="a", with_workflow=True, metadata_extra=extra)
    print(json.dumps([saved.ui["images"][0]["filename"], saved.result[0].extra]))
"""


@pytest.mark.server
@pytest.mark.parametrize(
    ("switch", "stored"), [([], {"prompt", "workflow", "Author"}), (["--disable-metadata"], set())]
)
def test_the_switch_keeps_all_metadata_out_of_files(comfyui_checkout, tmp_path, switch, stored):
    path = REPOSITORY / "custom_nodes" / "ComfyUI-TPU-Monitor" / "nodes_metadata.py"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT).format(folder=str(tmp_path), path=str(path)), *switch],
        cwd=comfyui_checkout,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    name, extra = json.loads(done.stdout.splitlines()[-1])
    with Image.open(tmp_path / name) as image:
        assert set(image.text) == stored
    assert set(extra) == stored & {"Author"}
