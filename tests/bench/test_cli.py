"""The command: what it prints, writes and refuses; compilations are the stored ones but for the last test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from comfyui_tpu.bench import attention as report_of
from comfyui_tpu.bench.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPE = ["--seq", "500", "--kv-seq", "700", "--heads", "2", "--head-dim", "128"]
STORED = [*SHAPE, "--blocks", "256,256,128,128", "--splash-blocks", "128,128,128"]
ROW = {
    "kernel",
    "block_q",
    "block_kv",
    "cycles_per_tile",
    "cycles_total",
    "pct_of_peak",
    "limiting_unit",
    "compile_seconds",
}


def attention(*arguments: str) -> int:
    return main(["attention", *STORED, *arguments])


@pytest.fixture
def report(stored, tmp_path):
    assert attention("--json", str(tmp_path / "out.json")) == 0
    return json.loads((tmp_path / "out.json").read_text())


def test_the_json_has_a_row_for_each_kernel(report):
    assert [row["kernel"] for row in report["rows"]] == ["ours", "jax_splash"]
    assert all(set(row) >= ROW for row in report["rows"])


def test_the_json_says_what_the_figures_belong_to(report):
    assert report["topology"] == "v6e:1x1"
    assert report["shape"] == {"heads": 2, "queries": 500, "keys": 700, "head_dim": 128}
    assert report["rows"][0]["blocks"]["columns"] == 128
    assert all(report["versions"].values())
    assert "nothing was measured on a TPU" in report["basis"]


def test_percentages_are_of_useful_work(report):
    """Padding to 512 × 768 is not work; v6e does 524,288 flop a cycle, at head_dim 128 at most two thirds of it."""
    ours = report["rows"][0]
    share = 4 * 2 * 500 * 700 * 128 / (7575 * 524_288)
    assert ours["pct_of_peak"] == round(100 * share, 2)
    assert ours["pct_of_head_dim_bound"] == round(100 * share * 1.5, 2)


def test_ratios_are_upstream_over_ours(report):
    assert report["ratio_to_jax_splash"] == round(25135 / 7575, 3)
    assert report["ratio_per_tile"] == pytest.approx((513 / 128**2) / (463 / 256**2), abs=1e-3)
    assert report["ratio_with_surroundings"] == round((25135 + 471) / (7575 + 471), 3)


def test_the_table_says_that_it_is_an_estimate(stored, capsys):
    attention()
    printed = capsys.readouterr().out
    assert "Compiler estimate from static schedules: nothing was measured on a TPU." in printed
    assert "ours        256 × 256    463              7,575" in printed
    assert f"whole kernel: {round(25135 / 7575, 3)} × JAX splash" in printed
    assert "XLA's operations around the kernel come on top, 6.2 % of it" in printed  # 471 of 7,575


def test_without_tokamax_a_line_says_how_to_get_it(stored, capsys):
    attention()
    assert "tokamax is not installed, and so not compared: pip install tokamax" in capsys.readouterr().out
    attention("--json", "-")
    report = json.loads(capsys.readouterr().out)
    assert report["ratio_to_tokamax"] is None
    assert "tokamax" not in report["versions"]


def test_tokamax_is_a_peer_where_it_is_installed(stored, monkeypatch, capsys):
    monkeypatch.setattr(report_of, "has_tokamax", lambda: True)
    attention()
    printed = capsys.readouterr().out
    assert f"whole kernel: {round(19733 / 7575, 3)} × tokamax's splash" in printed
    assert "not installed" not in printed
    attention("--json", "-")
    report = json.loads(capsys.readouterr().out)
    assert [row["kernel"] for row in report["rows"]] == ["ours", "jax_splash", "tokamax_splash"]
    assert report["ratio_to_tokamax"] == round(19733 / 7575, 3)


def test_json_to_the_terminal_replaces_the_table(stored, capsys):
    attention("--json", "-")
    assert json.loads(capsys.readouterr().out)["ratio_to_jax_splash"] > 1


def test_the_fall_back_can_be_counted(stored, capsys):
    attention("--online", "--json", "-")
    report = json.loads(capsys.readouterr().out)
    assert (report["softmax"], report["rows"][0]["cycles_total"]) == ("online", 12531)


def test_a_peer_that_does_not_fit_is_named_and_left_out(stored, capsys):
    assert attention("--splash-blocks", "512,128,128", "128,128,128") == 0
    assert "'queries': 512" in capsys.readouterr().out


def test_without_a_peer_there_is_no_ratio(stored, capsys):
    assert attention("--splash-blocks", "512,128,128", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["ratio_to_jax_splash"] is None


def test_our_kernel_not_fitting_is_a_failure(stored, capsys):
    assert attention("--blocks", "512,256,128,128") == 1
    assert "does not fit: RESOURCE_EXHAUSTED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:2x4"], "--topology must be a generation"),
        (["--topology", "v6e:2x2x2"], "v6e slices have 2 axes"),
        (["--head-dim", "300"], "head_dim up to 256; got 384"),
    ],
)
def test_what_cannot_be_compiled_is_said_in_a_line(arguments, message, capsys):
    assert main(["attention", *SHAPE, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq", "0"], "expected a whole number from 1, got '0'"),
        (["--seq", "many"], "expected a whole number from 1, got 'many'"),
        (["--heads", "-1"], "expected a whole number from 1, got '-1'"),
        (["--blocks", "256,256"], "expected 4 to 7 numbers with commas between them, got '256,256'"),
        (["--blocks", "256,200,128,128"], "multiples of 128"),
        (["--splash-blocks", "1,2,3,4"], "expected 3 to 3 numbers"),
    ],
)
def test_malformed_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["attention", *SHAPE, *arguments])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_tune_with_nothing_that_fits_is_a_failure(stored, capsys):
    assert main(["tune", "--seq", "500", "--head-dim", "64", "--candidates", "512,256,128,128"]) == 1
    printed = capsys.readouterr().out
    assert "(nothing fits)" in printed
    assert "does not fit: RESOURCE_EXHAUSTED" in printed


def test_a_real_compilation_from_the_command_line(tmp_path):
    """A small shape through the real compiler; both kernels, in processes of their own."""
    command = [sys.executable, "-m", "comfyui_tpu.bench", "attention", "--json", str(tmp_path / "out.json")]
    shape = ["--topology", "v6e:1x1", "--seq", "1536", "--heads", "2", "--head-dim", "64"]
    tiles = ["--blocks", "512,512,256,256", "--splash-blocks", "512,512,512"]
    done = subprocess.run(
        [*command, *shape, *tiles], capture_output=True, text=True, timeout=300, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    ours, peer = report["rows"][:2]
    # JAX: 2 heads × 3 blocks of queries × 3 tiles; ours takes both heads at once, and the matrix unit at least 1.25
    # cycles for 1024 logits.
    assert (ours["tiles"], peer["tiles"]) == (9, 18)
    assert 1.25 * 512 < ours["cycles_per_tile"] < 4 * 1.25 * 512
    assert ours["cycles_total"] > 9 * ours["cycles_per_tile"]
    assert ours["compile_seconds"] > 0
    assert report["ratio_to_jax_splash"] > 0.5
