"""Draws the pictures of ComfyUI's template browser: a square of each example as a real browser shows it.

    python -m tests.browser.thumbnails http://127.0.0.1:8188 [NAME ...]

with a ComfyUI running there that has the packs. NAME.jpg goes beside the workflow in its pack.
"""

from __future__ import annotations

import argparse
import io
import json
import sys

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from bootstrap import examples
from tests.browser.conftest import CHROMIUM_FLAGS, READY, chromium, set_settings

SIDE = 480  # pixels, as drawn; the template browser shows it at about half of that
CLIP = {"x": 150, "y": 110, "width": 960, "height": 960}  # of the page, where only the canvas is
VIEWPORT = {"width": 1500, "height": 1150}
QUALITY = 82

# A square from the first node on the left, the note left out; at least an encoder and a sampler beside each other.
AIM = """(clip) => {
    const nodes = app.graph._nodes.filter((node) => node.type !== "MarkdownNote");
    const left = Math.min(...nodes.map((node) => node.pos[0]));
    const top = Math.min(...nodes.map((node) => node.pos[1] - 30));
    const bottom = Math.max(...nodes.map((node) => node.pos[1] + node.size[1]));
    const side = Math.max(830, bottom - top + 60);
    const scale = (app.canvas.ds.scale = clip.width / side);
    const canvas = app.canvas.canvas.getBoundingClientRect();
    app.canvas.ds.offset = [
        (clip.x - canvas.x) / scale - left + 25,
        (clip.y + clip.height / 2 - canvas.y) / scale - (top + bottom) / 2,
    ];
    app.canvas.setDirty(true, true);
}"""


def draw(page: Page, name: str) -> Image.Image:
    workflow = json.loads(examples.source(name).read_text(encoding="utf-8"))
    page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
    page.wait_for_timeout(500)
    page.evaluate(AIM, CLIP)
    page.wait_for_timeout(1500)
    picture = Image.open(io.BytesIO(page.screenshot(clip=CLIP)))
    return picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.browser.thumbnails", description=__doc__)
    parser.add_argument("url", help="of a running ComfyUI with the packs")
    parser.add_argument("names", nargs="*", default=list(examples.PACKS), help="examples (default: all)")
    options = parser.parse_args(arguments)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport=VIEWPORT)
        page.goto(options.url)
        page.wait_for_function(READY)
        set_settings(page, **{"Comfy.VueNodes.Enabled": True, "Comfy.Minimap.Visible": False})
        for name in options.names:
            draw(page, name).save(examples.thumbnail(name), quality=QUALITY, optimize=True)
            print(examples.thumbnail(name))
        set_settings(page, **{"Comfy.VueNodes.Enabled": False, "Comfy.Minimap.Visible": True})
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
