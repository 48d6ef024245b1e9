"""Every plan that a family admits computes the same, on devices that it cuts evenly and on some that it does not."""

import jax
import pytest
import torch

from comfyui_tpu.models import cogvideox, flux2, wan
from tests.checkpoints import write
from tests.models.plans import admitted, sharded
from tests.models.reference import COMPONENT_BOUND, relative_error

FAMILIES = {
    "flux2-tiny": flux2.Flux2,
    "wan21-tiny": wan.WanTextToVideo,
    "cogvideox15-tiny": cogvideox.CogVideoX,
}


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def denoised(name, model):
    """One call of the transformer with a batch of two."""
    config = model.transformer.raw_config
    if name == "flux2-tiny":
        inputs = {
            "hidden_states": random(0, 2, 35, config["in_channels"]),
            "encoder_hidden_states": random(1, 2, 19, config["joint_attention_dim"]),
            "timestep": torch.tensor([0.7, 0.2]),
            "guidance": torch.tensor([4.0, 4.0]),
            "img_ids": torch.cartesian_prod(*map(torch.arange, (1, 5, 7, 1))).expand(2, -1, -1),
            "txt_ids": torch.cartesian_prod(*map(torch.arange, (1, 1, 1, 19))).expand(2, -1, -1),
        }
    elif name == "wan21-tiny":
        inputs = {
            "hidden_states": random(0, 2, 16, 3, 10, 14),
            "encoder_hidden_states": random(1, 2, 512, config["text_dim"]),
            "timestep": torch.tensor([17, 900]),
        }
    else:
        inputs = {
            "hidden_states": random(0, 2, 4, config["in_channels"], 6, 10),
            "encoder_hidden_states": random(1, 2, 226, config["text_embed_dim"]),
            "timestep": torch.tensor([17, 900]),
            "image_rotary_emb": (
                random(2, 30, config["attention_head_dim"]),
                random(3, 30, config["attention_head_dim"]),
            ),
        }
    return model.transformer(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_plan_of_a_transformer_computes_what_one_device_does(name, tmp_path):
    folder, family = write(name, tmp_path / name), FAMILIES[name]
    expected = denoised(name, sharded(family, folder, tuple(jax.devices()[:1])))
    seen = set()
    for count in (3, 8):
        devices = tuple(jax.devices()[:count])
        for number, plan in enumerate(admitted(family(folder, devices).transformer)):
            found = denoised(name, sharded(family, folder, devices, transformer=number))
            assert relative_error(found, expected) <= COMPONENT_BOUND, f"{plan.name} over {count} devices"
            seen.add(plan.name)
    assert len(seen) > 1, "the family has only one way to run"
