"""`setup.py demo --monitor`, the part run by the environment's Python: ComfyUI with the monitor, until Ctrl-C.

Where there is no TPU, the tests' metrics server plays eight chips at work. It tells no lie about this machine
elsewhere: it answers on a port of its own, and only this ComfyUI is told of it.

python -m bootstrap.monitor_demo --comfyui FOLDER --base FOLDER --port PORT
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .comfyui import link_packs
from .console import Console, SetupError, clean_environment
from .doctor import has_tpu
from .layout import LOOPBACK, REPO
from .server import Server, free_port

PACK = "ComfyUI-TPU-Monitor"
CHIPS = 8


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bootstrap.monitor_demo")
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args(arguments)
    # The servers must not outlive the demo: let `with` run its exits on SIGTERM too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(Console(), options.comfyui, options.base, options.port)
    except SetupError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
    return 0


def run(console: Console, comfyui: Path, base: Path, port: int) -> None:
    link_packs(console, REPO, base / "custom_nodes")
    with ExitStack() as stack:
        environment = {} if has_tpu() else stack.enter_context(played_chips(console))
        server = Server(Path(sys.executable), comfyui, base, base / "server.log", port, environment)
        stack.enter_context(server)
        with console.step(f"start ComfyUI at {server.url} (log: {server.log})"):
            server.wait_until_ready([PACK])
        console.say(
            f"The monitor is in ComfyUI's top bar; click it for the sidebar tab. Ctrl-C here stops it.\n"
            f"From another machine, open a tunnel first: ssh -L {port}:{LOOPBACK}:{port} USER@THIS-MACHINE\n"
            f"{server.url}"
        )
        while True:
            server.check_alive()
            time.sleep(0.5)


@contextmanager
def played_chips(console: Console):
    """A metrics server with chips that are played; gives the environment in which ComfyUI finds it."""
    port = free_port()
    command = [sys.executable, "-m", "tests.monitor.metrics_server", "--port", str(port), "--chips", str(CHIPS)]
    # It lives until its standard input ends, so it cannot outlive this process, however that ends.
    process = subprocess.Popen(
        command, cwd=str(REPO), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean_environment()
    )
    try:
        if not process.stdout.readline():
            raise SetupError(f"the metrics server did not start: {' '.join(command)}")
        console.say(f"No TPU here: the figures of {CHIPS} chips are played by a test server (port {port}).")
        yield {
            "TPU_RUNTIME_METRICS_PORTS": str(port),
            "COMFYUI_TPU_MONITOR_SDK": "tests.monitor.fake_sdk",
            "PYTHONPATH": str(REPO),
        }
    finally:
        process.stdin.close()
        process.wait(10)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
