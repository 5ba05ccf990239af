"""What the benchmarks have in common: a run's rows, written as they come, and the names that a key may list."""

from __future__ import annotations

import functools
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from . import records
from .environment import describe
from .peers import PACKAGES


class Contest:
    """One run: its settings, and its rows so far."""

    def __init__(self, config: DictConfig, path: Path):
        self.config, self.path = config, path
        self.rows: list[dict[str, Any]] = []
        self.requested: dict[str, Any] = {}
        self.run_id = records.cell_id({"at": time.time_ns(), "path": str(path.resolve())})
        self.environment = functools.cache(environment)

    def write(self, row: dict[str, Any]) -> None:
        """Keep a row, on disk when this returns."""
        self.rows.append(row)
        records.append(row, self.path)


def environment(device: str) -> dict[str, Any]:
    """As `draftbench.environment.describe`, with the versions of the peers' packages too."""
    found = describe(torch.device(device))
    found["versions"] |= {name.replace("-", "_"): _version(name) for name in PACKAGES}
    return found


def names(key: str, given: Sequence[str], known: Sequence[str], everything: Sequence[str]) -> list[str]:
    """The names that a key lists, `everything` for "all"; ValueError for one that is not known."""
    for name in given:
        if name not in (*known, "all"):
            raise ValueError(f"{key} must be one of all, {', '.join(known)}, got {name!r}")
    return list(everything if "all" in given else given)


def away(known: Mapping[str, Any]) -> list[str]:
    """Those of the cases, each with a `device`, that need a GPU where there is none."""
    return [] if torch.cuda.is_available() else [name for name, case in known.items() if case.device == "cuda"]


def runnable(key: str, given: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """As `names`, of cases; "all" are those that this machine can run.

    ValueError for an unknown one, one that is asked for by name and cannot run here, or if none can.
    """
    here = [name for name in known if name not in ("tiny", *away(known))]
    chosen = names(key, given, list(known), here)
    if lacking := [name for name in chosen or known if name in away(known)]:
        needs = "needs" if len(lacking) == 1 else "need"
        rest = f"; here: {', '.join(here)}" if here else ""
        raise ValueError(f"{key}: {', '.join(lacking)} {needs} a CUDA GPU, and torch sees none{rest}")
    return chosen


def first_line(error: BaseException) -> str:
    """Kind and first line of an error, for a row that failed."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
