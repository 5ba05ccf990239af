"""A picture of fidelity over time that joins what was measured apart: pocket's clips, and one call at a paper's shape.

Quality is that of records of kind "cell"; time that of records of kind "methods" (bench=methods): the method's plan, of
pocket's q and k tiled to the shape, and the kernel on it. They meet by method and sparsity, and each axis names its
source, since neither says how good a clip of the larger model is.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .bootstrap import Estimate, estimate
from .contrasts import Contrasts, Row, by_prompt, clip
from .estimate_tables import off
from .method_tables import check_same, grouped, incomplete, provenance
from .tabular import canvas, label, named, ok, save

# Where a name may stand, in points of type right of (left, if below 0) and above its point; the first that is free.
PLACES = ((3, -9), (3, 3), (-3, -9), (-3, 3), (3, 12), (3, -18), (-3, 12), (-3, -18))
METRIC, LABEL = "psnr_db", "PSNR dB to dense"


class Point(NamedTuple):
    """A method at a sparsity: ms of one call (20%, 50%, 80%) and the mean over clips with its interval."""

    method: str
    sparsity: float
    ms: tuple[float, float, float]
    quality: Estimate


class Panel(NamedTuple):
    """The points at a shape, ms of its dense attention if that has a time, and the labels of the axes."""

    shape: str
    points: Sequence[Point]
    dense: float | None
    quality: str
    time: str


class Drawing(NamedTuple):
    """All that a picture shows: its panels, and the lines over them."""

    panels: Sequence[Panel]
    about: str


def join(cells: Sequence[Row], times: Sequence[Row], rule: Contrasts) -> dict[str, list[Point]]:
    """The points of each shape of `times`, by method and sparsity; what only one side has is in none, nor is a time of
    a call that did not drop what its sparsity asks for, nor a mean over some of the clips.

    Raises ValueError if rows of either side do not mix, or the cells are of several warm-ups.
    """
    check_same(cells, "quality")
    groups = grouped(cells)
    part = incomplete(groups)
    if len(warmups := {setting.warmup for setting, _ in groups}) > 1:
        raise ValueError(f"quality: a picture has one share of dense first steps, not {sorted(map(str, warmups))}")
    for name in ("device", "versions", "commit"):
        if len({repr(row[name]) for row in times}) > 1:
            raise ValueError(f"time: rows with different {name} share no picture")
    quality: dict[tuple[str, float], Estimate] = {}
    for (setting, method), group in groups.items():
        clips = by_prompt((row["prompt"], row[METRIC]) for row in group if ok(row))
        if clips and method != "dense" and not setting.knob and (setting, method) not in part:
            quality[method, setting.sparsity] = estimate(clips, rule.draws, rule.seed)
    found: dict[str, list[Point]] = {}
    for row in sorted(times, key=lambda row: (row["shape"], row["method"], row["sparsity"])):
        key = row["method"], row["sparsity"]
        if ok(row) and key in quality and not off(row):
            ms = (row["ms"]["p20"], row["ms"]["p50"], row["ms"]["p80"])
            found.setdefault(row["shape"], []).append(Point(*key, ms, quality[key]))
    return found


def drawing(cells: Sequence[Row], times: Sequence[Row], names: tuple[str, str], rule: Contrasts) -> Drawing | None:
    """What a picture shows, a panel a shape, or None if nothing meets; `names` are those of the two files of records.

    Raises ValueError as `join`.
    """
    shapes = join(cells, times, rule)
    panels = []
    for shape, points in shapes.items():
        dense = [row["dense"]["ms"] for row in times if row["shape"] == shape and row["dense"] and row["dense"]["ms"]]
        middle = sorted(dense)[len(dense) // 2] if dense else None
        panels.append(Panel(shape, points, middle, *sources(cells, times, shape, names)))
    return Drawing(panels, about(cells, times, shapes)) if panels else None


def figure(drawing: Drawing, path: Path, digest: str) -> None:
    """Draw a line a method over its sparsities, or, of one sparsity, points with names.

    `digest` goes into the PNG's metadata. Raises ImportError without matplotlib.
    """
    methods = sorted({point.method for panel in drawing.panels for point in panel.points})
    picture = canvas(8 * len(drawing.panels), 5.2)
    from matplotlib.ticker import LogLocator  # it is there, or `canvas` has said what to install

    names: list[dict[Point, str]] = []
    for axes, panel in zip(picture.subplots(1, len(drawing.panels), squeeze=False)[0], drawing.panels, strict=True):
        shape, points, dense, quality, time = panel
        levels = {point.sparsity for point in points}
        level = f" at {levels.pop():.0%} sparsity" if len(levels) == 1 else ""  # then names stand at the points
        for number, method in enumerate(methods):
            own = [point for point in points if point.method == method]
            if own:
                axes.errorbar(**_line(own), label=None if level else method, color=f"C{number % 10}",
                              marker="os^Dvx"[number // 10 % 6], markersize=4, linewidth=1, capsize=2)  # fmt: skip
        if dense:
            axes.axvline(dense, color="k", linestyle="--", linewidth=1, label="dense")
        axes.set(title=shape + level, xscale="log", xlabel=time, ylabel=quality)
        axes.grid(alpha=0.3, which="both")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        if dense or not level:
            axes.legend(fontsize=7)
        names.append({point: point.method if level else f"{point.sparsity:.0%}" for point in points})
    picture.suptitle(drawing.about, fontsize=7)
    picture.draw_without_rendering()  # the axes have their size only now
    for axes, texts in zip(picture.axes, names, strict=True):
        _write(axes, texts)
    save(picture, path, digest)


def _write(axes: Any, names: Mapping[Point, str]) -> None:
    """Write a name at each point, inside and on no other name, point, line of dense's or legend, if there is room."""
    from matplotlib.transforms import Bbox

    spots = [axes.transData.transform((point.ms[1], point.quality.mean)) for point in names]
    taken = [Bbox([spot - 4, spot + 4]) for spot in spots]
    taken += [line.get_window_extent().padded(1) for line in axes.lines if line.get_label() == "dense"]
    taken += [axes.get_legend().get_window_extent()] if axes.get_legend() else []
    for point, name in names.items():
        notes = [
            axes.annotate(name, (point.ms[1], point.quality.mean), place, fontsize=7,
                          ha="right" if place[0] < 0 else "left", textcoords="offset points")
            for place in PLACES
        ]  # fmt: skip
        boxes = [note.get_window_extent() for note in notes]
        hidden = [sum(box.overlaps(other) for other in taken) + (axes.bbox.count_contains(box.corners()) < 4)
                  for box in boxes]  # fmt: skip
        best = notes[hidden.index(min(hidden))]
        taken.append(best.get_window_extent())
        for note in notes:
            if note is not best:
                note.remove()


