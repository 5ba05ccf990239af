"""A job's folder: where the record and the videos of each cell lie, and what finished cells bring along from elsewhere.

A cell's files begin with its number, and so ends the name of its record; a single record is `record.json`. What was
finished before is linked or copied to this folder, so that it holds all that the run wants.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from . import records

Record: TypeAlias = dict[str, Any]
Known: TypeAlias = dict[int, tuple[Record, Path]]  # by number, a finished cell's record and its file


class Folder:
    """path: the folder; total: cells of the job; shown: what a cell has beside its record, each after its number.

    `baseline` is the dense timing that brought records divide by, if there is one.
    """

    def __init__(self, path: Path, total: int, shown: Sequence[str], index: records.Index):
        self.path, self.total, self.shown, self.index = path, total, shown, index
        self.baseline: Record | None = None

    def numbers(self, cells: Sequence[tuple[str, int]]) -> list[int]:
        """The number of each cell, of a prompt and a seed, from 0, without those of finished cells of other clips."""
        taken = set()
        for path in self.path.glob("record*.json"):
            with suppress(OSError, ValueError):
                record = records.read(path)
                if record.get("status") == "ok" and (record.get("prompt"), record.get("seed")) not in cells:
                    taken.add(int(records.number(path)))
        return list(itertools.islice((number for number in itertools.count() if number not in taken), len(cells)))

    def record(self, number: int) -> Path:
        """Where a cell's record goes."""
        return self.path / ("record.json" if (number, self.total) == (0, 1) else f"record_{number:03}.json")

    def write(self, row: Record, number: int) -> None:
        """Write a cell's record; of the two names of the first there is one in a folder, for both own its videos.

        One that failed does not replace the same cell's that is finished, which is told.
        """
        if row["status"] != "ok":
            with suppress(OSError, ValueError):
                there = records.read(self.record(number))
                if there["status"] == "ok" and there["cell_id"] == row["cell_id"]:
                    print(f"draftbench: {self.record(number)} stays as it was finished before", file=sys.stderr)
                    return
        if number == 0:
            (self.path / ("record_000.json" if self.total == 1 else "record.json")).unlink(missing_ok=True)
        records.write(row, self.record(number))

    def finished(self, row: Record, number: int) -> None:
        """Have later runs find a cell, all of which is there."""
        keep("a cell will be run again", partial(self.index.add, row, self.record(number)))

    def bring(self, known: Known) -> Known:
        """Have records, videos, pictures and dense timing of finished cells here; returns those that lack no file."""
        files: dict[int, dict[Path, str]] = {}
        for number, (_, made) in known.items():
            beside = {made.with_name(f"{records.number(made)}_{name}"): f"{number:03}_{name}" for name in self.shown}
            if all(file.is_file() for file in beside):
                files[number] = beside
        brought: Known = {}
        with tempfile.TemporaryDirectory(prefix=".moved", dir=self.path) as aside:
            for number, beside in files.items():
                made = known[number][1]
                if made.parent == self.path.resolve() and made.name != self.record(number).name:
                    for file, name in list(beside.items()):  # out of the way of what comes to its place
                        _link(file, Path(aside) / name)
                        beside[Path(aside) / name] = beside.pop(file)
            for number, beside in files.items():
                done, made = known[number]
                try:
                    for file, name in beside.items():
                        _link(file, self.path / name)
                except FileNotFoundError:  # it went meanwhile
                    continue
                self.write(done, number)
                self._bring_baseline(done, made)
                if made.parent == self.path.resolve():  # it may have another number now
                    self.finished(done, number)
                brought[number] = known[number]
        return brought

    def _bring_baseline(self, done: Record, made: Path) -> None:
        """Have the dense timing that a finished record divides by, if it lies beside it and none is here."""
        timed, here = made.with_name("baseline.json"), self.path / "baseline.json"
        rows = records.read_all([timed], damaged=[]) if timed.is_file() else []
        same = next((row for row in rows if row["baseline_id"] == done["baseline_id"]), None)
        if same and (not here.exists() or here.samefile(timed)):
            _link(timed, here)
            self.baseline = same

    def bring_diagnostics(self, made: Path, wanted: Mapping[str, Any]) -> bool:
        """Have the diagnostics that hold `wanted` here, from the folder `made` if need be; False if a file is gone."""
        for folder in (self.path, made):
            try:
                note = json.loads((folder / "diagnostics.json").read_text(encoding="utf-8"))
                same = all(note[name] == value for name, value in wanted.items())
                names = [*note["pictures"], "diagnostics.json"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if same and all((folder / name).is_file() for name in names):
                for name in names:
                    _link(folder / name, self.path / name)
                return True
        return False


def keep(otherwise: str, write: Callable[[], None]) -> None:
    """Write to the cache; what fails there costs time later and no result, so it is told and not raised."""
    try:
        write()
    except OSError as error:
        print(f"draftbench: {otherwise}: {error.strerror or error}", file=sys.stderr)


def _link(file: Path, target: Path) -> None:
    """Link a finished file to `target`, or copy it where that cannot be; it is only ever replaced, never written to."""
    if target.exists() and target.samefile(file):
        return
    with records.replacing(target) as temporary:
        try:
            os.link(file, temporary)
        except OSError:
            shutil.copyfile(file, temporary)
