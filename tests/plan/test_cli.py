"""The command as a user runs it: a process of its own, the real TPU compiler, tiny or cut models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import write

REPOSITORY = Path(__file__).resolve().parents[2]
QUICK = ("--topology", "v6e:2x4", "--only", "transformer")
SMALL = ("--height", "256", "--width", "256", "--steps", "2", "--effort", "quickest")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def plan(cache, *arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "COMFYUI_TPU_CACHE": str(cache)}
    command = [sys.executable, "-m", "comfyui_tpu.plan", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write("flux2-tiny", tmp_path_factory.mktemp("models") / "flux2-tiny")


@pytest.fixture(scope="module")
def first(cache, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    done = plan(cache, folder, *QUICK, *SMALL, "--json", out / "p.json", "--html", out / "p.html")
    return done, out


def test_a_checkpoint_folder_is_planned_and_exits_with_0(first):
    done, _ = first
    assert done.returncode == 0, done.stderr
    assert "FITS" in done.stdout
    assert "one denoising step" in done.stdout


def test_json_and_page_are_written(first):
    _, out = first
    found = json.loads((out / "p.json").read_text())
    assert found["topology"] == "v6e:2x4"
    assert found["seconds_per_step_estimate"] > 0
    assert 0 < found["mfu_estimate"] < 1
    assert found["hbm_bytes_per_chip"] > sum(p["temp_bytes"] for p in found["programs"][:1])
    assert (out / "p.html").read_text().startswith("<!doctype html>")


def test_a_second_run_compiles_nothing_and_says_the_same(first, cache, folder):
    _, out = first
    again = plan(cache, folder, *QUICK, *SMALL, "--json", "-", "--compare", out / "p.json")
    assert again.stderr.count("known from an earlier run") == 1
    assert json.loads(again.stdout) == json.loads((out / "p.json").read_text())


def test_a_model_too_large_exits_with_2_and_says_by_how_much_and_where_it_fits(cache):
    done = plan(cache, "flux.2-dev", "--topology", "v6e:1x1", *SMALL)
    assert done.returncode == 2, done.stderr
    assert "DOES NOT FIT by" in done.stdout
    assert "v6e:2x2" in done.stdout.split("Topologies that fit")[1].splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("wan3",), "wan2.1-t2v-14b"),
        (("flux.2-dev", "--topology", "v9:1x1"), "v6e:2x4"),
        (("flux.2-dev", "--height", "250"), "multiple of 16"),
        (("flux.2-dev", "--compare", "missing.json"), "missing.json"),
    ],
)
def test_a_mistake_exits_with_1_and_says_what_is_right(cache, arguments, said):
    done = plan(cache, *arguments, "--blocks", "1") if arguments[0] == "flux.2-dev" else plan(cache, *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
