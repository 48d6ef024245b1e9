"""Real servers with all packs, one for each frontend, and a real browser. For any test that needs a page.

``site``: a running server, parametrised over the frontends. ``page``: its page, loaded once and shared by the tests
of a frontend. ``open_page``: another page of it. ``shot``: keeps a screenshot in .artifacts/browser for a person.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser import frontends
from tests.comfy.server import REPOSITORY, ComfyServer
from tests.monitor.metrics_server import GIB, FakeChip, MetricsServer

ARTIFACTS = REPOSITORY / ".artifacts" / "browser"
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WINDOW = {"width": 1400, "height": 850}
LOAD_MS = 60_000
# How long a test waits for what it expects. Much more than it takes: no test may depend on the machine being quick.
PATIENCE_MS = 30_000
# Complaints that are core's own but come only once a browser, or depend on when the page is left.
CORES_OWN = ("favicon.ico", "api.comfy.org", "api/userdata")
READY = "() => window.app?.graph && window.app.extensionManager"


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest.fixture
def failed(request) -> Callable[[], bool]:
    """Whether the test has failed, for fixtures that then put a shared page in order more thoroughly."""
    return lambda: request.node.stash.get(FAILED, False)


@dataclass
class Site:
    """A server with a frontend, and the fake chips that its monitor sees."""

    frontend: str
    server: ComfyServer
    metrics: MetricsServer

    def set_chips(self, count: int, hbm_used: int = 0, duty_cycle: float = 0.0, tensorcore: float = 0.0) -> None:
        self.metrics.chips[:] = [FakeChip(hbm_used, 32 * GIB, duty_cycle, tensorcore) for _ in range(count)]

    def hold(self, held: bool) -> None:
        """Whether steps that are being taken stop half-way, until they are let go on."""
        self.server.post("/probe/hold", {"held": held})

    def set(self, **settings: object) -> None:
        """Settings as another page of the same user would leave them; ``__`` stands for the dot in their ids."""
        self.server.post("/settings", {name.replace("__", "."): value for name, value in settings.items()})


@dataclass
class Errors:
    """What a page complains about in its console: in a line without numbers → in full."""

    texts: dict[str, str] = field(default_factory=dict)

    def watch(self, page: Page) -> None:
        page.on("console", lambda message: message.type == "error" and self._add(message))
        page.on("pageerror", lambda error: self._keep(f"uncaught {error}\n{error.stack}"))

    def _add(self, message) -> None:
        first, _, rest = message.text.partition("\n")
        self._keep(f"{first} ({message.location.get('url', '')})\n{rest}")

    def _keep(self, text: str) -> None:
        self.texts.setdefault(_without_numbers(text), text)

    def beyond(self, baseline: Errors) -> list[str]:
        """What is not in `baseline` and not core's own."""
        new = [full for short, full in self.texts.items() if short not in baseline.texts]
        return [full for full in new if not any(own in full.split("\n")[0] for own in CORES_OWN)]


def _without_numbers(text: str) -> str:
    """The same complaint reads the same on another port, at another line."""
    return re.sub(r"\d+", "0", text.split("\n")[0])


