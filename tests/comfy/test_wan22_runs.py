"""Wan 2.2 I2V prompts that work, in a real server: from an uploaded picture to the MP4, and what is shown meanwhile.

The checkpoint's weights are random, so its videos do not show the picture. What can be said honestly: the condition
marks the first frame as given, it holds the picture that was uploaded, and another picture gives another video.
"""

import re

import av
import pytest
import torch
from PIL import Image

from tests.checkpoints import write
from tests.comfy.cancel import check_cancelled, run_and_cancel, steps_done
from tests.comfy.contract import example_prompts

pytestmark = pytest.mark.server

LOAD, IMAGE_ENCODER, ENCODER, SAMPLER, DECODER, SAVE = "2", "3", "4", "5", "6", "8"
STEPS = 4  # two for each expert


def picture(seed=0, size=(256, 256), mode="RGB"):
    """Large coloured blots; another seed, other colours."""
    colours = torch.randint(0, 256, (4, 4, len(mode)), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(colours.to(torch.uint8).numpy(), mode).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module", autouse=True)
def _checkpoint(models_folder):
    write("wan22-i2v-tiny", models_folder / "wan22-i2v-tiny")


@pytest.fixture
def i2v_demo(server, object_info) -> dict:
    """The demo workflow as an API prompt, with an uploaded picture."""
    prompt = example_prompts(object_info, "wan22_i2v_demo.json")["wan22_i2v_demo"]
    prompt[LOAD]["inputs"]["image"] = server.upload("a.png", picture())
    return prompt


@pytest.fixture
def sampling(i2v_demo):
    """Load Image, both encoders and the sampler with few steps, its latents probed."""
    prompt = {node_id: i2v_demo[node_id] for node_id in (LOAD, IMAGE_ENCODER, ENCODER, SAMPLER)}
    prompt[SAMPLER]["inputs"]["num_inference_steps"] = STEPS
    return prompt | {"10": probe(SAMPLER, 0, "i2v_latents")}


def probe(node_id, slot, name):
    return {"class_type": "ProbeSave", "inputs": {"value": [node_id, slot], "name": name}}


def load_image(name):
    return {"class_type": "LoadImage", "inputs": {"image": name}}


def run(server, prompt, on_event=lambda run: None):
    done = server.run(prompt, on_event)
    assert done.succeeded, done.why
    return done


def probed(server, name):
    return torch.load(server.base / "output" / f"{name}.pt", weights_only=True)


def latents_of(server, prompt, node_id=SAMPLER, **changes):
    """Latents of ``prompt`` with changed inputs of one node. Core's cache holds nodes of the last prompt only."""
    prompt[node_id]["inputs"].update(changes)
    run(server, prompt)
    return probed(server, "i2v_latents")["samples"]


def test_the_demo_makes_a_video_of_an_uploaded_picture_and_shows_what_it_does(server, i2v_demo):
    server.release()  # the experts' loading is to be seen
    done = run(server, i2v_demo)

    (saved,) = done.outputs[SAVE]["images"]
    with av.open(str(server.base / "output" / saved["subfolder"] / saved["filename"])) as video:
        stream = video.streams.video[0]
        frames = list(video.decode(stream))
    assert saved["filename"].endswith(".mp4")
    assert (len(frames), stream.width, stream.height, stream.average_rate) == (17, 256, 256, 16)

    assert any(re.fullmatch(r"encoding frames \d+/\d+", text) for text in done.texts_of(IMAGE_ENCODER))
    assert done.texts_of(IMAGE_ENCODER)[-1] == "1 × 17 frames, 256×256"
    texts = done.texts_of(SAMPLER)
    of_expert = {
        name: [i for i, text in enumerate(texts) if re.match(rf"step \d/8 · {name} expert", text)]
        for name in ("high-noise", "low-noise")
    }
    second_load = [i for i, text in enumerate(texts) if text.startswith("loading transformer_2 ")]
    assert of_expert["high-noise"][-1] < second_load[0] < of_expert["low-noise"][0]
    assert re.fullmatch(r"step 8/8 · low-noise expert · [\d.]+ s/step · ETA 0:00", texts[of_expert["low-noise"][-1]])
    assert re.fullmatch(r"8 steps · [\d.]+ s/step · .+", texts[-1])
    assert len(done.previews) == 8
    assert done.texts_of(DECODER)[-1] == "17 frames, 256×256"


def test_picture_and_seed_decide_the_video_and_the_first_frame_is_marked_as_given(server, sampling):
    sampling |= {"11": probe(IMAGE_ENCODER, 0, "i2v_condition"), "12": probe(IMAGE_ENCODER, 1, "i2v_info")}
    first = latents_of(server, sampling, seed=1)
    condition = probed(server, "i2v_condition")
    other_seed = latents_of(server, sampling, seed=2)
    sampling[SAMPLER]["inputs"]["seed"] = 1
    other_picture = latents_of(server, sampling, LOAD, image=server.upload("b.png", picture(1)))
    other_condition = probed(server, "i2v_condition")
    again = latents_of(server, sampling, LOAD, image="a.png")

    assert first.shape == (1, 16, 5, 32, 32)
    assert probed(server, "i2v_info") == {"height": 256, "width": 256, "num_frames": 17}
    assert condition.shape == (1, 20, 5, 32, 32)
    assert condition[:, :4, 0].min() == 1
    assert condition[:, :4, 1:].max() == 0
    assert torch.equal(condition[:, :4], other_condition[:, :4])
    assert not torch.allclose(condition[:, 4:, 0], other_condition[:, 4:, 0], atol=1e-2)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other_seed, atol=1e-2)
    assert not torch.allclose(first, other_picture, atol=1e-3)


