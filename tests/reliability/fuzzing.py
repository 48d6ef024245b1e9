"""How long to look for trouble, and values that cause it.

The examples are the same in every run, so that a red test is red for everybody; ``COMFYUI_TPU_FUZZ=20`` tries twenty
times as many, new ones each time.
"""

from __future__ import annotations

import json
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EFFORT = int(os.environ.get("COMFYUI_TPU_FUZZ", "1"))


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples * EFFORT,
        derandomize=EFFORT == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


numbers = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([2**15, 2**20, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**30, -1]),
    st.sampled_from([0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan")]),
)
words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "../..", "/etc/passwd", "C:\\x", "\0", "a" * 5000, "None", "__import__('os')", "%s%n", "🦊"]),
)
plain = st.one_of(st.none(), st.booleans(), numbers, words)


def _nested(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=3))


anything = st.recursive(plain, _nested, max_leaves=8)


@st.composite
def damaged(draw, original: dict) -> dict:
    """A JSON object with one to three changes: values replaced, taken away or added, at any depth."""
    found = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(_places(found)))
        holder, key = place
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if action == "remove" and not isinstance(holder, list):
            holder.pop(key, None)
        elif action == "add" and isinstance(holder, dict):
            holder[draw(words)] = draw(anything)
        else:
            holder[key] = draw(anything)
        if not found:
            break
    return found


def _places(value: dict | list) -> list[tuple]:
    found = []
    for key in range(len(value)) if isinstance(value, list) else list(value):
        found.append((value, key))
        if isinstance(value[key], dict | list) and value[key]:
            found += _places(value[key])
    return found
