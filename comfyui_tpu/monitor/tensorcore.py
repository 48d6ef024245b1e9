"""TensorCore utilisation, which only libtpu's own SDK tells: asked in a process of its own, never in ComfyUI's.

The SDK loads libtpu and may block for minutes. It is started only once another process is known to hold the TPU (its
metrics service answers), so it can take no chip from anybody, and it ends with the process that started it.

``python -m comfyui_tpu.monitor.tensorcore MODULE``: a JSON answer for each line on the standard input.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from comfyui_tpu.monitor.sample import Reason

SDK = "libtpu.sdk"
# For tests and the demo: another module with the SDK's interface.
SDK_VARIABLE = "COMFYUI_TPU_MONITOR_SDK"
METRIC = "tensorcore_util"

# A figure is as old as the previous call: a second for a page, a minute for some Prometheus.
FRESH_SECONDS = 90.0
LATE_SECONDS = 5.0
# The SDK was seen to take over a minute to learn that there is no TPU; with one it answers at once.
SILENT_SECONDS = 20.0
AGAIN_SECONDS = 300.0


class TensorCores:
    """Utilisation of each core in percent, as of the previous call: ``read`` never waits."""

    def __init__(self, sdk: str | None = None) -> None:
        self._sdk = sdk or os.environ.get(SDK_VARIABLE) or SDK
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()
        self._forget()
        self._not_before = float("-inf")

    @property
    def replaced(self) -> bool:
        """Whether a stand-in for libtpu's SDK is used, which needs no chip."""
        return self._sdk != SDK

    def read(self) -> tuple[Sequence[float], Reason | None]:
        """(percents, None), or nothing and why. Asks for the next figures."""
        now = time.monotonic()
        if self._process is None:
            if now < self._not_before:
                return (), self._reason
            self._start()
        with self._lock:
            self._ask(now)
            late = self._waiting and now - self._asked > LATE_SECONDS
            if not late and now - self._answered < FRESH_SECONDS:
                return self._percents, self._reason
        if self._process.poll() is not None or now - self._asked > SILENT_SECONDS:
            self._give_up(now)
        return (), self._reason or Reason("late", "libtpu's SDK answers too late.")

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    def _forget(self) -> None:
        self._percents: Sequence[float] = ()
        self._reason: Reason | None = Reason("starting", "Waiting for the first answer of libtpu's SDK.")
        self._asked, self._answered = float("inf"), float("-inf")
        self._waiting = False

    def _start(self) -> None:
        self._forget()
        # -P: the working folder is ComfyUI's, whose modules are none of this process's business.
        command = [sys.executable, "-P", "-m", "comfyui_tpu.monitor.tensorcore", self._sdk]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, bufsize=1, **pipes)
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()

    def _ask(self, now: float) -> None:
        if self._waiting:
            return
        with contextlib.suppress(OSError):
            self._process.stdin.write("\n")
            self._waiting, self._asked = True, now

    def _listen(self, process: subprocess.Popen) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in process.stdout:
                answer = json.loads(line)
                with self._lock:
                    self._waiting, self._answered = False, time.monotonic()
                    self._percents = answer.get("percents", ())
                    error = answer.get("error")
                    self._reason = Reason("sdk", f"libtpu's SDK says: {error}") if error else None

    def _give_up(self, now: float) -> None:
        self.close()
        self._forget()
        self._reason = Reason("sdk", "libtpu's SDK does not answer.")
        self._not_before = now + AGAIN_SECONDS


def answer(sdk: str) -> dict:
    """What the SDK says now: ``{"percents": [...]}`` or ``{"error": why}``."""
    try:
        module = importlib.import_module(sdk)
        monitoring = getattr(module, "tpumonitoring", None) or module.monitoring
        return {"percents": [float(value) for value in monitoring.get_metric(METRIC).data()]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def main(sdk: str) -> None:
    for _ in sys.stdin:
        print(json.dumps(answer(sdk)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
