"""The Flux.2 nodes as users' workflows know them, their texts in both languages, their help pages, the examples."""

import pytest

from tests.comfy.contract import Contract, Node, example_prompts

pytestmark = pytest.mark.server

PROMPT = ("STRING", {"multiline": True})
MODEL_ID = ("STRING", {"default": "black-forest-labs/FLUX.2-dev"})
SIZE = {"default": 1024, "min": 256, "max": 2048, "step": 16}
HINT = {"default": 1024, "min": 0, "max": 2048, "step": 16}
SAMPLING = {
    "height": ("INT", SIZE),
    "width": ("INT", SIZE),
    "num_inference_steps": ("INT", {"default": 50, "min": 1, "max": 100}),
    "guidance_scale": ("FLOAT", {"default": 4.0, "min": 0.0, "max": 20.0, "step": 0.1}),
    "seed": ("INT", {"default": 42, "min": 0, "control_after_generate": True}),
}
OPTIONAL = {
    "model_id": MODEL_ID,
    "reference_images": ("IMAGE", {}),
    "reference_images_2": ("IMAGE", {}),
    "reference_images_3": ("IMAGE", {}),
    "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
    "sigmas": ("SIGMAS", {}),
    "k_smooth": ("BOOLEAN", {"default": False}),
}
NODES = {
    "Flux2TextEncoder": Node(
        "Flux.2 Text Encoder (TPU)", {"prompt": PROMPT}, {"model_id": MODEL_ID}, [("CONDITIONING", "prompt_embeds")]
    ),
    "Flux2TPUSampler": Node(
        "Flux.2 TPU Sampler", {"prompt_embeds": ("CONDITIONING", {}), **SAMPLING}, OPTIONAL, [("LATENT", "LATENT")]
    ),
    "Flux2TPUVAEDecoder": Node(
        "Flux.2 TPU VAE Decoder",
        {"latents": ("LATENT", {}), "height": ("INT", HINT), "width": ("INT", HINT)},
        {"model_id": MODEL_ID},
        [("IMAGE", "IMAGE")],
    ),
    "Flux2TPUPipeline": Node(
        "Flux.2 TPU Full Pipeline", {"prompt": PROMPT, **SAMPLING}, OPTIONAL, [("IMAGE", "IMAGE")]
    ),
}
CONTRACT = Contract("ComfyUI-Flux2-TPU", "TPU/Flux.2", NODES)


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
    prompts = example_prompts(object_info, "flux2_*.json")
    assert set(prompts) == {"flux2_demo", "flux2_text_to_image", "flux2_edit"}
    for name, prompt in prompts.items():
        sampler, decoder = prompt["3"]["inputs"], prompt["4"]["inputs"]
        size, steps = (256, 8) if name == "flux2_demo" else (1024, 50)
        expected = {"height": size, "width": size, "num_inference_steps": steps, "guidance_scale": 4.0, "seed": 42}
        expected |= {"batch_size": 1, "k_smooth": False}
        assert {key: sampler[key] for key in expected} == expected
        assert (decoder["height"], decoder["width"]) == (size, size)
        assert ("reference_images" in sampler) == (name == "flux2_edit")
