"""What machine, which versions and which commit made a record.

The commit comes from git in a checkout of this project; elsewhere from a stamp, written into the wheel by setup.py or
by `python -m draftbench.environment stamp` before the tree is copied. Sources edited after their stamp count as dirty.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PACKAGE = Path(__file__).resolve().parent
STAMP = _PACKAGE / "_stamp.json"
SOURCES = (".py", ".yaml")  # of these what runs is made
UNKNOWN: dict[str, Any] = {"commit": "unknown", "dirty": True}


def describe(device: torch.device) -> dict[str, Any]:
    """{"device": the GPU's or CPU's name, "versions": {package: version or None}, "commit": hash, "dirty": bool}.

    Warns if nothing tells the commit, before hours of work whose records then count as uncommitted.
    """
    import torch

    made = commit()
    if made["commit"] == UNKNOWN["commit"]:
        warnings.warn(
            "neither git nor a stamp tells the commit of this code, so records count as uncommitted; "
            "`python -m draftbench.environment stamp` writes a stamp, in a checkout before it is copied",
            stacklevel=2,
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton") or _version("pytorch-triton"),
        "flash_attn_4": _version("flash-attn-4"),
        "diffusers": _version("diffusers"),
        "draftbench": _version("draftbench") or _project().get("version"),
    }
    return {"device": name, "versions": versions, **made}


def memory() -> int:
    """Bytes of this machine's main memory, taken or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resolve_device(name: str) -> torch.device:
    """The device that `name` ("auto", "cpu" or "cuda") stands for; ValueError for another name or a missing GPU."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda needs a CUDA GPU, and torch sees none")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def drop_working_folder() -> None:
    """Forget the working folder, which `python -m` puts first on sys.path (and `python -P -m` does not).

    From the repo root our folder `kernels` would shadow the Hugging Face package that transformers looks for.
    """
    if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """Have a GPU for oneself among the runs of draftbench on this machine, so that none is timed beside another.

    A CPU is not held. Says so on stderr if it has to wait; a run that is killed lets go.
    """
    import torch

    if device.type != "cuda":
        yield
        return
    from filelock import FileLock, Timeout

    uuid = torch.cuda.get_device_properties(device).uuid
    lock = FileLock(Path(tempfile.gettempdir()) / f"draftbench-{uuid}.lock", mode=0o666)  # for other users too
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("draftbench: waiting for the GPU, which another run holds", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def commit() -> dict[str, Any]:
    """{"commit": full git hash or "unknown", "dirty": whether tracked files, or stamped sources, differ from it}."""
    return _from_git() or _from_stamp() or dict(UNKNOWN)


def stamp(path: Path = STAMP) -> None:
    """Write the commit, dirty and a digest of the sources to `path`, replacing a file (or hard link) in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({**commit(), "sources": _digest()}) + "\n")
    temporary.replace(path)


def _from_git() -> dict[str, Any] | None:
    root = _PACKAGE.parent
    found = (_git("rev-parse", "--show-toplevel", "HEAD") or "").split("\n")
    if not _project() or len(found) < 2 or Path(found[0]).resolve() != root:
        return None
    changed = _git("status", "--porcelain", "--untracked-files=no") != ""
    ours = ("draftbench", "methods", "kernels", "conf")  # where a new file takes part in what is run
    new = (_git("ls-files", "--others", "--exclude-standard", "--", *ours) or "").splitlines()
    return {"commit": found[1], "dirty": changed or any(name.endswith(SOURCES) for name in new)}


def _git(*arguments: str) -> str | None:
    """What git prints about this tree, or None if it is absent or fails; takes no lock, heeds no hook's variables."""
    variables = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    command = ["git", "--no-optional-locks", "-C", str(_PACKAGE.parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, env=variables)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _from_stamp() -> dict[str, Any] | None:
    try:
        found = json.loads(STAMP.read_text())
        edited = found.get("sources", _digest()) != _digest()
        return {"commit": str(found["commit"]), "dirty": bool(found["dirty"]) or edited}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _digest() -> str:
    """SHA-256 of our Python files and configs, calibrations among them, the same in a checkout and installed."""
    tops = {_PACKAGE: _PACKAGE}
    tops |= {
        _PACKAGE.parent / x: _PACKAGE.parent for x in ("methods", "kernels", "conf") if not (_PACKAGE / x).is_dir()
    }
    files = {
        path.relative_to(root).as_posix(): path
        for top, root in tops.items()
        for path in top.rglob("*")
        if path.suffix in SOURCES
    }
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{hashlib.sha256(files[name].read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _project() -> dict[str, Any]:
    """The [project] table of the checkout that we lie in; empty when installed."""
    try:
        project = tomllib.loads((_PACKAGE.parent / "pyproject.toml").read_text())["project"]
        return dict(project) if project["name"] == "draftbench" else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown CPU"


if __name__ == "__main__":
    if sys.argv[1:] != ["stamp"]:
        raise SystemExit("usage: python -m draftbench.environment stamp")
    stamp()
    print(f"{STAMP}: {STAMP.read_text().strip()}")