def test_an_end_image_is_marked_and_changes_the_video(server, sampling):
    sampling |= {"11": probe(IMAGE_ENCODER, 0, "i2v_condition"), "20": load_image(server.upload("end.png", picture(5)))}
    open_end = latents_of(server, sampling)
    with_end = latents_of(server, sampling, IMAGE_ENCODER, end_image=["20", 0])
    mask = probed(server, "i2v_condition")[0, :4]
    assert mask[:, 0].min() == 1
    assert mask[:, 1:-1].max() == 0
    assert mask[:3, -1].max() == 0
    assert mask[3, -1].min() == 1, "of the last four frames the last one is given"
    assert not torch.allclose(open_end, with_end, atol=1e-3)


def test_guidance_of_the_second_expert_and_shift_decide_too(server, sampling):
    base = latents_of(server, sampling)
    assert torch.equal(
        base, latents_of(server, sampling, guidance_scale_2=sampling[SAMPLER]["inputs"]["guidance_scale"])
    )
    assert not torch.allclose(base, latents_of(server, sampling, guidance_scale_2=1.0), atol=1e-3)
    assert not torch.allclose(base, latents_of(server, sampling, guidance_scale_2=-1.0, shift=2.0), atol=1e-3)


def test_a_portrait_picture_is_fitted_into_a_landscape_video(server, sampling):
    portrait = picture(size=(288, 512))
    band = portrait.crop((0, 128, 288, 384))  # what "crop" keeps of it
    bordered = Image.new("RGB", (288, 256))
    bordered.paste(portrait.resize((144, 256), Image.Resampling.BICUBIC), (72, 0))
    expected = {"crop": band, "pad": bordered}

    prompt = {"20": load_image(server.upload("portrait.png", portrait))}
    for i, (mode, image) in enumerate(expected.items()):
        prompt[f"3{i}"] = load_image(server.upload(f"{mode}.png", image))
        for node_id, source, name in ((f"4{i}", "20", f"i2v_{mode}"), (f"5{i}", f"3{i}", f"i2v_{mode}_expected")):
            encoder = dict(
                sampling[IMAGE_ENCODER]["inputs"], image=[source, 0], resize_mode=mode, height=256, width=288
            )
            prompt[node_id] = {"class_type": "Wan22I2VImageEncoder", "inputs": encoder}
            prompt[f"1{node_id}"] = probe(node_id, 0, name)
    run(server, prompt)
    found = {mode: probed(server, f"i2v_{mode}") for mode in expected}
    assert {tuple(condition.shape) for condition in found.values()} == {(1, 20, 5, 32, 36)}
    for mode, condition in found.items():
        # Pillow rounds to 256 levels where the node does not, so pad agrees to about one of them.
        for other in expected:
            distance = (condition - probed(server, f"i2v_{other}_expected")).abs().mean()
            assert (distance < 0.02) == (mode == other), (mode, other, distance)
    assert torch.equal(found["crop"], probed(server, "i2v_crop_expected"))


