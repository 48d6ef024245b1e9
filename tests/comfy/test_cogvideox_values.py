"""What the CogVideoX nodes hand each other, the chips they use, and previews without a latent format in core."""

import sys
from types import ModuleType, SimpleNamespace

import jax
import pytest
import torch

from comfyui_tpu.comfy import cogvideox
from comfyui_tpu.comfy.conversions import check_choice
from comfyui_tpu.comfy.devices import first_devices
from comfyui_tpu.comfy.previews import rgb_previewer
from comfyui_tpu.runtime.errors import InvalidInput, NumericsError
from tests.checkpoints import write

MODEL = SimpleNamespace(
    text_dim=8, latent_channels=16, decode=lambda latents, num_frames: (latents.shape[2], num_frames)
)


def embeds(**changes):
    positive, negative = torch.ones(1, 226, 8), torch.zeros(1, 226, 8)
    return {**cogvideox.to_embeds("a-model", positive, negative), **changes}


def test_embeds_come_back_as_positive_and_negative():
    positive, negative = cogvideox.from_embeds(embeds(), MODEL)
    assert positive.shape == negative.shape == (1, 226, 8)
    assert positive.all()
    assert not negative.any()


def test_embeds_of_another_width_are_refused_by_name():
    wide = embeds(negative=[[torch.zeros(1, 226, 16), {}]])
    with pytest.raises(InvalidInput, match=r"embeddings \(negative\) is 16 wide.* 8 wide"):
        cogvideox.from_embeds(wide, MODEL)


def test_the_model_comes_with_the_embeds_unless_one_is_connected():
    assert cogvideox.embeds_model_id(embeds(), "") == "a-model"
    assert cogvideox.embeds_model_id(embeds(), "another") == "another"
    with pytest.raises(InvalidInput, match=r"embeddings carry no model_id.*Connect CogVideoX Text Encoder"):
        cogvideox.embeds_model_id(embeds(model_id=""), "")


@pytest.mark.parametrize(
    ("value", "came"),
    [([[torch.zeros(1), {}]], "list came"), ({"positive": []}, r"a mapping with \['positive'\] came"), (None, "None")],
)
def test_what_is_not_embeds_is_refused_also_with_a_model_connected(value, came):
    with pytest.raises(InvalidInput, match=rf"COGVIDEOX_EMBEDS with 'positive' and 'negative', but .*{came}"):
        cogvideox.embeds_model_id(value, "a-model")


def test_the_latent_knows_its_model_and_its_frames():
    latent = cogvideox.to_video_latent(torch.zeros(1, 16, 6, 2, 2), "a-model", 20)
    assert cogvideox.latent_model_id(latent, "") == "a-model"
    assert cogvideox.latent_model_id(latent, "another") == "another"
    assert cogvideox.decode(MODEL, latent) == (6, 20)


def test_a_latent_from_elsewhere_needs_a_model_and_is_decoded_whole():
    latent = {"samples": torch.zeros(1, 16, 6, 2, 2)}
    with pytest.raises(InvalidInput, match=r"latents carry no model_id.*Connect CogVideoX TPU Sampler.*model_id"):
        cogvideox.latent_model_id(latent, "")
    assert cogvideox.decode(MODEL, latent) == (6, None)


def test_nan_never_leaves_the_sampler():
    with pytest.raises(NumericsError):
        cogvideox.to_video_latent(torch.full((1, 16, 6, 2, 2), torch.nan), "a-model", 20)


def test_a_choice_from_a_link_is_checked():
    check_choice("scheduler", "dpm", ("dpm", "ddim"))
    with pytest.raises(InvalidInput, match="scheduler must be one of dpm, ddim, but 'euler' came"):
        check_choice("scheduler", "euler", ("dpm", "ddim"))


def test_devices_are_the_first_ones_and_0_is_all_of_them():
    assert first_devices(0) is None
    assert first_devices(3) == tuple(jax.devices()[:3])
    assert first_devices(8) == tuple(jax.devices())
    with pytest.raises(InvalidInput, match=r"at most 8, .*CPU \(no TPU found\)\), but 9 came. Set it to 0"):
        first_devices(9)


def test_a_model_is_opened_once_for_each_choice_of_devices(tmp_path):
    from comfyui_tpu.models.cogvideox import CogVideoX

    folder = write("cogvideox15-tiny", tmp_path / "cogvideox15-tiny")
    on_three = CogVideoX.open(folder, first_devices(3))
    assert "over 3 × CPU" in on_three.describe_plan()
    assert "over 8 × CPU" in CogVideoX.open(folder, first_devices(0)).describe_plan()
    assert CogVideoX.open(folder, first_devices(3)) is on_three
    assert CogVideoX.open(folder) is CogVideoX.open(folder, first_devices(8))


# --- previews without a latent format in core -------------------------------------------------------------------------


class FakePreviewer:
    """Core's ``Latent2RGBPreviewer``, as far as ours calls it."""

    def __init__(self, factors, bias):
        self.factors, self.bias = torch.tensor(factors), torch.tensor(bias)

    def decode_latent_to_preview_image(self, preview_format, latents):
        return preview_format, latents[0, :, 0].movedim(0, -1) @ self.factors + self.bias, 512


class Cancelled(Exception):
    pass


@pytest.fixture
def core(monkeypatch):
    """Stand-ins for core's modules; ``preview_method`` can be changed."""
    methods = SimpleNamespace(NoPreviews="none", Latent2RGB="latent2rgb")
    arguments = SimpleNamespace(preview_method="latent2rgb")
    modules = {
        "latent_preview": {"Latent2RGBPreviewer": FakePreviewer, "LatentPreviewer": object},
        "comfy": {},
        "comfy.cli_args": {"LatentPreviewMethod": methods, "args": arguments},
        "comfy.model_management": {"InterruptProcessingException": Cancelled},
    }
    for name, values in modules.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return arguments


def factors():
    return torch.eye(16)[:, :3], torch.tensor([0.0, 0.5, 0.0])


def test_the_first_frame_becomes_a_picture(core):
    latents = torch.randn(1, 16, 2, 4, 6)
    kind, picture, size = rgb_previewer(factors)(latents)
    assert (kind, size) == ("JPEG", 512)
    torch.testing.assert_close(picture, latents[0, :3, 0].permute(1, 2, 0) + torch.tensor([0.0, 0.5, 0.0]))


def test_previews_can_be_switched_off(core):
    core.preview_method = "none"
    assert rgb_previewer(factors)(torch.randn(1, 16, 2, 4, 6)) is None


def test_a_failing_preview_does_not_end_the_run(core, caplog):
    preview = rgb_previewer(factors)
    assert preview(torch.randn(1, 4, 2, 4, 6)) is None  # 4 channels do not fit
    assert preview(torch.randn(1, 16, 2, 4, 6)) is None  # and none is tried again
    assert caplog.text.count("Latent previews are off") == 1


def test_factors_that_cannot_be_had_do_not_end_the_run(core, caplog):
    def broken():
        raise RuntimeError("no factors")

    assert rgb_previewer(broken)(torch.randn(1, 16, 2, 4, 6)) is None
    assert "Latent previews are off" in caplog.text
