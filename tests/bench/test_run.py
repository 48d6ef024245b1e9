"""``bench run``: its clock, its stages of every family, and the command on a tiny checkpoint on the CPU."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import jax
import pytest

from comfyui_tpu.bench import measure, run, stages
from comfyui_tpu.bench.cli import main
from comfyui_tpu.models.common import Task
from comfyui_tpu.plan import catalogue
from comfyui_tpu.plan.rehearsal import rehearse
from comfyui_tpu.runtime.errors import CheckpointError
from tests.checkpoints import write

TASK = Task(height=256, width=256, num_frames=17, num_inference_steps=3, guidance_scale=4.0)
FAMILIES = ("flux2-tiny", "cogvideox15-tiny", "wan21-tiny", "wan22-i2v-tiny")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Name → folder of a tiny checkpoint, written when first asked for."""
    base = tmp_path_factory.mktemp("bench-run")
    return lambda name: write(name, base / name)


class HandClock:
    """Shows what the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


# --- the clock --------------------------------------------------------------------------------------------------------


def test_loading_counts_from_the_report_before_the_first_tensor():
    clock = HandClock()
    watch = measure.Watch(clock)
    for seconds, report in (
        (10.0, watch.check_cancelled),
        (12.0, lambda: watch.progress("loading vae (shard 1 of 2)", 1, 2)),
        (12.5, watch.check_cancelled),
        (15.0, lambda: watch.progress("loading vae (shard 2 of 2)", 2, 2)),
        (20.0, lambda: watch.progress("decoding", 2, 2)),
    ):
        clock.now = seconds
        report()
    assert watch.loaded == {"vae": 5.0}


def test_a_component_that_comes_back_is_counted_again():
    clock = HandClock()
    watch = measure.Watch(clock)
    for start in (1.0, 10.0):
        clock.now = start
        watch.check_cancelled()
        clock.now = start + 2
        watch.progress("loading transformer", 1, 1)
    assert watch.loaded == {"transformer": 4.0}


def test_compiling_counts_from_its_first_report_to_its_last():
    clock = HandClock()
    watch = measure.Watch(clock)
    watch.message("compiling vae (decode, 1×4)")
    clock.now = 7.0
    watch.message("compiled vae (decode, 1×4) in 7.0 s")
    assert watch.compiled == {"vae (decode, 1×4)": 7.0}


def test_the_first_step_is_left_out_of_the_steps_and_not_of_the_stage():
    clock = HandClock()

    def make_stages(model, task, number, on_step):
        def denoise(results):
            for clock.now in (100.0, 101.0, 103.0):
                on_step(None)

        return {"denoise": denoise}

    times = measure.time_run(None, TASK, 0, make_stages, clock)
    assert times.steps == [1.0, 2.0]
    assert times.stages == {"denoise": 103.0}


def test_the_summary_has_median_and_spread_over_all_runs():
    runs = [measure.Times({"denoise": each, "decode": 1.0}, [each / 10, each / 5]) for each in (10.0, 40.0, 20.0)]
    found = measure.summary(runs)
    assert list(found) == [measure.STEP, "denoise", "decode", measure.WHOLE]
    assert found["denoise"] == measure.Spread(20.0, 10.0, 40.0, 3)
    assert found[measure.STEP] == measure.Spread(3.0, 1.0, 8.0, 6)
    assert found[measure.WHOLE].median == 21.0


def test_peak_memory_is_the_fullest_devices_and_none_where_nobody_counts():
    def device(**stats):
        return SimpleNamespace(memory_stats=lambda: stats)

    counted = device(peak_bytes_in_use=5, bytes_limit=9)
    assert measure.peak_memory((device(peak_bytes_in_use=3, bytes_limit=9), counted)) == {"peak": 5, "limit": 9}
    assert measure.peak_memory((counted, device())) is None
    assert measure.peak_memory((SimpleNamespace(memory_stats=lambda: None),)) is None


# --- the stages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stages_run_the_programs_that_the_planner_plans(tiny, name):
    """Nothing is computed: the planner's recorder stands where the devices are."""
    model = stages.open_checkpoint(tiny(name))
    model = type(model)(model.folder, tuple(jax.devices()[:1]))  # not the opened one, which others share
    steps, shapes = [], {}

    def run_stages(task):
        results = {}
        for stage, work in stages.stages(model, task, 0, steps.append).items():
            results[stage] = work(results)
        shapes.update(results)

    planned = [(call.label, call.count) for call in rehearse(model, TASK)]
    ran = rehearse(SimpleNamespace(components=model.components, rehearse=run_stages), TASK)
    assert sorted((call.label, call.count) for call in ran) == sorted(planned)
    assert [info.step for info in steps] == [1, 2, 3]
    frames = 1 if name.startswith("flux2") else TASK.num_frames
    assert tuple(shapes["decode"].shape) == (frames, TASK.height, TASK.width, 3)