def test_an_rgba_picture_is_laid_over_white(server, sampling):
    rgb = picture()
    white_left = rgb.copy()
    white_left.paste((255, 255, 255), (0, 0, 128, 256))
    rgba = rgb.copy()
    rgba.putalpha(Image.new("L", (256, 256), 255))
    rgba.paste((10, 20, 30, 0), (0, 0, 128, 256))
    join = {"image": ["20", 0], "alpha": ["20", 1]}
    prompt = {
        "20": load_image(server.upload("rgba.png", rgba)),
        "21": {"class_type": "JoinImageWithAlpha", "inputs": join},  # Load Image itself gives no alpha channel
        "22": load_image(server.upload("white.png", white_left)),
    }
    for source in ("21", "22"):
        encoder = dict(sampling[IMAGE_ENCODER]["inputs"], image=[source, 0])
        prompt[f"3{source}"] = {"class_type": "Wan22I2VImageEncoder", "inputs": encoder}
        prompt[f"4{source}"] = probe(f"3{source}", 0, f"i2v_{source}")
        prompt[f"5{source}"] = probe(source, 0, f"i2v_image_{source}")
    run(server, prompt)
    assert probed(server, "i2v_image_21").shape == (1, 256, 256, 4)
    assert torch.equal(probed(server, "i2v_21"), probed(server, "i2v_22"))


def test_two_pictures_make_two_videos(server, sampling, i2v_demo):
    sampling["20"] = load_image(server.upload("b.png", picture(1)))
    sampling["21"] = {"class_type": "ImageBatch", "inputs": {"image1": [LOAD, 0], "image2": ["20", 0]}}
    sampling[IMAGE_ENCODER]["inputs"]["image"] = ["21", 0]
    sampling[SAMPLER]["inputs"]["num_inference_steps"] = 2
    sampling |= {
        DECODER: i2v_demo[DECODER],
        "11": probe(DECODER, 0, "i2v_frames"),
        "12": probe(SAMPLER, 1, "i2v_count"),
    }
    done = run(server, sampling)
    frames = probed(server, "i2v_frames")
    assert frames.shape == (34, 256, 256, 3)
    assert not torch.allclose(frames[:17], frames[17:], atol=1e-2)
    assert probed(server, "i2v_count") == 17, "frames of one video"
    assert done.texts_of(IMAGE_ENCODER)[-1] == "2 × 17 frames, 256×256"
    assert done.texts_of(DECODER)[-1] == "34 frames, 256×256"


def test_cancel_during_the_second_expert_stops_and_the_next_prompt_works(server, sampling):
    total = 100
    sampling[SAMPLER]["inputs"].update(num_inference_steps=total, shift=1.0, seed=77)  # 10 steps for the first expert

    def switched(done):
        return any("low-noise expert" in text for text in done.texts_of(SAMPLER))

    done, late = run_and_cancel(server, sampling, SAMPLER, switched)
    check_cancelled(done, late, SAMPLER, total)
    assert steps_done(done, SAMPLER, total) > 10

    sampling[SAMPLER]["inputs"]["num_inference_steps"] = 2
    run(server, sampling)


def test_free_releases_both_experts_and_the_next_prompt_loads_them_again(server, sampling):
    run(server, sampling)
    # The node cache goes too: the same prompt must run again.
    assert server.release(120) > 0
    done = run(server, sampling)
    texts = done.texts_of(SAMPLER)
    for name in ("transformer", "transformer_2"):
        assert any(text.startswith(f"loading {name} ") for text in texts)
    assert any(text.startswith("loading vae ") for text in done.texts_of(IMAGE_ENCODER))
    assert not any(text.startswith("compiling") for text in texts)
