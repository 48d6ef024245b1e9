"""Tiny checkpoints whose weights outweigh what their programs compute with, and prompts for the four packs.

The prompts end in a hash of the result, so that every run can be compared with the first one of the same settings.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from tests.checkpoints import write

MIB = 2**20
CHECKPOINTS = ("flux2-tiny", "wan21-tiny", "wan22-i2v-tiny", "cogvideox15-tiny")
EMBEDDING_BYTES = 96 * MIB  # what is added to each text encoder: rows of its vocabulary that no tokenizer names
# One model with what its programs compute with fits (at most 140 MiB), two text encoders do not.
BUDGET = 192 * MIB
# XLA computes 3-D convolutions slowly on a CPU: as few channels as there can be.
VAE = {"base_dim": 4, "dim_mult": [1, 1, 2, 2]}
EMBEDDINGS = ("shared.weight", "embed_tokens.weight")


def write_checkpoints(folder: Path) -> None:
    for name in CHECKPOINTS:
        write(name, folder / name, **({"vae": VAE} if name.startswith("wan") else {}))
        enlarge(folder / name / "text_encoder", EMBEDDING_BYTES)


def enlarge(text_encoder: Path, nbytes: int) -> None:
    """Add rows of ``nbytes`` to the embedding table of a stored text encoder."""
    config = json.loads((text_encoder / "config.json").read_text())
    for file in sorted(text_encoder.glob("*.safetensors")):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith(EMBEDDINGS):
                rows, width = tensors[name].shape
                more = nbytes // (width * tensors[name].element_size())
                tensors[name] = pad(tensors[name], (0, 0, 0, more))
                config.get("text_config", config)["vocab_size"] = rows + more
        save_file(tensors, file, {"format": "pt"})
    (text_encoder / "config.json").write_text(json.dumps(config))


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def end(node_id: str) -> dict:
    return node("ReliabilityEnd", value=[node_id, 0])


def flux2(seed: int, steps: int = 2, prompt: str = "a red fox", model_id: str = "flux2-tiny") -> dict:
    size = {"height": 256, "width": 256, "model_id": model_id}
    sampling = {"num_inference_steps": steps, "guidance_scale": 4.0, "seed": seed}
    return {
        "1": node("Flux2TextEncoder", prompt=prompt, model_id=model_id),
        "2": node("Flux2TPUSampler", prompt_embeds=["1", 0], **size, **sampling),
        "3": node("Flux2TPUVAEDecoder", latents=["2", 0], **size),
        "end": end("3"),
    }


def cogvideox(seed: int, steps: int = 2, prompt: str = "a red fox", model_id: str = "cogvideox15-tiny") -> dict:
    size = {"height": 48, "width": 64, "num_frames": 9}
    sampling = {"num_inference_steps": steps, "guidance_scale": 6.0, "seed": seed}
    return {
        "1": node("CogVideoXTextEncoder", prompt=prompt, negative_prompt="", model_id=model_id),
        "2": node("CogVideoXTPUSampler", embeddings=["1", 0], **size, **sampling),
        "3": node("CogVideoXTPUVAEDecoder", latents=["2", 0], fps=16),
        "end": end("3"),
    }


def wan21(seed: int, steps: int = 2, prompt: str = "a red fox", decode: bool = False, model_id="wan21-tiny") -> dict:
    size = {"height": 256, "width": 256, "num_frames": 17}
    sampling = {"num_inference_steps": steps, "guidance_scale": 5.0, "seed": seed, "flow_shift": 3.0}
    embeds = {"prompt_embeds": ["1", 0], "negative_prompt_embeds": ["1", 1]}
    return {
        "1": node("Wan21TextEncoder", prompt=prompt, negative_prompt="", model_id=model_id),
        "2": node("Wan21TPUSampler", **embeds, **size, **sampling, model_id=model_id),
        **({"3": node("Wan21TPUVAEDecoder", latents=["2", 0], model_id=model_id)} if decode else {}),
        "end": end("3" if decode else "2"),
    }


def wan22(
    seed: int, steps: int = 2, prompt: str = "a red fox", decode: bool = False, model_id="wan22-i2v-tiny"
) -> dict:
    """With ``decode`` also from a picture; else from a condition made up, for the autoencoder takes seconds."""
    size = {"height": 256, "width": 256, "num_frames": 17}
    sampling = {"num_inference_steps": steps, "guidance_scale": 3.5, "shift": 5.0, "seed": seed}
    embeds = {"prompt_embeds": ["1", 0], "negative_prompt_embeds": ["1", 1]}
    condition = {"condition": ["5", 0], "latent_info": ["5", 1]}
    picture = node("EmptyImage", width=256, height=256, batch_size=1, color=0x3366CC)
    encoder = node("Wan22I2VImageEncoder", image=["4", 0], **size, model_id=model_id)
    return {
        "1": node("Wan22I2VTextEncoder", prompt=prompt, negative_prompt="", model_id=model_id),
        **({"4": picture, "5": encoder} if decode else {"5": node("ReliabilityCondition", seed=1)}),
        "2": node("Wan22I2VTPUSampler", **embeds, **condition, **sampling, model_id=model_id),
        **({"3": node("Wan22I2VTPUVAEDecoder", latents=["2", 0], model_id=model_id)} if decode else {}),
        "end": end("3" if decode else "2"),
    }


PACKS = {"flux2-tiny": flux2, "wan21-tiny": wan21, "wan22-i2v-tiny": wan22, "cogvideox15-tiny": cogvideox}
