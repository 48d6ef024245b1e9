"""Four packs, one after the other and back again, on devices that hold one model at a time: nobody unloads by hand."""

import pytest

from tests.reliability.models import BUDGET, CHECKPOINTS, MIB, PACKS, end, flux2, node, wan21, wan22

pytestmark = pytest.mark.server


def run(server, prompt):
    done = server.run(prompt)
    assert done.succeeded, done.why
    return done.outputs["end"]["sha256"]


def test_models_are_switched_freely_within_a_budget_for_one(server, state):
    seen = []
    for name in (*CHECKPOINTS, *reversed(CHECKPOINTS)):
        run(server, PACKS[name](seed=len(seen), prompt="a hare"))
        held = state()
        assert f"text_encoder of {name}" in held["held"] or f"transformer of {name}" in held["held"]
        text_encoders = [label for label in held["held"] if label.startswith("text_encoder")]
        assert len(text_encoders) <= 1, "the text encoders of two models do not fit"
        assert held["live_bytes"] <= BUDGET
        seen.append(sum(held["held"].values()) / MIB)
    print(f"\nfour packs, twice, in {BUDGET // MIB} MiB: held after each {[round(each) for each in seen]} MiB")
    assert "evicting the text_encoder of flux2-tiny to make room" in server.log()


def test_what_came_back_after_eviction_gives_the_same_result(server):
    results = []
    for _ in range(2):
        results.append([run(server, PACKS[name](seed=5, prompt="a heron")) for name in CHECKPOINTS])
        server.post("/free", {"free_memory": True})
    assert results[0] == results[1]


def test_two_experts_and_their_autoencoder_share_the_room(server, state):
    run(server, wan22(seed=1, decode=True))
    assert state()["live_bytes"] <= BUDGET


def test_the_sampler_says_what_is_in_memory_and_the_monitor_too(server):
    done = server.run(flux2(seed=99))
    assert done.succeeded, done.why
    (line,) = [text for text in done.texts_of("2") if text.startswith("2 steps")]
    assert "in memory" in line
    assert f"of {BUDGET / 2**30:.2f} GiB a chip" in line
    sample = server.get("/tpu-monitor/sample")
    assert sample["held"]["transformer of flux2-tiny"] > MIB
    (chip,) = sample["chips"]
    assert chip["hbm_total"] == BUDGET
    assert 0 < chip["hbm_used"] <= BUDGET


def test_what_can_never_fit_is_refused_with_numbers_and_knobs_and_the_next_prompt_works(server, state):
    """A decoder that needs more than the devices have."""
    run(server, flux2(seed=1, prompt="an owl"))
    size = {"width": 1280, "height": 1280, "length": 17, "batch_size": 1}
    latents, decoder = (
        node("EmptyHunyuanLatentVideo", **size),
        node("Wan21TPUVAEDecoder", latents=["1", 0], model_id="wan21-tiny"),
    )
    done = server.run({"1": latents, "2": decoder, "end": end("2")})
    assert done.error is not None
    message = done.error["exception_message"]
    for part in ("vae of wan21-tiny", "to compute with", "a chip has", "num_frames", "height", "more or larger chips"):
        assert part in message
    assert done.error["exception_type"].endswith("OutOfDeviceMemory")
    assert "text_encoder of flux2-tiny" in state()["held"], "nothing is evicted for what cannot fit"
    run(server, wan21(seed=2))
    assert state()["live_bytes"] <= BUDGET


def test_unload_in_the_menu_empties_the_devices(server, state):
    run(server, flux2(seed=7))
    assert state()["live_bytes"] > 0
    server.post("/reliability/unload", {})
    after = state()
    assert after["held"] == {}
    assert after["live_bytes"] < MIB
    run(server, flux2(seed=8))
