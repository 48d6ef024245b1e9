"""The nodes as users' workflows know them, their texts in both languages, their help pages, the example workflows."""

import json

import pytest

from bootstrap.workflow import to_api_prompt
from tests.comfy.server import REPOSITORY

pytestmark = pytest.mark.server

PACK = REPOSITORY / "custom_nodes" / "ComfyUI-Wan21-TPU"
MODEL_ID = ("STRING", {"default": "Wan-AI/Wan2.1-T2V-14B-Diffusers"})
SIZE = {"min": 256, "max": 1280, "step": 16}
PROMPTS = {"prompt": ("STRING", {"multiline": True}), "negative_prompt": ("STRING", {"multiline": True})}
SAMPLING = {
    "height": ("INT", {"default": 720, **SIZE}),
    "width": ("INT", {"default": 1280, **SIZE}),
    "num_frames": ("INT", {"default": 81, "min": 17, "max": 121, "step": 4}),
    "num_inference_steps": ("INT", {"default": 50, "min": 1, "max": 100}),
    "guidance_scale": ("FLOAT", {"default": 5.0, "min": 0.0, "max": 20.0}),
    "seed": ("INT", {"default": 2025, "min": 0, "control_after_generate": True}),
}
FLOW_SHIFT = ("FLOAT", {"default": 5.0, "min": 1.0, "max": 10.0, "step": 0.5})
FPS = ("INT", {"default": 16, "min": 1, "max": 60})
K_SMOOTH = ("BOOLEAN", {"default": False})
EMBEDS = {"prompt_embeds": ("CONDITIONING", {}), "negative_prompt_embeds": ("CONDITIONING", {})}
VIDEO = [("IMAGE", "frames"), ("FLOAT", "fps")]

# id: (display name, required inputs, optional inputs, outputs), as in nodes.md
NODES = {
    "Wan21TextEncoder": (
        "Wan 2.1 Text Encoder (TPU)",
        PROMPTS,
        {"model_id": MODEL_ID},
        [("CONDITIONING", "prompt_embeds"), ("CONDITIONING", "negative_prompt_embeds")],
    ),
    "Wan21TPUSampler": (
        "Wan 2.1 TPU Sampler",
        {**EMBEDS, **SAMPLING},
        {"model_id": MODEL_ID, "flow_shift": FLOW_SHIFT, "k_smooth": K_SMOOTH},
        [("LATENT", "latents"), ("INT", "num_frames")],
    ),
    "Wan21TPUVAEDecoder": (
        "Wan 2.1 TPU VAE Decoder",
        {"latents": ("LATENT", {})},
        {"model_id": MODEL_ID, "fps": FPS},
        VIDEO,
    ),
    "Wan21TPUPipeline": (
        "Wan 2.1 TPU Full Pipeline",
        {**PROMPTS, **SAMPLING},
        {"model_id": MODEL_ID, "fps": FPS, "flow_shift": FLOW_SHIFT, "k_smooth": K_SMOOTH},
        VIDEO,
    ),
}


def test_everything_was_imported(server, object_info):
    assert "IMPORT FAILED" not in server.log()
    assert set(NODES) <= set(object_info)


def test_the_frontend_is_given_the_script_that_keeps_translations(server):
    (script,) = [path for path in server.get("/extensions") if path.startswith("/extensions/comfyui-tpu/")]
    assert b"mergeLocaleMessage" in server.get_bytes(script)


@pytest.mark.parametrize("node_id", NODES)
def test_the_node_is_what_users_workflows_expect(object_info, node_id):
    display_name, required, optional, outputs = NODES[node_id]
    info = object_info[node_id]
    assert (info["display_name"], info["category"]) == (display_name, "TPU/Wan2.1")
    assert list(zip(info["output"], info["output_name"], strict=True)) == outputs
    for section, expected in (("required", required), ("optional", optional)):
        found = info["input"][section]
        assert list(found) == list(expected) == info["input_order"][section]
        for name, (kind, options) in expected.items():
            assert found[name][0] == kind
            assert {key: found[name][1].get(key) for key in options} == options, name


@pytest.mark.parametrize("node_id", NODES)
def test_everything_has_a_description_in_english_and_chinese_that_the_server_serves(server, object_info, node_id):
    info = object_info[node_id]
    served = server.get("/i18n")
    english, chinese = (served[language]["nodeDefs"][node_id] for language in ("en", "zh"))
    assert english["display_name"] == info["display_name"]
    assert english["description"] == info["description"] != ""
    assert chinese["display_name"]
    assert chinese["description"]
    inputs = {**info["input"]["required"], **info["input"]["optional"]}
    assert {name: spec[1]["tooltip"] for name, spec in inputs.items()} == {
        name: text["tooltip"] for name, text in english["inputs"].items()
    }
    tooltips = [english["outputs"][str(i)]["tooltip"] for i in range(len(info["output"]))]
    assert tooltips == info["output_tooltips"]
    for name in inputs:
        assert chinese["inputs"][name]["name"]
        assert chinese["inputs"][name]["tooltip"]
    for i in range(len(info["output"])):
        assert chinese["outputs"][str(i)]["name"]
        assert chinese["outputs"][str(i)]["tooltip"]


@pytest.mark.parametrize("node_id", NODES)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_help_page_is_where_the_frontend_asks_for_it(server, object_info, node_id, language):
    module = object_info[node_id]["python_module"].split(".")[1]
    page = server.get_bytes(f"/extensions/{module}/docs/{node_id}/{language}.md").decode()
    locale = json.loads((PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert page.startswith(f"# {locale[node_id]['display_name']}\n")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples").glob("wan21_*.json")), ids=lambda path: path.stem)
def test_an_example_fits_the_nodes(object_info, path):
    prompt = to_api_prompt(json.loads(path.read_text(encoding="utf-8")), object_info)
    sampler = next(node for node in prompt.values() if node["class_type"] == "Wan21TPUSampler")["inputs"]
    assert sampler["k_smooth"] is False
    assert sampler["seed"] == 2025
    assert sampler["flow_shift"] == (5.0 if sampler["height"] == 720 else 3.0)
    models = {node["inputs"]["model_id"] for node in prompt.values() if "model_id" in node["inputs"]}
    assert len(models) == 1
    for node in prompt.values():
        info = object_info[node["class_type"]]["input"]
        assert set(info["required"]) <= set(node["inputs"])
        assert set(node["inputs"]) <= {*info["required"], *info.get("optional", {})}