def test_the_usual_task_is_the_published_models_own(tmp_path):
    for name, entry in catalogue.CATALOGUE.items():
        folder = catalogue.write(entry.configs, tmp_path / name)
        model = SimpleNamespace(
            folder=folder, transformer=SimpleNamespace(raw_config=entry.configs["transformer/config.json"])
        )
        assert stages.usual_task(model) == entry.task, name


def test_another_pipelines_checkpoint_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(CheckpointError, match="StableDiffusionPipeline; expected one for Flux2Pipeline"):
        stages.open_checkpoint(tmp_path)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def measured(tiny, tmp_path_factory):
    """(the report, what the terminal showed) of two timed runs of the smallest picture."""
    path = tmp_path_factory.mktemp("bench-run-report") / "run.json"
    assert main(["run", str(tiny("flux2-tiny")), "--steps", "3", "--repeats", "2", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_the_warm_up_is_apart_from_the_timed_runs(measured):
    assert set(measured["warm_up"]["loaded"]) == {"text_encoder", "transformer", "vae"}
    assert {program.split()[0] for program in measured["warm_up"]["compiled"]} == {"text_encoder", "transformer", "vae"}
    assert len(measured["timed"]) == 2
    assert all(not times["loaded"] and not times["compiled"] for times in measured["timed"])


def test_every_figure_is_one_that_was_timed(measured):
    stages_ = {
        stage: [times["stages"][stage] for times in measured["timed"]] for stage in measured["timed"][0]["stages"]
    }
    for stage, seconds in stages_.items():
        found = measured["summary"][stage]
        assert (found["shortest"], found["longest"]) == (min(seconds), max(seconds))
        assert 0 < found["shortest"] <= found["median"] <= found["longest"]
        assert found["count"] == 2
    steps = measured["summary"][measure.STEP]
    assert steps["count"] == 2 * (3 - 1)
    assert steps["median"] < measured["summary"]["denoise"]["median"]


def test_the_report_says_what_was_measured_on_what(measured):
    assert measured["model"] == "flux2-tiny"
    assert measured["devices"] == {"count": 8, "kind": "cpu", "platform": "cpu"}
    assert measured["task"] == {
        "height": 256,
        "width": 256,
        "num_frames": 1,
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
    }
    assert measured["peak_memory"] is None  # the CPU backend keeps no count, and none is made up
    assert set(measured["plans"]) == {"text_encoder", "transformer", "vae"}
    assert {"python", "jax", "libtpu", "torch"} <= set(measured["versions"])


def test_the_table_can_be_pasted_and_names_no_path(measured):
    text = run.render(measured)
    assert text.startswith("### flux2-tiny on 8 × CPU (no TPU)\n")
    assert f"| one denoising step | {measured['summary'][measure.STEP]['median']:.3f} |" in text
    assert "* peak HBM a chip: – (this backend keeps no count)" in text
    assert "/tmp" not in text
    assert "again" not in text


def test_the_table_says_when_a_component_had_to_be_loaded_again(measured):
    again = {
        **measured,
        "timed": [{**measured["timed"][0], "loaded": {"vae": 1.0}}],
        "peak_memory": {"peak": 2**30, "limit": 2**31},
    }
    text = run.render(again)
    assert "* loaded or compiled again during the timed runs: vae" in text
    assert "* peak HBM a chip: 1.00 of 2.00 GiB" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "No model folder 'no-such-model'"),
        (["../secret"], "is not accepted"),
        (["no-such-model", "--steps", "1"], "--steps must be at least 2"),
        (["no-such-model", "--repeats", "0"], "--repeats at least 1; got 8 and 0"),
    ],
)
def test_what_cannot_be_measured_is_an_error_that_says_why(capsys, arguments, message):
    assert main(["run", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_size_that_the_model_does_not_make_is_refused(tiny, capsys):
    assert main(["run", str(tiny("flux2-tiny")), "--height", "100"]) == 1
    assert "height must be a multiple of 16" in capsys.readouterr().err


def test_on_a_processor_the_size_is_small_and_can_be_set(tiny):
    model = stages.open_checkpoint(tiny("flux2-tiny"))
    options = SimpleNamespace(height=None, width=512, frames=None, steps=8, guidance=None)
    assert dataclasses.astuple(run._task(options, model, on_cpu=True)) == (256, 512, 1, 8, 4.0)
    assert dataclasses.astuple(run._task(options, model, on_cpu=False)) == (1024, 512, 1, 8, 4.0)