def about(cells: Sequence[Row], times: Sequence[Row], shapes: Mapping[str, Sequence[Point]]) -> str:
    """The lines over a picture: where its clips are from, what its names mean, and what is not drawn and why."""
    met = {(point.method, point.sparsity) for points in shapes.values() for point in points}
    rows = [row for row in cells if (row["method"], row["sparsity"]) in met and not row["knob"]]
    found = [textwrap.fill(f"Fidelity: {provenance(rows)}".replace("`", ""), 120)]
    if labelled := [named(method) for method in sorted({method for method, _ in met}) if label(method)]:
        found.append(f"{', '.join(labelled)}.")
    found.append("No evidence about clips of the models whose shapes these are.")
    if left := sorted({row["method"] for row in times if ok(row) and off(row)}):
        found.append(f"Not drawn, as their timed calls drop another share: {', '.join(left)}.")
    timed = {(row["method"], row["sparsity"]) for row in times if ok(row)}
    part = [
        f"{method} at {setting.sparsity:.0%} ({some})"
        for (setting, method), some in incomplete(grouped(cells)).items()
        if (method, setting.sparsity) in timed and not setting.knob
    ]
    if part:
        found.append(f"Not drawn, as their means are of some clips only: {', '.join(sorted(part))}.")
    return "\n".join(found)


def sources(cells: Sequence[Row], times: Sequence[Row], shape: str, names: tuple[str, str]) -> tuple[str, str]:
    """The labels of the axes, quality's and time's: what is measured, on what, and in which file of records."""
    grid = "x".join(map(str, cells[0]["grid"]))
    clips = len({clip(row) for row in cells})
    share = (cells[0]["dense"] or {}).get("steps")
    first = f",\nfirst {share:.0%} of steps dense" if share else ""
    return (
        f"{LABEL}: {cells[0]['model']} at {grid},\n{clips} clips ({names[0]}){first}",
        f"ms of one attention call, plan and kernel:\n{shape} on {times[0]['device']} ({names[1]})",
    )


def _line(points: Sequence[Point]) -> Mapping[str, Any]:
    """x, y and their error bars."""
    x, y = [point.ms[1] for point in points], [point.quality.mean for point in points]
    low, high = ([p.quality.mean if end is None else end for p, end in zip(points, ends, strict=True)] for ends in
                 ([p.quality.low for p in points], [p.quality.high for p in points]))  # fmt: skip
    return {
        "x": x, "xerr": [[p.ms[1] - p.ms[0] for p in points], [p.ms[2] - p.ms[1] for p in points]],
        "y": y, "yerr": [[m - end for m, end in zip(y, low, strict=True)],
                         [end - m for m, end in zip(y, high, strict=True)]],
    }  # fmt: skip
