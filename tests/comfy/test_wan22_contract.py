"""The Wan 2.2 I2V nodes as users' workflows know them, their texts in both languages, help pages and examples."""

import pytest

from comfyui_tpu.models.wan_i2v import RESIZE_MODES
from tests.comfy.contract import Contract, Node, example_prompts

pytestmark = pytest.mark.server

MODEL_ID = ("STRING", {"default": "Wan-AI/Wan2.2-I2V-A14B-Diffusers"})
SIZE = {"min": 256, "max": 1280, "step": 16}
EMBEDS = {"prompt_embeds": ("CONDITIONING", {}), "negative_prompt_embeds": ("CONDITIONING", {})}
GUIDANCE = {"max": 20.0, "step": 0.1}

NODES = {
    "Wan22I2VImageEncoder": Node(
        "Wan 2.2 I2V Image Encoder (TPU)",
        {
            "image": ("IMAGE", {}),
            "height": ("INT", {"default": 720, **SIZE}),
            "width": ("INT", {"default": 1280, **SIZE}),
            "num_frames": ("INT", {"default": 81, "min": 17, "max": 121, "step": 4}),
        },
        {
            "model_id": MODEL_ID,
            "end_image": ("IMAGE", {}),
            "resize_mode": ("COMBO", {"default": "crop", "options": list(RESIZE_MODES)}),
        },
        [("CONDITION", "condition"), ("LATENT_INFO", "latent_info")],
    ),
    "Wan22I2VTextEncoder": Node(
        "Wan 2.2 I2V Text Encoder (TPU)",
        {"prompt": ("STRING", {"multiline": True}), "negative_prompt": ("STRING", {"multiline": True})},
        {"model_id": MODEL_ID},
        [("CONDITIONING", "prompt_embeds"), ("CONDITIONING", "negative_prompt_embeds")],
    ),
    "Wan22I2VTPUSampler": Node(
        "Wan 2.2 I2V TPU Sampler",
        {
            **EMBEDS,
            "condition": ("CONDITION", {}),
            "latent_info": ("LATENT_INFO", {}),
            "num_inference_steps": ("INT", {"default": 40, "min": 1, "max": 100}),
            "guidance_scale": ("FLOAT", {"default": 3.5, "min": 0.0, **GUIDANCE}),
            "shift": ("FLOAT", {"default": 5.0, "min": 1.0, "max": 20.0, "step": 0.1}),
            "seed": ("INT", {"default": 0, "min": 0, "control_after_generate": True}),
        },
        {
            "model_id": MODEL_ID,
            "guidance_scale_2": ("FLOAT", {"default": -1.0, "min": -1.0, **GUIDANCE}),
            "k_smooth": ("BOOLEAN", {"default": False}),
        },
        [("LATENT", "latents"), ("INT", "num_frames")],
    ),
    "Wan22I2VTPUVAEDecoder": Node(
        "Wan 2.2 I2V TPU VAE Decoder",
        {"latents": ("LATENT", {})},
        {"model_id": MODEL_ID, "fps": ("INT", {"default": 16, "min": 1, "max": 60})},
        [("IMAGE", "frames"), ("FLOAT", "fps")],
    ),
}
CONTRACT = Contract("ComfyUI-Wan22-I2V-TPU", "TPU/Wan2.2-I2V", NODES)


@pytest.mark.parametrize("node_id", NODES)
def test_the_node_is_what_users_workflows_expect(object_info, node_id):
    CONTRACT.check_schema(object_info, node_id)


@pytest.mark.parametrize("node_id", NODES)
def test_everything_has_a_description_in_english_and_chinese_that_the_server_serves(server, object_info, node_id):
    CONTRACT.check_texts(server, object_info, node_id)


@pytest.mark.parametrize("node_id", NODES)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_help_page_is_where_the_frontend_asks_for_it(server, object_info, node_id, language):
    CONTRACT.check_help_page(server, object_info, node_id, language)


def test_the_examples_fit_the_nodes(object_info):
    prompts = example_prompts(object_info, "wan22_i2v_*.json")
    assert set(prompts) == {"wan22_i2v_demo", "wan22_i2v_a14b"}
    for prompt in prompts.values():
        by_type = {node["class_type"]: node["inputs"] for node in prompt.values()}
        sampler = by_type["Wan22I2VTPUSampler"]
        wanted = {"guidance_scale": 3.5, "shift": 5.0, "seed": 0, "guidance_scale_2": -1.0, "k_smooth": False}
        assert {name: sampler[name] for name in wanted} == wanted
        assert by_type["Wan22I2VImageEncoder"]["resize_mode"] == "crop"
        assert by_type["LoadImage"]["image"] == "example.png", "the picture every ComfyUI ships"
    real = {node["class_type"]: node["inputs"] for node in prompts["wan22_i2v_a14b"].values()}
    size = [real["Wan22I2VImageEncoder"][name] for name in ("width", "height", "num_frames")]
    assert size == [832, 1104, 81]
    assert real["Wan22I2VTPUSampler"]["num_inference_steps"] == 40
