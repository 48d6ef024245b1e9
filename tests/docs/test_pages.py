"""What the READMEs and pages say is true: tables, commands, options, paths, links; both languages say the same."""

from __future__ import annotations

import argparse
import functools
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from bootstrap import cli as setup_cli
from bootstrap import layout
from comfyui_tpu.bench import cli as bench_cli
from comfyui_tpu.bench import run as bench_run
from comfyui_tpu.models.flux2 import MAX_REFERENCE_IMAGES
from comfyui_tpu.plan import catalogue, hardware
from comfyui_tpu.plan import cli as plan_cli
from comfyui_tpu.runtime.errors import PlanError
from tests.checkpoints import WRITERS
from tests.docs import markdown, tables
from tests.docs.schemas import REPOSITORY, schemas

PAGES = [
    "README.md",
    "README_EN.md",
    "CONTRIBUTING.md",
    *(f"docs/{p.name}" for p in (REPOSITORY / "docs").glob("*.md")),
]
PAIRS = [("README.md", "README_EN.md"), *((f"docs/{n}_zh.md", f"docs/{n}.md") for n in ("performance", "monitor"))]
# Names a reader fills in.
PLACEHOLDERS = {"NAME", "ZONE", "REPOSITORY_URL", "MODEL"}
# Options of others' commands, as their documentation has them.
GCLOUD = {"create", "ssh", "delete", "--zone", "--accelerator-type", "--version"}
OTHERS_OPTIONS = {
    "--accelerator-type",
    "--version",
    "--zone",
    "--privileged",
    "--cpu",
    "--base-directory",
    "--local-dir",
}
FOLDERS = ("examples/", "docs/", "custom_nodes/", "comfyui_tpu/", "tests/", "bootstrap/", "requirements/", ".ci/")

every_page = pytest.mark.parametrize("name", PAGES)


def page(name: str) -> markdown.Page:
    return markdown.parse((REPOSITORY / name).read_text(encoding="utf-8"))


# --- both languages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chinese", "english"), PAIRS)
def test_both_languages_have_the_same_structure(chinese, english):
    zh, en = page(chinese), page(english)
    assert [level for level, _ in zh.headings] == [level for level, _ in en.headings]
    assert zh.tables == en.tables
    assert zh.blocks == en.blocks
    assert len(zh.links) == len(en.links)
    assert [target.replace("_zh", "_en") for target in zh.images] == en.images


@pytest.mark.parametrize(("chinese", "english"), PAIRS)
def test_both_languages_name_the_same_things_in_code(chinese, english):
    def named(name: str) -> set[str]:
        return {span for span in page(name).spans if re.fullmatch(r"[\w./*-]*[_/.-][\w./*-]*", span)}

    assert named(chinese) == named(english)


@pytest.mark.parametrize("name", [english for _, english in PAIRS] + ["CONTRIBUTING.md"])
def test_an_english_page_holds_no_chinese(name):
    found = re.findall(r"[一-鿿]+", (REPOSITORY / name).read_text(encoding="utf-8"))
    assert found in ([], ["中文"])


