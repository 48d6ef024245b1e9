"""CONDITION and LATENT_INFO between image encoder and sampler; Cancel while the second expert is loaded. No server."""

import functools

import pytest
import torch

from comfyui_tpu.comfy.condition import from_sockets, to_sockets
from comfyui_tpu.comfy.reporter import NodeReporter
from comfyui_tpu.models.wan_i2v import Condition, WanImageToVideo
from comfyui_tpu.runtime.errors import InvalidInput, NumericsError
from comfyui_tpu.runtime.registry import registry
from comfyui_tpu.runtime.reporting import reporting
from tests.checkpoints import write

SIZE = {"height": 256, "width": 272, "num_frames": 17}
SHAPE = (1, 20, 5, 32, 34)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return WanImageToVideo.open(write("wan22-i2v-tiny", tmp_path_factory.mktemp("models") / "wan22-i2v-tiny"))


def test_what_the_encoder_gives_arrives_at_the_sampler(model):
    condition = Condition(torch.rand(SHAPE), **SIZE)
    latents, info = to_sockets(condition)
    assert latents.shape == SHAPE
    assert info == SIZE
    arrived = from_sockets(model, latents, info)
    assert torch.equal(arrived.latents, condition.latents)
    assert (arrived.height, arrived.width, arrived.num_frames) == (256, 272, 17)
    assert arrived.image_embeds is None


def test_clip_embeddings_of_wan_21_travel_along():
    embeds = torch.rand(1, 257, 8)
    assert to_sockets(Condition(torch.rand(SHAPE), **SIZE, image_embeds=embeds))[1]["image_embeds"] is embeds


def test_a_model_that_needs_clip_embeddings_says_so(model, monkeypatch):
    monkeypatch.setattr(model, "image_encoder", object())
    with pytest.raises(InvalidInput, match=r"no image_embeds\. Use the image encoder node with the same model_id"):
        from_sockets(model, torch.rand(SHAPE), SIZE)
    embeds = torch.rand(1, 257, 8)
    assert torch.equal(from_sockets(model, torch.rand(SHAPE), {**SIZE, "image_embeds": embeds}).image_embeds, embeds)


@pytest.mark.parametrize(
    ("shape", "info", "part"),
    [
        (
            SHAPE,
            {**SIZE, "height": 272},
            r"\[batch, 20, 5, 34, 34\].*272×272.*17 frames; but \[1, 20, 5, 32, 34\] came",
        ),
        (SHAPE, {**SIZE, "num_frames": 21}, r"\[batch, 20, 6, 32, 34\]"),
        ((1, 16, 5, 32, 34), SIZE, r"\[batch, 20, 5, 32, 34\].*but \[1, 16, 5, 32, 34\] came"),
        ((0, *SHAPE[1:]), SIZE, r"but \[0, 20, 5, 32, 34\] came"),
        (SHAPE[1:], SIZE, r"but \[20, 5, 32, 34\] came"),
        (SHAPE, {**SIZE, "height": 264}, "height must be a multiple of 16"),
        (SHAPE, {"height": 256, "width": 272}, "'num_frames': None.*Connect both outputs of the same image encoder"),
        (SHAPE, {**SIZE, "width": 272.0}, "as whole numbers, but .*272.0"),
        (SHAPE, "a string", "but str came"),
    ],
)
def test_what_does_not_belong_together_is_refused_with_both_values(model, shape, info, part):
    with pytest.raises(InvalidInput, match=part):
        from_sockets(model, torch.zeros(shape), info)


def test_what_is_no_tensor_is_refused(model):
    with pytest.raises(InvalidInput, match="but dict came"):
        from_sockets(model, {"samples": 1}, SIZE)


def test_nan_is_reported(model):
    with pytest.raises(NumericsError, match="condition holds NaN"):
        from_sockets(model, torch.full(SHAPE, torch.nan), SIZE)


class Cancelled(Exception):
    pass


def test_cancel_while_the_second_expert_is_loaded_stops_at_once_and_leaves_nothing_half_done(model):
    texts, steps = [], []

    def cancel_during_second_load():
        if texts and texts[-1].startswith("loading transformer_2"):
            raise Cancelled

    def sample(raise_if_cancelled=lambda: None):
        node = NodeReporter(show_text=texts.append, update_bar=lambda *_: None, raise_if_cancelled=raise_if_cancelled)
        on_step = lambda info: (steps.append(info.expert), node.step(info))  # noqa: E731
        with reporting(node), torch.inference_mode():
            return run(on_step=on_step)

    embeds = torch.rand(2, 1, 512, model.text_dim, generator=torch.Generator().manual_seed(1))
    condition = Condition(torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)), **SIZE)
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "seed": 3, "shift": 5.0}
    run = functools.partial(model.sample, *embeds, condition, **settings)

    registry().release_all()
    with pytest.raises(Cancelled):
        sample(cancel_during_second_load)
    assert set(steps) == {"high-noise expert"}, "the first expert had worked, the second had not"
    assert [text for text in texts if text.startswith("loading transformer_2")] == [texts[-1]]
    held = " ".join(registry().holdings())
    assert "transformer of" in held
    assert "transformer_2" not in held

    steps.clear()
    again = sample()
    assert steps == ["high-noise expert"] * 2 + ["low-noise expert"] * 2
    assert torch.equal(again, sample())
