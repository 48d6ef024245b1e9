"""How the stored dumps were made: compile a tiny shape, keep of each bundle what a reader of schedules looks at.

python -m tests.bench.shorten FOLDER [KERNEL]  (tokamax_splash where tokamax is installed)
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from comfyui_tpu.bench.compiling import environment
from comfyui_tpu.bench.kernels import KERNEL_NAMES, Job
from comfyui_tpu.plan.bundles import split
from tests.bench.stored import JOBS

KEPT = re.compile(r"sbr\.rel|scmp\.|= sadd\.s32|vpow2|= vmax\.|inlined_call_operand")
REGIONS = re.compile(r"(?:Start/End empty|Start|End) region \d+")


def shorten(text: str) -> str:
    """The same bundles, most of their instructions left out."""
    return "".join(map(_short, split(text)))


def _short(bundle: str) -> str:
    head, rest = bundle.split("{", 1)
    body, _, comment = rest.rpartition("}")
    kept = [re.sub(r" ?/\*.*?\*/", "", part, flags=re.DOTALL).strip() for part in body.split(";;") if KEPT.search(part)]
    regions = " :: ".join(REGIONS.findall(comment))
    return f"{head}{{ {' ;; '.join(kept)} }}{f' /* {regions} */' if regions else ''}\n"


def store(job: Job, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as dump:
        command = [sys.executable, "-m", "comfyui_tpu.bench.compile_one"]
        subprocess.run(command, input=json.dumps(job.to_json()), env=environment(dump), text=True, check=True)
        name = KERNEL_NAMES[job.kernel]
        for path in Path(dump).glob(f"*-{name}.*-final_hlo-static-per-bundle-utilization.txt"):
            shutil.copy(path, folder / f"1-{name}.1-01-final_hlo-static-per-bundle-utilization.txt")
        for path in Path(dump).glob(f"*-{name}.*[0-9]-final_bundles.txt"):
            short = shorten(path.read_text(encoding="utf-8"))
            (folder / f"1-{name}.1-03-final_bundles.txt").write_text(short, encoding="utf-8")


if __name__ == "__main__":
    for kernel in sys.argv[2:] or JOBS:
        store(JOBS[kernel], Path(sys.argv[1]) / kernel)
