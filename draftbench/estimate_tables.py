"""Table and picture of records of kind "methods": what methods' estimates cost, for the benchmark's own folder."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from .attention_tables import number, spread
from .records import missed
from .tabular import Page, Table, canvas, check_alike, made_by, named, ok, save

Row = dict[str, Any]
SAME = ("device", "versions", "commit", "source", "budget_s")


def page(rows: Sequence[Row], source: str) -> Page:
    """The tables of one file of records; ValueError, naming the field, for rows that cannot share one."""
    for name in SAME:
        check_alike((row[name] for row in rows), name, source)
    check_alike(((row["requested"] or {}).get("executor", "auto") for row in rows), "executor", source)
    first = rows[0]
    about = (
        f"The estimate of each method at one attention call on {first['device']}; "
        f"{made_by(rows, itemgetter('method'))}.",
        f"q and k of pocket (`{first['source']['prompt']}`, seed {first['source']['seed']}), tiled to the shape. ms: "
        "median [20%, 80%] of timings in turn with dense attention; estimate: the method's plan alone, in the middle "
        "of a clip; first: its first plan in a clip, once, compilation included; kernel: the executor on that plan; "
        "share: estimate over kernel; whole: all of it. Times over dense: the dense kernel of the same rounds over the "
        "whole. GiB: peak of the whole beside its inputs, where a dense call has its output alone. A knob was "
        "set so that this call meets the sparsity. re_ttention's call lies between two full steps, which its sparsity "
        "counts, so the call itself drops more; efficient_vdit has few masks to choose from. "
        "*: achieved is not the sparsity, by more than 2 points, so that no time stands for that sparsity.",
    )
    tables: list[Table | str] = [*about, short(rows)]
    others = [row for row in rows if not ok(row)]
    if others:
        columns = {"shape": "{shape}", "method": "{method}", "sparsity": "{sparsity:g}", "status": "{status}"}
        tables.append(Table("missing", columns, [{name: row[name] for name in columns} for row in others], "No time"))
    return Page(source, source, tables)


def short(rows: Sequence[Row]) -> Table:
    """Every method's times at every shape and sparsity, the cheapest estimate first."""
    columns: dict[str, Any] = {
        "shape": "{shape}", "sparsity": "{sparsity:g}", "method": lambda row: named(row["method"]),
        "achieved": lambda row: f"{row['sparsity_achieved']:.3f}{' *' if off(row) else ''}",
        "estimate, ms": lambda row: f"{spread(row, 'plan_ms')} ({row['plan_ms']['n']})",
        "share": "{share:.1%}", "first, ms": lambda row: number(row["first_plan_ms"]),
        "executor": lambda row: ", ".join(row["executors_run"]),
        "kernel, ms": lambda row: spread(row, "kernel_ms"), "whole, ms": spread,
        "dense, ms": lambda row: number(row["dense"]["ms"]), "times over dense": "{speedup:.2f}",
        "GiB": "{peak_memory_gib:.2f}",
    }  # fmt: skip
    fields = (
        *("shape", "sparsity", "method", "sparsity_achieved", "plan_ms", "share", "first_plan_ms", "kernel_ms"),
        *("ms", "dense", "speedup", "peak_memory_gib", "executors_run"),
    )
    found = sorted(filter(ok, rows), key=lambda row: (row["shape"], row["sparsity"], row["plan_ms"]["p50"]))
    return Table("short", columns, [{name: row[name] for name in fields} for row in found])


def figure(rows: Sequence[Row], path: Path, digest: str) -> None:
    """Draw a bar a row: the method's kernel, its estimate and the rest of the whole, and a mark at dense.

    A call that dropped another share than asked is hatched and named by what it dropped.

    `digest` goes into the PNG's metadata. Raises ImportError without matplotlib.
    """
    found = sorted(filter(ok, rows), key=lambda row: (row["shape"], row["sparsity"], row["ms"]["p50"]))
    picture = canvas(8, 1 + 0.3 * len(found))
    axes = picture.subplots()
    left = [0.0] * len(found)
    for name, colour in (("kernel", "C0"), ("estimate", "C1"), ("rest", "C7")):
        widths = [max(0.0, _part(row, name)) for row in found]
        axes.barh(range(len(found)), widths, left=left, color=colour, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.plot([row["dense"]["ms"] for row in found], range(len(found)), "k|", markersize=12, label="dense")
    axes.set_yticks(range(len(found)), [f"{named(row['method'])} {_dropped(row)}" for row in found])
    hatched = "\nhatched: dropped another share than asked" if any(map(off, found)) else ""
    axes.set_xlabel(f"ms a call, {rows[0]['device']}{hatched}")
    axes.invert_yaxis()
    axes.legend()
    for bars in axes.containers:  # after the legend, which would be hatched as its first bar is
        for bar, row in zip(bars, found, strict=True):
            bar.set(hatch="////" if off(row) else None, edgecolor="w", linewidth=0)
    save(picture, path, digest)


def off(row: Row) -> bool:
    """Whether a timed call dropped another share than asked, so that its time is of no sparsity."""
    return missed(row["sparsity"], row["sparsity_achieved"]) is not None


def lacks(row: Row) -> str | None:
    """What a row that has a time lacks to be read, or None."""
    return None if row["dense"] and row["dense"]["ms"] else "its dense time"


def _dropped(row: Row) -> str:
    share = f"{row['sparsity_achieved']:.3f} (asked {row['sparsity']:g})" if off(row) else f"{row['sparsity']:g}"
    return f"{share} {row['shape']}"


def _part(row: Row, name: str) -> float:
    kernel, estimate = row["kernel_ms"]["p50"], row["plan_ms"]["p50"]
    return float({"kernel": kernel, "estimate": estimate, "rest": row["ms"]["p50"] - kernel - estimate}[name])
