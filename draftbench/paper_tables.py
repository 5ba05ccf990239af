"""A paper's quoted table in its own layout, and our records of the same models at the same settings beside it.

The numbers come from results/quoted, the layout and the settings from conf/paper. Records of other models at those
settings have a table of their own and share no row with quoted ones. A record that was made at other settings (steps,
dense exceptions, sparsity, method) is in none of them.
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from .method_tables import Row, check_same, provenance, summary
from .tabular import Column, Page, Table

Quoted: TypeAlias = Sequence[Mapping[str, str]]  # one number a line, as `read` gives them
COLUMNS = ("model", "method", "sparsity", "quantity", "value", "source")  # of a file of quoted numbers
_X100 = ("ssim", "lpips")
_OWN = ("clips", "psnr_db", *_X100, "density_effective", "generate_s", "speedup_generate")


@dataclass(frozen=True)
class Paper:
    """What conf/paper says of a paper; setups: its name of a model to ours (model, grid, dense_layers)."""

    title: str
    note: str
    speedups: str
    methods: Mapping[str, str]
    speedup_of: str
    steps: int
    dense_steps: float
    setups: Mapping[str, Mapping[str, Any]]
    columns: Mapping[str, str]


def read(path: Path) -> list[dict[str, str]]:
    """The quoted numbers: model, method, sparsity, quantity, value and source, as they are written.

    Raises ValueError, naming the file and the line, for one without these columns, a number that is none, or no line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if lacking := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
        raise ValueError(f"{path} must have the columns {', '.join(COLUMNS)}; it lacks {', '.join(lacking)}")
    quoted = []
    for line in rows:
        where = f"{path}, line {rows.line_num}"
        if empty := [name for name in COLUMNS if not line[name]]:
            raise ValueError(f"{where}: it has no {', '.join(empty)}")
        for name in ("sparsity", "value"):
            try:
                number = math.isfinite(float(line[name]))
            except ValueError:
                number = False
            if not number:
                raise ValueError(f"{where}: {name} must be a number, got {line[name]!r}")
        quoted.append(line)
    if not quoted:
        raise ValueError(f"{path} has no line of numbers")
    return quoted


def page(name: str, paper: Paper, quoted: Quoted, rows: Sequence[Row]) -> Page:
    """The page of a paper: its table with ours beside it, its speed-ups, and the tables of other models.

    Records of another device or of other versions have tables of their own. Raises ValueError if those that share one
    differ in weights or the like.
    """
    levels = {(line["model"], float(line["sparsity"])) for line in quoted}
    ours: dict[str, list[Row]] = defaultdict(list)  # by the paper's name of the model
    others: dict[str, list[Row]] = defaultdict(list)  # by model and grid
    left_out: set[str] = set()
    for row in rows:
        if row.get("kind") != "cell" or row["method"] not in paper.methods.values():
            continue
        label = next((known for known, setup in paper.setups.items() if _is(row, setup)), None)
        grid = f"{row['model']} {'x'.join(map(str, row['grid']))}"
        if row["sparsity"] not in {s for model, s in levels if label in (None, model)} | {0.0} or not _set(row, paper):
            left_out |= {grid} if label else set()
        elif label is None:
            others[grid].append(row)
        elif row["dense"]["layers"] == paper.setups[label]["dense_layers"]:
            ours[label].append(row)
        else:
            left_out.add(grid)
    parts: list[Table | str] = []
    for number, machine in enumerate(sorted({_machine(row) for group in ours.values() for row in group}) or [None]):
        here = {label: [row for row in group if _machine(row) == machine] for label, group in ours.items()}
        here = {label: group for label, group in here.items() if group}
        for label, group in here.items():
            check_same(group, f"{name}, {label}")
        parts += [_main(paper, quoted, here, left_out, number), _speedups(paper, quoted, here, number)]
    for label in sorted(others):
        machines = sorted({_machine(row) for row in others[label]})
        for number, machine in enumerate(machines):
            group = [row for row in others[label] if _machine(row) == machine]
            check_same(group, f"{name}, {label}")
            parts.append(_other(paper, label, group, number))
    return Page(name, paper.title, parts)


def _machine(row: Row) -> tuple[str, str]:
    """What sets apart records that share no table."""
    return str(row["device"]), repr(row["versions"])


def _nth(name: str, number: int) -> str:
    return f"{name}_{number + 1}" if number else name


def _is(row: Row, setup: Mapping[str, Any]) -> bool:
    return bool(row["model"] == setup["model"] and row["grid"] == list(setup["grid"]))


def _set(row: Row, paper: Paper) -> bool:
    """Whether a record was made with the paper's steps, of which the paper's share is dense."""
    return bool(row["steps"] == paper.steps and (row["dense"] or {}).get("steps") == paper.dense_steps)


