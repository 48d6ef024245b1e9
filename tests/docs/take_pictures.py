"""Takes the READMEs' pictures: python -m pytest tests/docs/take_pictures.py (not a test, and not run as one).

A real browser, a real server, a real workflow of examples/; the monitor's chips are the tests' played ones.
"""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tests.browser.conftest import browser, open_page, site, sites  # noqa: F401
from tests.comfy.server import REPOSITORY
from tests.monitor.metrics_server import GIB

IMAGES = REPOSITORY / "docs" / "images"
WORKFLOW = "wan21_t2v_14b_720p"
PICTURE_BYTES = 200_000
FIT = """(side) => {
  const canvas = app.canvas;
  const nodes = app.graph._nodes.filter((node) => node.type !== "MarkdownNote");
  const left = Math.min(...nodes.map((n) => n.pos[0])), top = Math.min(...nodes.map((n) => n.pos[1]));
  const right = Math.max(...nodes.map((n) => n.pos[0] + n.size[0]));
  const bottom = Math.max(...nodes.map((n) => n.pos[1] + n.size[1]));
  const box = canvas.canvas.getBoundingClientRect();
  const scale = Math.min((box.width - side) / (right - left + 40), (box.height - 110) / (bottom - top + 60));
  const note = app.graph._nodes.find((node) => node.type === "MarkdownNote");
  if (note) app.graph.remove(note);
  canvas.ds.scale = scale;
  canvas.ds.offset[0] = box.width / scale / 2 - (left + right) / 2 + side / scale / 2;
  canvas.ds.offset[1] = box.height / scale / 2 - (top + bottom) / 2 + 50 / scale;
  canvas.setDirty(true, true);
}"""


# Without the row of tabs and the empty canvas below.
PART = {"x": 0, "y": 38, "width": 1680, "height": 600}


def keep(page, name: str) -> None:
    """A screenshot with at most 256 colours: half the bytes, no visible difference on a canvas of flat colours."""
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / name
    page.screenshot(path=str(path), clip=PART)
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < PICTURE_BYTES


@pytest.mark.parametrize("language", ["en", "zh"])
def test_take(open_page, site, language):  # noqa: F811
    if site.frontend != "1.32.9":
        pytest.skip("the pictures show the frontend that ComfyUI 0.3.75 comes with")
    quiet = {"Comfy.Minimap.Visible": False, "LiteGraph.Canvas.MinFontSizeForLOD": 0, "Comfy.Graph.CanvasInfo": False}
    quiet |= {"Comfy.Graph.CanvasMenu": False, "Comfy.VueNodes.Enabled": False}
    site.server.post("/settings", {"Comfy.Locale": language, **quiet})
    site.set_chips(0)  # the nodes are shown as on a machine without a TPU
    dismissed = "localStorage.setItem('vueNodesBannerDismissed', 'true')"
    page = open_page(before=lambda page: page.add_init_script(dismissed))
    page.set_viewport_size({"width": 1680, "height": 640})
    workflow = json.loads((REPOSITORY / "examples" / f"{WORKFLOW}.json").read_text(encoding="utf-8"))
    page.evaluate("(workflow) => app.loadGraphData(workflow, true, true, null)", workflow)
    page.wait_for_timeout(1500)
    page.evaluate(FIT, 60)
    page.wait_for_timeout(1500)
    keep(page, f"nodes_{language}.png")
    site.set_chips(8, hbm_used=12 * GIB, duty_cycle=97, tensorcore=61)
    page.locator("#tpu-monitor-strip").click()
    page.wait_for_timeout(4000)
    keep(page, f"monitor_{language}.png")