# --- tables and figures -----------------------------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.parametrize("name", tables.PAGES)
def test_the_tables_are_what_schemas_plans_and_figures_give(comfyui_checkout, name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    assert tables.with_tables(text, tables.PAGES[name]) == text, "run: python -m tests.docs.tables"


@pytest.mark.server
def test_the_monitors_nodes_are_counted_right(comfyui_checkout):
    count = len(schemas(comfyui_checkout)["ComfyUI-TPU-Monitor"])
    assert f"Its {count} nodes" in page("README_EN.md").text
    assert f"它的 {count} 个节点" in page("README.md").text


def test_the_smallest_models_weights_are_right():
    sizes = tables.weights("wan2.1-t2v-1.3b", 1)
    whole, encoder = (f"{each / tables.GIB:.1f}" for each in (sum(sizes.values()), sizes["text_encoder"]))
    assert f"has {whole} GiB of weights in all, of which {encoder} are" in page("README_EN.md").text
    assert re.search(rf"全部权重\s+{whole} GiB，其中文本编码器占 {encoder}", page("README.md").text)


@pytest.mark.parametrize("name", ["README.md", "README_EN.md"])
def test_numbers_in_the_text_are_those_of_the_code(name):
    text = page(name).text
    assert f"ComfyUI {layout.COMFYUI_VERSION}" in text
    assert f"http://127.0.0.1:{layout.DEFAULT_PORT}" in text
    assert all("{}.{}".format(*version) in text for version in (layout.PYTHON_MIN, layout.PYTHON_MAX))
    assert re.search(rf"\b{MAX_REFERENCE_IMAGES}\b[^\n]*`reference_images`", text)
    torch = next(d for d in _library()["dependencies"] if d.startswith("torch>"))
    assert all(version in text for version in re.findall(r"[\d.]+", torch))


@pytest.mark.parametrize("name", ["docs/performance.md", "docs/performance_zh.md"])
def test_the_performance_page_names_the_benchmarks_defaults_and_the_hardwares_memory(name):
    text = page(name).text
    assert re.search(rf"`--steps`\D+{bench_run.STEPS}\b\D+`--repeats`\D+{bench_run.REPEATS}\b", text)
    for generation in hardware.GENERATIONS.values():
        assert f"{generation.hbm_bytes / tables.GIB:.2f}" in text, generation.name


def test_the_estimates_are_those_of_the_calibration_page():
    """Figures live in docs/figures.json; the calibration page says what they consist of."""
    text = page("docs/calibration.md").text
    found = tables.figures()
    for row in [*found["steps"], *found["decode"]]:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {row['model']},")]
        assert f"| {row['estimate']:.2f} s |" in line or f"| {row['estimate']:g} s" in line, row["model"]
        assert f"| {row['published']:g} s" in line, row["model"]


def test_every_model_named_is_a_published_one():
    published = {entry.repository for entry in catalogue.CATALOGUE.values()} | {"zai-org/CogVideoX-2b"}
    for name in PAGES:
        spans = {span for span in page(name).spans if re.match(r"^(zai-org|Wan-AI|black-forest-labs)/", span)}
        assert spans <= published


def _library() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# --- links and pictures -----------------------------------------------------------------------------------------------


@every_page
def test_every_link_leads_somewhere(name):
    found = page(name)
    for target in (*found.links, *found.images):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (REPOSITORY / name).parent / path if path else REPOSITORY / name
        assert file.exists(), target
        if anchor:
            assert anchor in markdown.parse(file.read_text(encoding="utf-8")).anchors, target


def test_the_pictures_are_light_and_used():
    used = {Path(target).name for name in PAGES for target in page(name).images}
    pictures = sorted((REPOSITORY / "docs" / "images").iterdir())
    assert {path.name for path in pictures} == used
    for path in pictures:
        assert path.stat().st_size < 200_000
        with Image.open(path) as picture:
            assert picture.width >= 1200


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(name: str) -> Iterator[list[str]]:
    """Every command on a page, in fences and in running text, as words."""
    found = page(name)
    lines = [line for language, lines in found.blocks if language == "bash" for line in lines]
    lines += [span for span in found.spans if re.match(r"(\.venv/bin/)?python3? |pip |git |gcloud ", span)]
    for line in lines:
        for part in re.split(r"\s+&&\s+", line):
            yield shlex.split(part.replace("$(mktemp -d)", "/tmp/x").replace("$PWD", "."))


def check(words: list[str]) -> None:
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *rest = words
    if Path(program).name in ("python", "python3"):
        check_python(rest)
    elif program == "git":
        assert rest == ["pull"] or rest[:2] == ["clone", "REPOSITORY_URL"], words
    elif program == "cd":
        assert rest == ["comfyui-tpu"], words
    elif program == "gcloud":
        assert rest[:3] == ["compute", "tpus", "tpu-vm"], words
        own = rest[3 : rest.index("--")] if "--" in rest else rest[3:]
        check_gcloud(own)
    elif program == "cp":
        assert (REPOSITORY / rest[1].removeprefix("comfyui-tpu/")).is_dir(), words
    elif program in ("pip", "sudo", ".ci/run"):
        pass
    else:
        pytest.fail(f"nothing checks this command: {words}")


def check_gcloud(words: list[str]) -> None:
    assert {word for word in words if word.startswith("--")} | {words[0]} <= GCLOUD
    if words[0] == "create":
        options = dict(zip(words[2::2], words[3::2], strict=True))
        known = {accelerator: version for accelerator, version, _ in tables.MACHINES}
        assert known[options["--accelerator-type"]] == options["--version"]


def check_python(words: list[str]) -> None:
    """By the argument parsers of the commands themselves; they exit at what they do not know."""
    if words[0] == "setup.py":
        if words[1:] != ["--help"]:
            check_example(setup_cli.parse(["NAME" if w in PLACEHOLDERS else w for w in words[1:]]))
        return
    assert words[0] == "-m", words
    module, rest = words[1], words[2:]
    if module == "pip":
        extras = set(re.search(r"\[(.+)\]", rest[-1]).group(1).split(","))
        assert extras <= set(_library()["optional-dependencies"])
    elif module == "comfyui_tpu.plan" and rest:
        given = plan_cli._parser().parse_args(rest)
        assert given.model in {*catalogue.CATALOGUE, *PLACEHOLDERS}
        for name in (given.topology, *(each for each in given.compare if not each.endswith(".json"))):
            hardware.parse(name)
    elif module == "comfyui_tpu.bench":
        if rest[1:]:
            check_bench(bench_cli._parser().parse_args(rest))
        else:
            assert rest[0] in ("attention", "tune", "run")
    elif module == "tests.checkpoints":
        assert rest[0] in {*WRITERS, *PLACEHOLDERS}
    elif module == "pytest":
        for path in (word.split("::")[0] for word in rest if "/" in word):
            assert (REPOSITORY / path).exists(), path
    else:  # named without arguments, or ours and without a parser
        file = REPOSITORY / (module.replace(".", "/") + ".py")
        assert module in ("comfyui_tpu.plan", "ruff", "hatchling") or file.is_file(), words


def check_bench(given: argparse.Namespace) -> None:
    if not hasattr(given, "model") or given.model in PLACEHOLDERS:
        return
    published = {entry.repository for entry in catalogue.CATALOGUE.values()}
    assert given.model in published or Path(given.model).name in WRITERS, given.model


def check_example(settings: layout.Settings) -> None:
    assert settings.example == "NAME" or (REPOSITORY / "examples" / f"{settings.example}.json").is_file()


@every_page
def test_every_command_is_one_that_its_program_takes(name):
    for words in commands(name):
        try:
            check(words)
        except SystemExit:
            pytest.fail(f"refused: {shlex.join(words)}")


@every_page
def test_every_option_in_the_text_exists(name):
    parsers = [plan_cli._parser(), bench_cli._parser()]
    helps = "".join(parser.format_help() for parser in parsers)
    for action in bench_cli._parser()._subparsers._group_actions:
        helps += "".join(sub.format_help() for sub in action.choices.values())
    helps += (REPOSITORY / "bootstrap" / "cli.py").read_text(encoding="utf-8")
    for span in page(name).spans:
        for option in re.findall(r"(?<![\w-])--(?!xla_)[a-z][\w-]*", span):
            assert option in OTHERS_OPTIONS or re.search(rf"{option}(?![\w-])", helps), option


@every_page
def test_every_path_in_the_text_exists(name):
    base = REPOSITORY if not name.startswith("docs/") else REPOSITORY / "docs"
    for span in page(name).spans:
        if not span.startswith(FOLDERS) or set(span.split("/")) & PLACEHOLDERS or re.search(r"[\s<>{]", span):
            continue
        found = list(REPOSITORY.glob(span.rstrip("/"))) or list(base.glob(span.rstrip("/")))
        assert found, span


@functools.cache
def sources() -> str:
    files = (path for room in ("comfyui_tpu", "bootstrap", "tests") for path in (REPOSITORY / room).rglob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in files if path != Path(__file__))


@every_page
def test_every_environment_variable_is_one_that_something_reads(name):
    for span in page(name).spans:
        for variable in re.findall(r"\b(?:COMFYUI_TPU|HF|TPU)_[A-Z_]+\b", span):
            assert variable in sources(), variable


# --- these checks can fail --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        "python3 setup.py demo --exmple flux2_demo",
        "python3 setup.py demo --example no_such_workflow",
        "python3 setup.py start",
        "python3 setup.py demo -- --port 1",
        "python -m comfyui_tpu.plan wan9 --topology v6e:2x4",
        "python -m comfyui_tpu.plan flux.2-dev --toplogy v6e:2x4",
        "python -m comfyui_tpu.bench run some/model --steps 8",
        "python -m comfyui_tpu.bench runs flux2-tiny",
        "python -m pytest tests/no_such_test.py",
        "python -m comfyui_tpu.nothing",
        "python -m pip install './comfyui-tpu[gpu]'",
        "cp -r comfyui-tpu/custom_nodes/ComfyUI-Wan23-TPU ComfyUI/custom_nodes/",
        "gcloud compute tpus tpu-vm create NAME --zone ZONE --accelerator-type v6e-8 --version v2-alpha-tpuv5",
        "gcloud compute tpus tpu-vm create NAME --zones ZONE",
        "make install",
    ],
)
def test_a_wrong_command_is_noticed(wrong):
    with pytest.raises((AssertionError, SystemExit, PlanError, pytest.fail.Exception)):
        check(shlex.split(wrong))


def test_a_changed_default_and_a_missing_row_are_noticed(comfyui_checkout):
    text = (REPOSITORY / "README_EN.md").read_text(encoding="utf-8")
    for before, after in (("`num_frames` 81 [17–121", "`num_frames` 80 [17–121"), ("| `v6e-4` |", "| v6e-4 |")):
        changed = text.replace(before, after)
        assert changed != text
        assert tables.with_tables(changed, "en") == tables.with_tables(text, "en")


def test_headings_become_the_anchors_that_github_gives_them():
    assert markdown.slug("When something is wrong") == "when-something-is-wrong"
    assert markdown.slug("在 TPU VM 上") == "在-tpu-vm-上"
    assert markdown.slug("Wan 2.2 image to video") == "wan-22-image-to-video"