def _main(paper: Paper, quoted: Quoted, ours: Mapping[str, list[Row]], left_out: set[str], number: int) -> Table:
    lines: dict[tuple[str, str, float], Row] = {}
    for line in quoted:
        key = line["model"], line["method"], float(line["sparsity"])
        if line["quantity"] in paper.columns:
            values = lines.setdefault(key, dict(zip(("model", "method", "sparsity"), key, strict=True)))
            values[line["quantity"]] = line["value"]
    rows = [
        values | _own(ours.get(model, []), paper.methods[method], sparsity)
        for (model, method, sparsity), values in lines.items()
    ]
    made = [f"Ours, {label}: {provenance(group)}" for label, group in ours.items()]
    note = [
        "Quoted numbers are the paper's (Table 1; results/quoted holds each with its source); its SSIM and LPIPS are "
        "x100, and so are ours here, with SSIM on its own scale of 0 to 1 in brackets. Ours: mean over clips, against "
        f"the dense clip of the same prompt, seed and noise; {paper.steps} steps, the first {paper.dense_steps:.0%} "
        f"dense. A dash: not given, or no record. {paper.note}",
        *(made or ["There are no records of these models yet."]),
    ]
    if left_out:
        note.append(f"Left out, made at other settings: {', '.join(sorted(left_out))}.")
    columns: dict[str, Column] = {"model": "{model}", "method": "{method}", "sparsity": "{sparsity:.0%}"}
    columns |= {heading: f"{{{quantity}}}" for quantity, heading in paper.columns.items()}
    return Table(
        _nth("table1", number), columns | _columns("ours: "), rows, "Quoted, and ours beside it", "\n\n".join(note)
    )


def _speedups(paper: Paper, quoted: Quoted, ours: Mapping[str, list[Row]], number: int) -> Table:
    rows = []
    for line in quoted:
        if line["quantity"] == "speedup_generate":
            label, sparsity = line["model"], float(line["sparsity"])
            own = _own(ours.get(label, []), paper.methods[line["method"]], sparsity)
            device = ours[label][0]["device"] if own["ours_clips"] else None
            values = {"model": label, "sparsity": sparsity, "speedup_quoted": line["value"]}
            rows.append(values | own | {"device": device})
    columns: dict[str, Column] = {
        "model": "{model}", "sparsity": "{sparsity:.0%}", f"{paper.speedup_of}, H100": "{speedup_quoted}x",
        "ours": "{ours_speedup_generate:.2f}x", "ours: generate s": "{ours_generate_s:.1f}", "ours: on": "{device}",
    }  # fmt: skip
    note = "Quoted beside ours: whole generation, each over its own dense run; ours is timed in turn with it."
    return Table(_nth("figure4", number), columns, rows, paper.speedups, note)


def _other(paper: Paper, label: str, group: list[Row], number: int) -> Table:
    """The same grid on a model that the paper has not: no quoted number in sight."""
    names = {ours: theirs for theirs, ours in paper.methods.items()}
    order = list(names)
    keys = sorted({(row["method"], row["sparsity"]) for row in group}, key=lambda key: (order.index(key[0]), key[1]))
    rows = [
        {"model": group[0]["model"], "method": names[method], "sparsity": sparsity, **_own(group, method, sparsity)}
        for method, sparsity in keys
    ]
    dense = group[0]["dense"]
    note = (
        f"The paper's grid of methods and sparsities on a model that it lacks. **These numbers are no evidence about "
        f"larger models** and compare with no quoted one. {provenance(group)} {paper.steps} steps, the first "
        f"{paper.dense_steps:.0%} and {dense['layers']} layers dense. SSIM and LPIPS x100; SSIM of 0 to 1 in brackets."
    )
    columns: dict[str, Column] = {"model": "{model}", "method": "{method}", "sparsity": "{sparsity:.0%}"}
    return Table(_nth(label.replace(" ", "_"), number), columns | _columns(), rows, label, note)


def _own(group: Sequence[Row], method: str, sparsity: float) -> Row:
    """Our values for one row, each None where there is no record; at sparsity 0 of dense, whatever the row's name."""
    wanted = (method if sparsity else "dense", sparsity)
    found = [row for row in group if (row["method"], row["sparsity"]) == wanted]
    made = summary(found) if found else {}
    values = {f"ours_{name}": made.get(name) for name in _OWN}
    hundreds = {f"ours_{name}_x100": 100 * made[name] if made.get(name) is not None else None for name in _X100}
    return values | hundreds


def _columns(prefix: str = "") -> dict[str, Column]:
    """The columns of our own values."""
    return {
        f"{prefix}clips": "{ours_clips}", f"{prefix}PSNR": "{ours_psnr_db:.2f}",
        f"{prefix}SSIM": "{ours_ssim_x100:.2f} ({ours_ssim:.4f})", f"{prefix}LPIPS": "{ours_lpips_x100:.2f}",
        f"{prefix}density": "{ours_density_effective:.3f}", f"{prefix}speed-up": "{ours_speedup_generate:.2f}x",
    }  # fmt: skip
