"""One HTML page of runs, with no server and no network: `python -m draftbench.report RUN_FOLDER... [--out FILE]`.

Sortable tables of the means and of every cell, heat maps, and a player of the dense clip, the method's and their
difference in step. Everything is inside the file, which stays under a limit: clips are taken in turn from every method
at every setting while they fit, then pictures, and the page says how many there are. A cell in several folders counts
once. The page itself is report.html beside this file.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypeAlias

from . import records, summary

Row: TypeAlias = dict[str, Any]
CELL = (
    *("model", "method", "sparsity", "variant", "prompt", "seed", *summary.MEASURES, "device", "status"),
)  # what the page shows of a record


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and say where it is; returns the exit code: 1 if a damaged record or video was left out, 2 for
    what cannot be read or written."""
    parser = argparse.ArgumentParser("python -m draftbench.report", description="One HTML page of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN_FOLDER", type=Path, help="of one run or of a sweep")
    parser.add_argument("--out", type=Path, help="the page; report.html in the first folder if left out")
    parser.add_argument("--limit", type=float, default=20.0, metavar="MB", help="of the page (20)")
    options = parser.parse_args(argv)
    first = options.runs[0]
    out = options.out or (first.parent if first.is_file() else first) / "report.html"
    try:
        if not 0 < options.limit < 1e6:
            raise ValueError(f"--limit must be above 0 and below a million MB, got {options.limit:g}")
        damaged: list[str] = []
        text, shown = page(options.runs, int(options.limit * 1e6), damaged)
        with records.replacing(out) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"draftbench: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 2
    for line in damaged:
        print(f"draftbench: left out: {line}", file=sys.stderr)
    if len(text.encode()) > options.limit * 1e6:
        print(f"draftbench: the page is over --limit {options.limit:g}: its tables alone are", file=sys.stderr)
    print(f"{out}: {len(text.encode()) / 1e6:.1f} MB, {shown}")
    return int(bool(damaged))


def page(runs: Sequence[Path], limit: int, damaged: list[str] | None = None) -> tuple[str, str]:
    """The page of run folders, at most `limit` bytes unless its tables alone are more, and what it shows of the clips.

    A damaged record, or a clip with a video that does not play, is left out and named, in `damaged` too. Raises
    FileNotFoundError for a folder that does not exist, ValueError if there are no records.
    """
    damaged = [] if damaged is None else damaged
    everything = [(path, row) for path in records.files(runs) for row in records.parse(path, damaged)]
    found = [(path, row) for path, row in everything if row["kind"] == "cell"]
    if not found:
        raise ValueError("; ".join([f"there are no records of cells under {', '.join(map(str, runs))}", *damaged]))
    rows = records.distinct(row for _, row in found)
    words = summary.differing([row | {"variant": summary.variant(row)} for row in rows])
    cells = [row | {"sparsity": summary.level(row), "variant": said} for row, said in zip(rows, words, strict=True)]
    media = Media()
    data: Row = {
        "title": ", ".join(run.resolve().name for run in runs),
        "about": [*_about(rows), *(f"Left out: {line}" for line in damaged)],
        "means": _columns(_means(rows)),
        "cells": _columns([{name: cell.get(name) for name in CELL} for cell in cells]),
        "clips": [],
        "pictures": [],
        "media": media.held,
    }
    template = (files(__package__) / "report.html").read_text(encoding="utf-8")
    media.left = limit - len(template.encode()) - len(_json(data).encode()) - 1000
    clips, shown = _in_turn(_clips(found, cells)), []
    for clip in list(clips):
        pair = clip["dense"], clip["method"]
        if not media.fits(*pair, around=400):
            continue
        try:
            _, fps = map(media.fps, pair)
        except ValueError as error:
            damaged.append(str(error))
            data["about"].append(f"Left out: {error}")
            media.left -= len(_json(data["about"][-1]).encode()) + 1
            clips.remove(clip)
            continue
        kept: Row = dict(zip(("dense", "method"), media.take(*pair, around=400), strict=True))
        kept |= {"cell": clip["cell"], "picture": None, "fps": fps}
        data["clips"].append(kept)
        shown.append((kept, clip["picture"]))
    pictures = _pictures(runs, media)
    for path in pictures:
        name = f"{path.parent.name}/{path.stem}"
        if keys := media.take(path, around=len(_json(name).encode()) + 60):
            data["pictures"].append({"name": name, "media": keys[0]})
    for kept, path in shown:
        if path.is_file() and (keys := media.take(path)):
            kept["picture"] = keys[0]
    data["clips"].sort(key=lambda clip: clip["cell"])
    there = len(data["pictures"]) + sum(clip["picture"] is not None for clip in data["clips"])
    known = len(pictures) + sum(clip["picture"].is_file() for clip in clips)
    data["shown"] = f"{len(data['clips'])} of {len(clips)} clips with videos"
    data["shown"] += f", {there} of {known} pictures" if known else ""
    if len(data["clips"]) < len(clips) or there < known:
        data["shown"] += (
            f" (the page is at most {limit / 1e6:g} MB; clips come first, taken in turn from every method at every "
            "setting, in the order of prompts and seeds)"
        )
    return template.replace("__TITLE__", _html(data["title"])).replace("__DATA__", _json(data)), data["shown"]


