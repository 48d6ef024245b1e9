"""What a user does with an example in the browser: open it, look at it, press Run, see what comes out."""

from __future__ import annotations

import json

from playwright.sync_api import Locator, Page, expect

from bootstrap import examples

RUN_MS = 240_000
# A Pinia store of the frontend, for what its buttons would do.
STORE = """(name) => document.getElementById("vue-app").__vue_app__.config.globalProperties.$pinia._s.get(name)"""
# The names by which the frontends draw a node's frame in the DOM with the new rendering ("Nodes 2.0").
DRAWN = """() => app.graph._nodes.every((node) => {
    const box = document.querySelector(`[data-node-id="${node.id}"]`);
    return box && box.offsetHeight > 40 && box.textContent.includes(node.title);
})"""
# Left, top, right, bottom of each node in the graph's own units, its title bar included.
BOXES = """(vue) => Object.fromEntries(app.graph._nodes.map((node) => {
    const [x, y] = node.pos, top = y - LiteGraph.NODE_TITLE_HEIGHT;
    const box = vue && document.querySelector(`[data-node-id="${node.id}"]`);
    const [right, bottom] = box ? [x + box.offsetWidth, top + box.offsetHeight] : [x + node.size[0], y + node.size[1]];
    return [`${node.id} ${node.type}`, [x, top, right, bottom]];
}))"""
# Pictures and videos that nodes show, from files whose names begin so: [kind, width, height] of each.
SHOWN = """(prefix) => {
    const ours = (src) => (src ?? "").includes(`filename=${prefix}_`);
    const onCanvas = app.graph._nodes.flatMap((node) => node.imgs ?? []);
    const inPage = [...document.querySelectorAll("[data-node-id] img")].filter((each) => each.checkVisibility());
    const pictures = [...onCanvas, ...inPage].map((i) => [i.src, "picture", i.naturalWidth, i.naturalHeight]);
    const seen = [...document.querySelectorAll("video")].filter((each) => each.checkVisibility());
    const videos = seen.map((each) => [each.currentSrc, "video", each.videoWidth, each.videoHeight]);
    return [...pictures, ...videos].filter(([src, , width]) => ours(src) && width).map(([, ...found]) => found);
}"""
PROMPT = "() => app.graphToPrompt().then((found) => found.output)"


def workflow(name: str) -> dict:
    return json.loads(examples.source(name).read_text(encoding="utf-8"))


def open_example(page: Page, name: str) -> dict:
    """As dropping the file on the page does; the workflow."""
    loaded = workflow(name)
    page.evaluate("([workflow, name]) => app.loadGraphData(workflow, true, true, name)", [loaded, name])
    page.wait_for_function("(count) => app.graph._nodes.length === count", arg=len(loaded["nodes"]))
    return loaded


def open_from_templates(page: Page, name: str) -> None:
    """Through ComfyUI's template browser."""
    open_templates(page)
    choose_pack(page, examples.PACKS[name])
    in_templates(page, name).click()
    page.wait_for_function("(count) => app.graph._nodes.length === count", arg=len(workflow(name)["nodes"]))
    expect(page.get_by_role("dialog")).to_have_count(0)


def open_templates(page: Page) -> None:
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")


def choose_pack(page: Page, pack: str) -> None:
    """On the left side of the template browser, below "Extensions"."""
    in_templates(page, pack).click()


def in_templates(page: Page, text: str) -> Locator:
    return page.get_by_role("dialog").get_by_text(text, exact=True).first


def close_dialogs(page: Page) -> None:
    page.evaluate(f"({STORE})('dialog').dialogStack.slice().forEach((each) => ({STORE})('dialog').closeDialog(each))")
    expect(page.get_by_role("dialog")).to_have_count(0)


def fit(page: Page) -> None:
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(700)


def overlapping(page: Page, vue: bool) -> list[tuple[str, str]]:
    boxes = list(page.evaluate(BOXES, vue).items())
    pairs = [(one, other) for i, one in enumerate(boxes) for other in boxes[:i]]
    return [(one[0], other[0]) for one, other in pairs if _overlap(one[1], other[1])]


def _overlap(a: list[float], b: list[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def set_widget(page: Page, node_type: str, widget: str, value: object) -> None:
    script = """([type, name, value]) => {
        const widget = app.graph._nodes.find((node) => node.type === type).widgets.find((each) => each.name === name);
        widget.value = value;
        widget.callback?.(value);
    }"""
    page.evaluate(script, [node_type, widget, value])


def press_run(page: Page) -> None:
    """Presses Run, with the pointer first on the empty canvas.

    A pointer that rests where a workflow's tab comes to lie opens that tab's preview, which hangs over the button for
    as long as the pointer stays on it: also when the pointer came to press the button.
    """
    box = page.locator("canvas#graph-canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 20)
    expect(page.locator(".workflow-popover-fade")).to_have_count(0)
    button = page.get_by_test_id("queue-button")
    (button.locator("button").first if button.locator("button").count() else button).click()


def wait_until_shown(page: Page, prefix: str, kind: str, width: int, height: int) -> None:
    """Until a node shows a picture or a video of this size from a file whose name begins so."""
    found = f"([prefix, wanted]) => ({SHOWN})(prefix).some((each) => String(each) === String(wanted))"
    page.wait_for_function(found, arg=[prefix, [kind, width, height]], timeout=RUN_MS)