def chromium() -> str:
    """The browser's path. Without one the tests are skipped, or fail where one is required (.ci/run)."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("COMFYUI_TPU_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found:
        return found
    message = "No Chromium on this machine. Get one: sudo apt-get install chromium (or name it in COMFYUI_TPU_CHROMIUM)"
    if os.environ.get("COMFYUI_TPU_REQUIRE_BROWSER"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        expect.set_options(timeout=PATIENCE_MS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def sites(browser, comfyui_checkout, tmp_path_factory) -> Iterator[dict[str, Site]]:
    """Started side by side: each takes seconds to import torch."""
    with ExitStack() as stack:

        def start(version: str) -> Site:
            metrics = stack.enter_context(MetricsServer([]))
            server = _server(comfyui_checkout, tmp_path_factory.mktemp("browser"), version, metrics)
            return Site(version, stack.enter_context(server), metrics)

        with ThreadPoolExecutor(len(frontends.VERSIONS)) as pool:
            yield {site.frontend: site for site in pool.map(start, frontends.VERSIONS)}


def _server(checkout: Path, base: Path, version: str, metrics: MetricsServer) -> ComfyServer:
    packs = base / "custom_nodes"
    packs.mkdir()
    for pack in (REPOSITORY / "custom_nodes").glob("ComfyUI-*"):
        (packs / pack.name).symlink_to(pack)
    (packs / "probe").symlink_to(Path(__file__).parent / "probe")
    user = base / "user" / "default"
    user.mkdir(parents=True)
    # Else a dialog with templates covers the page on the first start.
    (user / "comfy.settings.json").write_text(json.dumps({"Comfy.TutorialCompleted": True}))
    environment = {
        "TPU_RUNTIME_METRICS_PORTS": str(metrics.port),
        "COMFYUI_TPU_MONITOR_SDK": "tests.monitor.fake_sdk",
        "COMFYUI_TPU_MONITOR_METRICS": "1",
    }
    return ComfyServer(checkout, base, frontends.arguments(version), environment)


@pytest.fixture(scope="package", params=frontends.VERSIONS)
def site(request, sites) -> Site:
    return sites[request.param]


@pytest.fixture(scope="package")
def open_page(browser, site) -> Iterator[Callable[..., Page]]:
    """``open_page(errors=None, before=None, **context options)`` → a loaded page in a browser context of its own."""
    contexts = []

    def open_(errors: Errors | None = None, before: Callable[[Page], None] = lambda page: None, **options) -> Page:
        contexts.append(browser.new_context(viewport=WINDOW, **options))
        page = contexts[-1].new_page()
        if errors is not None:
            errors.watch(page)
        before(page)
        load(page, site)
        return page

    yield open_
    for context in contexts:
        context.close()


def load(page: Page, site: Site) -> None:
    page.goto(site.server.url)
    page.wait_for_function(READY, timeout=LOAD_MS)


def eventually(page: Page, condition: Callable[[], object], what: str) -> None:
    """Wait until ``condition()`` holds, as ``expect`` does for what it knows."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not condition():
        assert time.monotonic() < deadline, f"expected, but it did not come to that: {what}"
        page.wait_for_timeout(100)


def settle(page: Page, milliseconds: float) -> None:
    """Until nothing more is fetched, and a while longer for what is not fetched."""
    page.wait_for_load_state("networkidle", timeout=LOAD_MS)
    page.wait_for_timeout(milliseconds)


def set_settings(page: Page, **settings: object) -> None:
    """As the settings dialog does it."""
    script = (
        "async (all) => { for (const [id, v] of Object.entries(all)) await app.extensionManager.setting.set(id, v) }"
    )
    page.evaluate(script, settings)


def queue_steps(page: Page, seconds: float) -> None:
    """Run a node of twenty steps. It stops half-way while ``Site.hold`` says so."""
    script = """async (seconds) => {
        app.graph.clear();
        const node = LiteGraph.createNode("ProbeSteps");
        node.title = "Twenty steps";
        node.widgets.find((widget) => widget.name === "seconds").value = seconds;
        app.graph.add(node);
        await app.queuePrompt(0);
    }"""
    page.evaluate(script, seconds)


@pytest.fixture(scope="package")
def errors(site) -> Errors:
    """Of the shared page of a frontend."""
    return Errors()


@pytest.fixture(scope="package")
def page(open_page, errors, site) -> Page:
    site.set_chips(8, hbm_used=16 * GIB, duty_cycle=40, tensorcore=30)
    return open_page(errors)


@pytest.fixture(scope="package")
def baseline(open_page) -> Errors:
    """What the same server's page complains about without our scripts, used as the tests use it."""
    errors = Errors()

    def without_ours(route):
        answer = route.fetch()
        route.fulfill(response=answer, json=[path for path in answer.json() if "TPU" not in path])

    page = open_page(errors, before=lambda page: page.route("**/extensions", without_ours))
    settle(page, 500)
    assert page.locator("#tpu-monitor-strip").count() == 0
    for name, values in (("Comfy.UseNewMenu", ("Disabled", "Top")), ("Comfy.ColorPalette", ("light", "dark"))):
        for each in values:
            set_settings(page, **{name: each})
            settle(page, 200)
    queue_steps(page, seconds=0.2)
    settle(page, 1000)
    page.reload()
    page.wait_for_function(READY, timeout=LOAD_MS)
    settle(page, 500)
    page.evaluate("app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    settle(page, 500)
    page.context.close()
    return errors


@pytest.fixture
def shot(site) -> Callable[[Page, str], None]:
    folder = ARTIFACTS / site.frontend
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=str(folder / f"{name}.png"))
