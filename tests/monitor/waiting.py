"""Waiting for what a reader will tell, however busy the machine is."""

import time
from collections.abc import Callable
from typing import Any


def read_until(reader: Any, condition: Callable[[Any], object], seconds: float = 60.0) -> Any:
    """What ``reader.read()`` gives as soon as ``condition`` holds for it."""
    deadline = time.monotonic() + seconds
    while not condition(found := reader.read()):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found
