"""Any value in any input of any of our nodes, on a real server: refused or a clear error of ours, and nothing more."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.comfy.server import Refused
from tests.reliability.fuzzing import anything, fuzz, numbers, words
from tests.reliability.models import node

pytestmark = pytest.mark.server

PRIMITIVES = {"STRING", "INT", "FLOAT", "BOOLEAN", "COMBO"}
SMALL = {"height": 256, "width": 256, "num_frames": 17, "num_inference_steps": 1, "fps": 16, "batch_size": 1}
MODEL_OF = {"Flux2": "flux2-tiny", "CogVideoX": "cogvideox15-tiny", "Wan21": "wan21-tiny", "Wan22I2V": "wan22-i2v-tiny"}
# What would take seconds to run: with a checkpoint that cannot be opened, an input that is right is found out too.
SLOW = {"Wan21TPUPipeline": "wan21-broken", "Wan22I2VImageEncoder": "wan22-broken"}

sizes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 16, 20, 32, 64, 128, 240, 512]), max_size=5)
tensors = st.fixed_dictionaries({"tensor": sizes, "fill": st.sampled_from(["0", "1", "nan", "inf", "-1e30"])}).filter(
    lambda value: _elements(value["tensor"]) <= 2**22
)
linked = st.one_of(
    tensors,
    anything,
    st.fixed_dictionaries({"samples": st.one_of(tensors, anything)}),
    st.lists(st.tuples(tensors, st.dictionaries(words, anything, max_size=2)).map(list), max_size=2),
    st.fixed_dictionaries(dict.fromkeys(("height", "width", "num_frames"), numbers)),
)
hostile = st.one_of(numbers, words, anything)


def _elements(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= max(size, 1)
    return count


@pytest.fixture(scope="module")
def ours(server) -> dict[str, dict]:
    """Node id → its inputs: name → (type, options)."""
    found = {}
    for name, info in server.get("/object_info").items():
        if info["python_module"].startswith("custom_nodes.ComfyUI-"):
            found[name] = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    assert len(found) > 30
    return found


@pytest.fixture(scope="module")
def broken(checkpoints):
    """Checkpoints whose autoencoder is cut off."""
    for name in SLOW.values():
        good = checkpoints / f"{'wan22-i2v' if '22' in name else 'wan21'}-tiny"
        shutil.copytree(good, checkpoints / name)
        (file,) = (checkpoints / name / "vae").glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-1])


def usual(name: str, key: str, kind, options: dict):
    """A value that the node accepts."""
    if key == "model_id":
        family = next(family for family in MODEL_OF if name.startswith(family))
        return SLOW.get(name, MODEL_OF[family])
    if key in SMALL:
        return SMALL[key]
    if isinstance(kind, list):
        return options.get("default", kind[0] if kind else "")
    return options.get("default", {"STRING": "", "INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(kind, ""))


@st.composite
def prompts(draw, nodes: dict[str, dict]) -> dict:
    """One node of ours; some of its inputs hold anything, directly or through links."""
    name = draw(st.sampled_from(sorted(nodes)))
    prompt = {"1": node(name), "end": node("PreviewAny", source=["1", 0])}
    inputs = prompt["1"]["inputs"]
    changed = draw(st.sets(st.sampled_from(sorted(nodes[name])), max_size=3)) if nodes[name] else set()
    for key, (kind, *rest) in nodes[name].items():
        is_widget = isinstance(kind, list) or kind in PRIMITIVES
        if is_widget and key not in changed:
            inputs[key] = usual(name, key, kind, rest[0] if rest else {})
        elif is_widget and draw(st.booleans()):
            inputs[key] = draw(hostile)
        else:
            text = json.dumps(draw(st.one_of(linked, hostile)))
            prompt[f"value {key}"] = node("ReliabilityValue", text=text)
            inputs[key] = [f"value {key}", 0]
    return prompt


def files(server) -> set[str]:
    """All files of ComfyUI's base folder but those that it may write."""
    may = ("output", "temp", "user", "server.log", "models")
    found = {path.relative_to(server.base) for path in server.base.rglob("*") if path.is_file()}
    return {str(path) for path in found if path.parts[0] not in may}


def is_clear(error: dict) -> bool:
    """One of our errors, or one that our code raises on purpose."""
    last = error["traceback"][-1] if error["traceback"] else ""
    ours = "/comfyui_tpu/" in last or "/custom_nodes/ComfyUI-" in last
    return error["exception_type"].startswith("comfyui_tpu.") or (ours and "raise " in last)


@pytest.mark.timeout(900)
def test_no_value_of_any_input_breaks_anything(server, ours, broken, state):
    before, counts = files(server), {"refused": 0, "failed": 0, "ran": 0}
    pid, unclear = state()["pid"], {}

    @fuzz(250)
    @given(prompt=prompts(ours))
    def property(prompt):
        try:
            done = server.run(prompt)
        except Refused:
            counts["refused"] += 1
            return
        if done.succeeded:
            counts["ran"] += 1
            return
        counts["failed"] += 1
        if not is_clear(done.error):
            shown = f"{done.error['exception_type']}: {done.error['exception_message'].strip()}"
            # Collected: shrinking would take a prompt for each attempt, and show one of them.
            unclear.setdefault((prompt["1"]["class_type"], shown), (prompt, "".join(done.error["traceback"][-3:])))

    property()
    print(f"\nfuzzed node inputs: {counts}")
    assert not unclear, "\n".join(f"{key}\n  {prompt}\n{where}" for key, (prompt, where) in unclear.items())
    assert min(counts.values()) > 0, "the examples do not reach what they should"
    assert files(server) == before
    assert not list(server.base.rglob("*.tmp"))
    assert state()["pid"] == pid
    assert server.is_alive()