class Media:
    """Files by the hash of their content, so that a dense clip that many methods share is held once.

    left: bytes that may still be added to the page.
    """

    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self.left = 0
        self._known: dict[Path, str] = {}
        self._rates: dict[str, float] = {}

    def fits(self, *paths: Path, around: int = 0) -> bool:
        """Whether files that are not held yet, as base64, and `around` bytes are no more than is left."""
        return self._cost(self._new(paths), around) <= self.left

    def take(self, *paths: Path, around: int = 0) -> list[str]:
        """Hold files, as base64, and return their keys; none, if they do not fit."""
        if not self.fits(*paths, around=around):
            return []
        new = self._new(paths)
        self.left -= self._cost(new, around)
        self.held |= {key: base64.b64encode(path.read_bytes()).decode() for key, path in new.items()}
        return [self.key(path) for path in paths]

    def fps(self, path: Path) -> float:
        """As `_fps`, of a file's content once."""
        if (key := self.key(path)) not in self._rates:
            self._rates[key] = _fps(path)
        return self._rates[key]

    def _new(self, paths: Sequence[Path]) -> dict[str, Path]:
        return {key: path for path in paths if (key := self.key(path)) not in self.held}

    @staticmethod
    def _cost(new: dict[str, Path], around: int) -> int:
        return sum(4 * path.stat().st_size // 3 + 30 for path in new.values()) + around

    def key(self, path: Path) -> str:
        """The hash of a file's content."""
        if path not in self._known:
            self._known[path] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return self._known[path]


def _clips(found: Iterable[tuple[Path, Row]], cells: Sequence[Row]) -> Iterator[Row]:
    """The clips of cells, from any place where a cell's record lies: not all need have its videos."""
    copies: dict[tuple[Any, ...], list[Path]] = defaultdict(list)
    for path, row in found:
        copies[row["cell_id"], row["timestamp"]].append(path)
    for number, cell in enumerate(cells):
        places = (_clip(number, path, cell) for path in copies[cell["cell_id"], cell["timestamp"]])
        yield from list(filter(None, places))[:1]


def _clip(number: int, path: Path, row: Row) -> Row | None:
    """The files of a cell's clip, or None if it has no videos; a dense cell has nothing to compare."""
    clip = records.number(path)
    dense, method = (path.with_name(f"{clip}_{name}.mp4") for name in ("dense", row["method"]))
    if dense == method or not (dense.is_file() and method.is_file()):
        return None
    return {
        "cell": number, "dense": dense, "method": method, "picture": path.with_name(f"{clip}_side_by_side.png"),
        "group": (row["model"], row["method"], str(row["sparsity"]), row["variant"]),
        "order": (row["prompt"], row["seed"]),
    }  # fmt: skip


def _in_turn(clips: Iterable[Row]) -> list[Row]:
    """The first clip of every model, method and setting, then the second of each, and so on."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for clip in sorted(clips, key=lambda clip: (*clip["group"], *clip["order"])):
        groups[clip["group"]].append(clip)
    return [clip for clip in chain.from_iterable(zip_longest(*groups.values())) if clip]


def _pictures(runs: Sequence[Path], media: Media) -> list[Path]:
    """Every picture of the runs that is not of one clip, heat maps and the like; the same in two folders once."""
    found = ((run, path) for run in runs if run.is_dir() for path in sorted(run.rglob("*.png")))
    own: dict[str, Path] = {}
    for run, path in found:
        if not path.stem.endswith("_side_by_side") and "wandb" not in path.relative_to(run).parts:
            own.setdefault(media.key(path), path)
    return list(own.values())


def _fps(path: Path) -> float:
    """The frames a second of a video that plays to its end; ValueError, naming it, for one that does not."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            for _ in container.decode(stream):
                pass
            return float(stream.average_rate or 1)
    except (av.FFmpegError, IndexError) as error:
        why = getattr(error, "strerror", "there is none in it")
        raise ValueError(f"{path} is no video that plays ({why}); delete it, and its run makes it again") from error


def _about(rows: Sequence[Row]) -> list[str]:
    """Lines: how many cells and of what, and each machine with its versions and commit."""
    failed = sum(row["status"] != "ok" for row in rows)
    what = {name: len({row[name] for row in rows}) for name in ("model", "method", "prompt", "seed")}
    counts = ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for name, n in what.items())
    lines = [f"{len(rows)} cells{f', {failed} of them failed' if failed else ''}: {counts}."]
    for row in rows:
        versions = ", ".join(f"{name} {value}" for name, value in (row["versions"] or {}).items() if value)
        grid = "x".join(map(str, row["grid"] or []))
        commit = f"{str(row['commit'])[:12]}{' with uncommitted changes' if row['dirty'] else ''}"
        lines.append(f"{row['model']}, grid {grid}, on {row['device']}; {versions}; commit {commit}.")
    return list(dict.fromkeys(lines))


def _means(rows: Sequence[Row]) -> list[Row]:
    """`summary.means` with the level and the variant in words."""
    means = summary.means(rows)
    return [
        {name: row[name] for name in row if name not in ("versions", "knob", "missed")}
        | {"sparsity": summary.level(row), "variant": variant}
        for row, variant in zip(means, summary.differing(means), strict=True)
    ]


def _columns(rows: Sequence[Row]) -> Row:
    """Rows as one list of names and a list of values for each, floats to six significant digits.

    A column that says nothing is left out: one without a value, a single device, a status that is always "ok".
    """
    said = {name: {row[name] for row in rows} for name in (rows[0] if rows else ())}
    empty: dict[str, Any] = {"device": {rows[0]["device"]} if rows else set(), "status": {"ok"}}
    names = [name for name, values in said.items() if not values <= {None, ""} and values != empty.get(name)]
    values = [[float(f"{v:.6g}") if isinstance(v := row[name], float) else v for name in names] for row in rows]
    return {"names": names, "rows": values}


def _json(data: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())
