"""The Wan 2.1 nodes as users' workflows know them, their texts in both languages, their help pages, the examples."""

import pytest

from tests.comfy.contract import Contract, Node, example_prompts

pytestmark = pytest.mark.server

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

NODES = {
    "Wan21TextEncoder": Node(
        "Wan 2.1 Text Encoder (TPU)",
        PROMPTS,
        {"model_id": MODEL_ID},
        [("CONDITIONING", "prompt_embeds"), ("CONDITIONING", "negative_prompt_embeds")],
    ),
    "Wan21TPUSampler": Node(
        "Wan 2.1 TPU Sampler",
        {**EMBEDS, **SAMPLING},
        {"model_id": MODEL_ID, "flow_shift": FLOW_SHIFT, "k_smooth": K_SMOOTH},
        [("LATENT", "latents"), ("INT", "num_frames")],
    ),
    "Wan21TPUVAEDecoder": Node(
        "Wan 2.1 TPU VAE Decoder",
        {"latents": ("LATENT", {})},
        {"model_id": MODEL_ID, "fps": FPS},
        VIDEO,
    ),
    "Wan21TPUPipeline": Node(
        "Wan 2.1 TPU Full Pipeline",
        {**PROMPTS, **SAMPLING},
        {"model_id": MODEL_ID, "fps": FPS, "flow_shift": FLOW_SHIFT, "k_smooth": K_SMOOTH},
        VIDEO,
    ),
}
CONTRACT = Contract("ComfyUI-Wan21-TPU", "TPU/Wan2.1", NODES)


def test_everything_was_imported(server, object_info):
    assert "IMPORT FAILED" not in server.log()
    assert set(NODES) <= set(object_info)


def test_the_frontend_is_given_the_script_that_keeps_translations(server):
    (script,) = [path for path in server.get("/extensions") if path.startswith("/extensions/comfyui-tpu/")]
    assert b"mergeLocaleMessage" in server.get_bytes(script)


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
    prompts = example_prompts(object_info, "wan21_*.json")
    assert set(prompts) == {"wan21_t2v_demo", "wan21_t2v_14b_720p", "wan21_t2v_1.3b_480p"}
    for prompt in prompts.values():
        sampler = next(node for node in prompt.values() if node["class_type"] == "Wan21TPUSampler")["inputs"]
        assert sampler["k_smooth"] is False
        assert sampler["seed"] == 2025
        assert sampler["flow_shift"] == (5.0 if sampler["height"] == 720 else 3.0)
