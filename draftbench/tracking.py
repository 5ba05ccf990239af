"""Weights & Biases: rows, videos and pictures of a run, and the table of a sweep; no other file imports wandb.

W&B may fail; results may not. What goes wrong at the start is an error before any work is done; after that, a warning.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast, get_args

from .records import flat
from .summary import MEASURES, level, means

Mode = Literal["offline", "online", "disabled"]
MODES: tuple[Mode, ...] = get_args(Mode)


class Tracker:
    """One W&B run, kept in folder/wandb; `disabled` does nothing and does not import wandb.

    config: plain values to show with the run. Raises ValueError for a mode that is not in MODES; entering raises
    RuntimeError, one line, if W&B cannot start (not installed, no login, no network).
    """

    def __init__(
        self, mode: str, project: str, folder: Path | str, group: str | None, name: str, config: Mapping[str, Any]
    ):
        if mode not in MODES:
            raise ValueError(f"tracking.mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.mode, self.project, self.folder, self.group, self.name = mode, project, Path(folder), group, name
        self.config = dict(config)
        self._run: Any = None

    def __enter__(self) -> Self:
        if self.mode != "disabled":
            with _starting(self.mode):
                self._run = self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run is not None:
            with self._forgiving("finish"):
                self._run.finish(exit_code=int(kind is not None))
            self._run = None

    def log_rows(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Log the records as one table and their means as the summary (prefixed where there are several groups)."""
        if self._run is None or not records:
            return
        import wandb

        rows = [flat(record) for record in records]
        columns: list[str | int] = list(dict.fromkeys(name for row in rows for name in row))
        groups = means(records)
        with self._forgiving("log the rows"), _staging(self.folder / "wandb" / "staging"):
            cells = [[row.get(str(name)) for name in columns] for row in rows]
            self._run.log({"cells": wandb.Table(columns=columns, data=cells, allow_mixed_types=True)})
            for group in groups:
                prefix = f"{group['model']}/{group['method']}@{level(group)}/" if len(groups) > 1 else ""
                values = {prefix + name: group[name] for name in ("n", *MEASURES) if group[name] is not None}
                self._run.summary.update(values)

    def log_files(self, videos: Mapping[str, Path], pictures: Mapping[str, Path]) -> None:
        """Log MP4s and PNGs by name; they are copied into the run."""
        if self._run is None:
            return
        import wandb

        with self._forgiving("log the videos and pictures"):
            media: dict[str, Any] = {name: wandb.Video(str(path), format="mp4") for name, path in videos.items()}
            media |= {name: wandb.Image(str(path)) for name, path in pictures.items()}
            self._run.log(media)

    def _start(self) -> Any:
        wandb = _ready(self.mode)
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            console="off", silent=True, x_disable_stats=True, reinit="create_new", init_timeout=30, finish_timeout=600
        )
        return wandb.init(
            project=self.project, dir=str(self.folder), group=self.group, name=self.name, config=self.config,
            mode=cast(Mode, self.mode), settings=settings,
        )  # fmt: skip

    @contextmanager
    def _forgiving(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            warnings.warn(f"W&B could not {what}: {error}; the results are in {self.folder}", stacklevel=3)


def check(mode: str) -> None:
    """Raise RuntimeError, one line, if tracking=online has no login, or one that the server does not take."""
    if mode == "online":
        with _starting(mode):
            _ready(mode)


def _ready(mode: str) -> Any:
    """wandb, logged in if it is to be online."""
    try:
        import wandb
    except ImportError:
        raise RuntimeError("it needs `pip install wandb`, or tracking=disabled") from None
    if mode == "online" and not wandb.login(prompt=False):
        raise RuntimeError("not logged in; run `wandb login`, or set WANDB_API_KEY, or use tracking=offline")
    return wandb


@contextmanager
def _starting(mode: str) -> Iterator[None]:
    """What goes wrong inside as one line that names the mode."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RuntimeError(f"W&B cannot start with tracking.mode={mode}: {reason}") from error


def log_sweep(
    records: Sequence[Mapping[str, Any]], project: str, folder: Path | str, group: str | None, mode: str
) -> None:
    """Log the whole table of a sweep as one more run of its group; if W&B cannot start, that is a warning."""
    tracker = Tracker(mode, project, folder, group, "sweep", {})
    try:
        with tracker:
            tracker.log_rows(records)
    except RuntimeError as error:
        warnings.warn(f"{error}; the results are in {folder}", stacklevel=2)


@contextmanager
def _staging(folder: Path) -> Iterator[None]:
    """Let W&B stage a table's file in the run's folder and not in the home folder; it has no setting for this."""
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = before or str(folder.resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]
