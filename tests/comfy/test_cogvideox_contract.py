"""The CogVideoX nodes as users' workflows know them, their texts in both languages, their help pages, the examples."""

import pytest

from tests.comfy.contract import Contract, Node, example_prompts

pytestmark = pytest.mark.server

SIZE = {"min": 16, "max": 2048, "step": 16}
SAMPLING = {
    "height": ("INT", {"default": 720, **SIZE}),
    "width": ("INT", {"default": 1280, **SIZE}),
    "num_frames": ("INT", {"default": 81, "min": 9, "max": 161}),
    "num_inference_steps": ("INT", {"default": 50, "min": 1, "max": 100}),
    "guidance_scale": ("FLOAT", {"default": 6.0, "min": 1.0, "max": 20.0}),
    "seed": ("INT", {"default": 42, "min": 0, "control_after_generate": True}),
}
RUNTIME = {
    "num_devices": ("INT", {"default": 0, "min": 0}),
    "scheduler": ("COMBO", {"default": "checkpoint", "options": ["checkpoint", "dpm", "ddim"]}),
    "dynamic_cfg": ("BOOLEAN", {"default": False}),
    "k_smooth": ("BOOLEAN", {"default": False}),
}
MODEL_SOCKET = ("STRING", {"forceInput": True})

NODES = {
    "CogVideoXTextEncoder": Node(
        "CogVideoX Text Encoder (TPU)",
        {
            "prompt": ("STRING", {"multiline": True}),
            "negative_prompt": ("STRING", {"multiline": True, "default": ""}),
            "model_id": ("STRING", {"default": "zai-org/CogVideoX1.5-5B"}),
        },
        {},
        [("COGVIDEOX_EMBEDS", "embeddings")],
    ),
    "CogVideoXTPUSampler": Node(
        "CogVideoX TPU Sampler",
        {"embeddings": ("COGVIDEOX_EMBEDS", {}), **SAMPLING},
        {**RUNTIME, "model_id": MODEL_SOCKET},
        [("LATENT", "latents"), ("STRING", "info")],
    ),
    "CogVideoXTPUVAEDecoder": Node(
        "CogVideoX TPU VAE Decoder",
        {"latents": ("LATENT", {}), "fps": ("INT", {"default": 16, "min": 1, "max": 60})},
        {"model_id": MODEL_SOCKET},
        [("IMAGE", "frames"), ("FLOAT", "fps")],
    ),
}
CONTRACT = Contract("ComfyUI-CogVideoX-TPU", "TPU/CogVideoX", NODES)


def test_everything_was_imported(server, object_info):
    assert "IMPORT FAILED" not in server.log()
    assert set(NODES) <= set(object_info)


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
    prompts = example_prompts(object_info, "cogvideox*.json")
    sizes = {"cogvideox_t2v_demo": (96, 128, 17, 8), "cogvideox15_5b_720p": (720, 1280, 81, 50)}
    assert set(prompts) == set(sizes)
    for name, prompt in prompts.items():
        sampler = prompt["3"]["inputs"]
        height, width, num_frames, steps = sizes[name]
        expected = {"height": height, "width": width, "num_frames": num_frames, "num_inference_steps": steps}
        expected |= {"guidance_scale": 6.0, "seed": 42, "num_devices": 0, "scheduler": "checkpoint"}
        expected |= {"dynamic_cfg": False, "k_smooth": False, "embeddings": ["2", 0]}
        assert sampler == expected
        assert prompt["4"]["inputs"] == {"latents": ["3", 0], "fps": 16}
