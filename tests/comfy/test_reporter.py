"""What the user reads on a node, how often, and that Cancel is seen everywhere."""

import pytest
import torch

from comfyui_tpu.comfy.reporter import NodeReporter
from comfyui_tpu.models.common import StepInfo


class Cancelled(Exception):
    pass


class Node:
    """A node in a browser and the clock on the wall."""

    def __init__(self, preview=lambda latents: None):
        self.now = 0.0
        self.texts, self.bars = [], []
        self.cancel = False
        self.reporter = NodeReporter(
            show_text=self.texts.append,
            update_bar=lambda value, total, preview: self.bars.append((value, total, preview)),
            raise_if_cancelled=self.raise_if_cancelled,
            preview=preview,
            clock=lambda: self.now,
        )

    def raise_if_cancelled(self):
        if self.cancel:
            raise Cancelled

    def step(self, step, total, seconds, expert=""):
        self.now += seconds
        self.reporter.step(StepInfo(step, total, torch.zeros(1), expert))


def test_steps_show_speed_and_eta_without_the_compilation_in_the_first_step():
    node = Node()
    node.step(1, 50, seconds=300)
    for step in range(2, 8):
        node.step(step, 50, seconds=4.6)
    assert node.texts[0] == "step 1/50"
    assert node.texts[-1] == "step 7/50 · 4.6 s/step · ETA 3:18"
    assert node.bars[-1] == (7, 50, None)


def test_the_second_expert_is_named_at_once_and_its_loading_does_not_count_as_speed():
    node = Node()
    for step, seconds in enumerate([300, 4, 4, 200, 3, 3], start=1):
        node.step(step, 8, seconds, "high-noise expert" if step < 4 else "low-noise expert")
    assert node.texts[0] == "step 1/8 · high-noise expert"
    assert node.texts[3] == "step 4/8 · low-noise expert · 4 s/step · ETA 0:16"
    assert node.texts[-1] == "step 6/8 · low-noise expert · 3 s/step · ETA 0:06"


def test_hours_are_shown_as_hours():
    node = Node()
    node.step(1, 100, seconds=1)
    node.step(2, 100, seconds=60)
    assert node.texts[-1] == "step 2/100 · 60 s/step · ETA 1:38:00"


def test_the_last_line_keeps_speed_and_plan():
    node = Node()
    for step in range(1, 4):
        node.step(step, 3, seconds=0.5)
    node.reporter.sampled(3, "fsdp over 8 TPU v6e chips")
    assert node.texts[-1] == "3 steps · 0.5 s/step · fsdp over 8 TPU v6e chips"


def test_one_step_has_no_speed():
    node = Node()
    node.step(1, 1, seconds=9)
    node.reporter.sampled(1, "1 CPU")
    assert node.texts == ["step 1/1", "1 steps · 1 CPU"]


def test_fast_loading_is_shown_a_few_times_a_second_and_always_at_the_ends():
    node = Node()
    for done in range(1, 1001):
        node.now += 0.001
        node.reporter.progress("loading transformer", done, 1000)
    assert node.texts[0] == "loading transformer 1/1000"
    assert node.texts[-1] == "loading transformer 1000/1000"
    assert 8 <= len(node.texts) <= 13
    assert node.bars[-1] == (1000, 1000, None)


def test_a_new_stage_is_shown_at_once():
    node = Node()
    node.reporter.progress("loading text_encoder", 1, 9)
    node.reporter.progress("loading transformer", 1, 9)
    node.reporter.message("compiling transformer")
    assert node.texts == ["loading text_encoder 1/9", "loading transformer 1/9", "compiling transformer"]


def test_fast_steps_move_the_bar_each_time_but_not_the_text():
    node = Node()
    for step in range(1, 101):
        node.step(step, 100, seconds=0.01)
    assert len(node.bars) == 100
    assert len(node.texts) < 15
    assert node.texts[-1].startswith("step 100/100 ")


def test_the_preview_goes_with_the_bar():
    node = Node(preview=lambda latents: ("JPEG", latents.shape, 512))
    node.step(1, 2, seconds=1)
    assert node.bars == [(1, 2, ("JPEG", torch.Size([1]), 512))]


@pytest.mark.parametrize(
    "call",
    [
        lambda node: node.reporter.check_cancelled(),
        lambda node: node.reporter.message("compiling"),
        lambda node: node.reporter.progress("loading", 5, 9),
        lambda node: node.step(2, 9, seconds=0),
    ],
)
def test_every_report_notices_cancel_even_when_nothing_is_due_to_be_shown(call):
    node = Node()
    node.reporter.progress("loading", 4, 9)
    node.cancel = True
    with pytest.raises(Cancelled):
        call(node)
    assert len(node.texts) == 1
