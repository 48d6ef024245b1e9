"""Every example in a real browser: each frontend, old and new rendering of nodes, up to its picture or video."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from bootstrap.examples import DEMOS, PACKS
from bootstrap.workflow import to_api_prompt
from tests.browser import examples, frontends
from tests.browser.conftest import Errors, Site, eventually, load, set_settings
from tests.checkpoints import write

TINY = ("wan21-tiny", "flux2-tiny", "wan22-i2v-tiny", "cogvideox15-tiny")
FLUX_SAMPLER, WAN_SAMPLER = "Flux2TPUSampler", "Wan21TPUSampler"
# Each video takes seconds to decode on a CPU, so that each is made in one frontend with one rendering only:
# (frontend, new rendering) → example: start of the file's name, what it is, its size.
VIDEOS = {
    (frontends.PINNED, False): {"wan21_t2v_demo": ("wan21_t2v_demo", "video", 256, 256)},
    (frontends.PINNED, True): {"cogvideox_t2v_demo": ("cogvideox_t2v_demo", "video", 128, 96)},
    (frontends.NEWEST, False): {"wan22_i2v_demo": ("wan22_i2v_demo", "video", 256, 256)},
    (frontends.NEWEST, True): {
        "combined_picture_to_video_demo": ("combined_picture_to_video_demo", "video", 256, 256),
        "monitor_metadata": ("with_metadata", "picture", 768, 768),
    },
}
renderings = pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes-2.0"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in TINY:
        write(name, folder / name)
    return folder


@pytest.fixture(scope="module")
def kitchen(site: Site, checkpoints: Path, comfyui_checkout: Path) -> Site:
    """The site with what a user has after `setup.py demo`: the tiny checkpoints and the picture ComfyUI ships."""
    models = site.server.base / "models" / "diffusers"
    models.mkdir(parents=True, exist_ok=True)
    for name in TINY:
        (models / name).symlink_to(checkpoints / name)
    inputs = site.server.base / "input"
    inputs.mkdir(exist_ok=True)
    shutil.copy(comfyui_checkout / "input" / "example.png", inputs)
    return site


@pytest.fixture(scope="module")
def errors() -> Errors:
    return Errors()


@pytest.fixture(scope="module")
def page(kitchen, open_page, errors) -> Iterator[Page]:
    page = open_page(errors)
    set_settings(page, **{"Comfy.Workflow.ShowMissingModelsWarning": False})
    yield page
    page.context.close()


@pytest.fixture(autouse=True)
def afresh(page: Page, kitchen: Site, failed):
    """A test that fails leaves the next ones a page without dialogs, and a server with nothing to do."""
    yield
    if failed():
        kitchen.server.post("/queue", {"clear": True})
        kitchen.server.post("/interrupt", {})
        load(page, kitchen)


@pytest.fixture
def own_page(kitchen, open_page) -> Iterator[Page]:
    """A page for one test. It is closed: while it is open the server samples for its monitor, whatever others do."""
    page = open_page()
    yield page
    page.context.close()


@pytest.fixture
def rendered(page: Page, vue: bool) -> Iterator[Page]:
    """The page with the rendering of nodes that the test asks for."""
    set_settings(page, **{"Comfy.VueNodes.Enabled": vue})
    yield page
    set_settings(page, **{"Comfy.VueNodes.Enabled": False})


@pytest.fixture(scope="module")
def object_info(kitchen) -> dict:
    return kitchen.server.get("/object_info")


def test_the_template_browser_lists_every_pack_with_pictures(page, shot):
    examples.open_templates(page)
    for pack in sorted(set(PACKS.values())):
        examples.choose_pack(page, pack)
        names = [name for name, owner in PACKS.items() if owner == pack]
        for name in names:
            expect(examples.in_templates(page, name)).to_be_visible()
        loaded = (
            "() => [...document.querySelectorAll('[role=dialog] img')].filter((i) => i.naturalWidth === 480).length"
        )
        page.wait_for_function(f"(count) => ({loaded})() === count", arg=len(names))
        shot(page, f"templates-{pack}")
    examples.close_dialogs(page)


def test_every_example_is_sent_to_the_server_as_the_demo_sends_it(page, object_info):
    """Loaded and turned into a prompt by the browser, which `setup.py demo` does on its own."""
    for name in PACKS:
        workflow = examples.open_example(page, name)
        sent, expected = page.evaluate(examples.PROMPT), to_api_prompt(workflow, object_info)
        assert {key: (node["class_type"], node["inputs"]) for key, node in sent.items()} == {
            key: (node["class_type"], node["inputs"]) for key, node in expected.items()
        }, name


def test_real_examples_fail_for_nothing_but_the_missing_model(page, kitchen):
    """The server takes their prompts; the first node with a model says where it would come from (here: offline)."""
    for name in (name for name in PACKS if name not in DEMOS):
        examples.open_example(page, name)
        prompt = page.evaluate(examples.PROMPT)
        done = kitchen.server.run(prompt)
        assert done.error is not None, name
        model = prompt[done.error["node_id"]]["inputs"]["model_id"]
        assert model.count("/") == 1
        assert model in done.error["exception_message"], done.why
        assert "HF_HUB_OFFLINE" in done.error["exception_message"], done.why


def apart(page: Page, vue: bool, name: str) -> None:
    """No node covers another, as soon as all have their sizes."""
    eventually(page, lambda: not examples.overlapping(page, vue), f"{name} without {examples.overlapping(page, vue)}")


@renderings
def test_no_node_of_an_example_covers_another(rendered, vue, shot):
    for name in PACKS:
        examples.open_example(rendered, name)
        if vue:
            rendered.wait_for_function(examples.DRAWN)
        rendered.wait_for_timeout(100)
        apart(rendered, vue, name)
        if name.startswith("combined"):
            examples.fit(rendered)
            shot(rendered, f"{name}{'-2.0' if vue else ''}")


@renderings
def test_a_newcomer_opens_the_template_presses_run_and_sees_the_picture(rendered, vue, shot):
    examples.open_from_templates(rendered, "flux2_demo")
    examples.set_widget(rendered, FLUX_SAMPLER, "seed", 100 + vue)  # else it would come from the cache
    examples.fit(rendered)
    examples.press_run(rendered)
    examples.wait_until_shown(rendered, "flux2_demo", "picture", 256, 256)
    rendered.wait_for_timeout(500)
    shot(rendered, f"flux2_demo-ran{'-2.0' if vue else ''}")
    apart(rendered, vue, "flux2_demo")


@renderings
def test_the_demos_show_their_videos_on_the_node(rendered, vue, site, shot):
    for name, saved in VIDEOS[site.frontend, vue].items():
        examples.open_example(rendered, name)
        examples.fit(rendered)
        examples.press_run(rendered)
        examples.wait_until_shown(rendered, *saved)
        rendered.wait_for_timeout(500)
        shot(rendered, f"{name}-ran{'-2.0' if vue else ''}")
        apart(rendered, vue, name)
    assert rendered.locator(".p-toast-message-error").count() == 0


@pytest.fixture
def pinned_frontend(site) -> None:
    if site.frontend != frontends.PINNED:
        pytest.skip("made in one frontend: it takes two videos")


def test_the_comparator_lists_what_was_changed_since_an_earlier_video(pinned_frontend, own_page, shot):
    """As the example's note says: run, choose the video, change the seed, run."""
    name, page = "combined_video_metadata_demo", own_page
    examples.open_example(page, name)
    examples.press_run(page)
    examples.wait_until_shown(page, name, "video", 256, 256)
    page.evaluate("app.refreshComboInNodes()")
    offered = """() => app.graph._nodes.find((node) => node.type === "LoadImageWithMetadataTPU").widgets
        .find((widget) => widget.name === "image").options.values"""
    video = next(file for file in page.evaluate(offered) if file.startswith(f"video/{name}_"))
    examples.set_widget(page, "LoadImageWithMetadataTPU", "image", video)
    examples.set_widget(page, WAN_SAMPLER, "seed", 7)
    examples.press_run(page)
    shown = """(text) => app.graph._nodes.find((node) => node.type === "MetadataComparatorTPU").widgets
        ?.find((widget) => widget.name === "shown_text")?.value?.includes(text)"""
    page.wait_for_function(shown, arg="~ 3.inputs.seed: 2025 → 7\n", timeout=examples.RUN_MS)
    assert page.evaluate(shown, f'~ 9.inputs.image: "example.png" → "{video}"')
    examples.fit(page)
    shot(page, f"{name}-ran")


def test_nothing_of_ours_complained(page, errors):
    """In all of the tests above. What core's scripts miss (favicons, its cloud) is not ours."""
    ours = [text for text in errors.beyond(Errors()) if text.startswith("uncaught") or "TPU" in text]
    assert not ours, "\n".join(ours)
