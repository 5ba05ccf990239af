"""Means of records by machine, method and sparsity, and the plain-text table that a run prints."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .records import cell_id, missed_by

# What `means` averages, with the head and the format of its column.
MEASURES = {
    "sparsity_achieved": ("achieved", "{:.3f}"),
    "density_effective": ("density", "{:.3f}"),
    "psnr_db": ("psnr_db", "{:.2f}"),
    "ssim": ("ssim", "{:.4f}"),
    "lpips": ("lpips", "{:.4f}"),
    "generate_s": ("generate_s", "{:.2f}"),
    "speedup_generate": ("speedup", "{:.2f}x"),
    "speedup_attention": ("attention", "{:.2f}x"),
}


def means(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each device, versions, model, method, sparsity and variant, the dense baseline of a model first.

    A row has those, the knob, n (ok cells), the mean of each of MEASURES over the cells that have it, else None, and
    what `missed_by` says. The variant holds what else shapes a cell (`variant`). Cells that failed are left out.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        if record["status"] == "ok":
            groups[_group(record)].append(record)
    rows = []
    for key in sorted(groups):
        cells = groups[key]
        row = {name: cells[0][name] for name in ("device", "versions", "model", "method", "sparsity")}
        row |= {"knob": cells[0].get("knob"), "variant": variant(cells[0]), "n": len(cells)}
        for name in MEASURES:
            values = [cell[name] for cell in cells if cell.get(name) is not None]
            row[name] = sum(values) / len(values) if values else None
        row["missed"] = missed_by(cells[0], row["sparsity_achieved"])
        rows.append(row)
    return rows


def _group(record: Mapping[str, Any]) -> tuple[Any, ...]:
    machine = (str(record["device"]), json.dumps(record["versions"], sort_keys=True))
    method = (record["method"] != "dense", str(record["method"]), record["sparsity"] or 0.0)
    return (*machine, str(record["model"]), *method, json.dumps(variant(record), sort_keys=True))


def level(row: Mapping[str, Any]) -> Any:
    """What was asked of a row's method: its own knob with the value, in words, where that is given, or its sparsity."""
    return ", ".join(f"{name}={value}" for name, value in (row.get("knob") or {}).items()) or row["sparsity"]


def differing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each row, what its variant has that not all rows of its model, method and level share; "" for nothing."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["model"], row["method"], level(row)].append(row["variant"])
    names: dict[tuple[Any, ...], list[str]] = {}
    for key, variants in groups.items():
        known = dict.fromkeys(name for own in variants for name in own)
        names[key] = [name for name in known if len({repr(own.get(name)) for own in variants}) > 1]
    words = []
    for row in rows:
        own = row["variant"]
        said = [name for name in names[row["model"], row["method"], level(row)] if name in own]
        plain = [f"{name}={own[name]}" for name in said if not isinstance(own[name], Mapping)]
        # A calibration's account is long: what it is of mostly differs beside it, and else a digest tells two apart.
        words.append(" ".join(plain or [f"{name}={cell_id(own[name])[:8]}" for name in said if own[name]]))
    return words


def variant(record: Mapping[str, Any]) -> dict[str, Any]:
    """What else shapes a record's cell than model, method, sparsity, prompt and seed, by name."""
    shared = ("executor", "grid", "steps", "batch", "dense_kernel", "lpips_net", "commit")
    found = {**(record["method_settings"] or {}), **{name: record.get(name) for name in shared}}
    found |= {f"model.{name}": value for name, value in (record.get("model_settings") or {}).items()}
    dense = {f"dense.{name}": value for name, value in (record.get("dense") or {}).items()}
    return found | dense | {"weights": str(record.get("weights_hash"))[:12]}


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The means as plain text, one block for each device and set of versions, then the failed cells and why.

    The last column tells variants of one method and sparsity apart; a dash is a number that no cell has.
    """
    rows = means(records)
    blocks = []
    machines = list(dict.fromkeys((str(row["device"]), json.dumps(row["versions"])) for row in rows))
    for machine in machines:
        block = [row for row in rows if (str(row["device"]), json.dumps(row["versions"])) == machine]
        versions = block[0]["versions"] or {}
        used = [f"{name} {versions[name]}" for name in ("torch", "triton", "cuda") if versions.get(name)]
        blocks.append("\n".join([", ".join([machine[0], *used]), *_lines(block), *_off(block)]))
    failed = [record for record in records if record["status"] != "ok"]
    if failed:
        blocks.append("\n".join(_failure(record) for record in failed))
    return "\n\n".join(blocks) or "no records"


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    head = ["model", "method", "sparsity", "n", *(short for short, _ in MEASURES.values()), ""]
    body = []
    for row, words in zip(rows, differing(rows), strict=True):
        names = [str(row["model"]), str(row["method"]), _level(row), str(row["n"])]
        numbers = [_number(row[name], style) for name, (_, style) in MEASURES.items()]
        body.append([*names, *numbers, words])
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    pads = [str.ljust, str.ljust, *[str.rjust] * (len(head) - 3), str.ljust]
    return [
        "  ".join(pad(text, width) for pad, text, width in zip(pads, line, widths, strict=True)).rstrip()
        for line in [head, *body]
    ]


def _off(rows: list[dict[str, Any]]) -> list[str]:
    """A line on what missed its sparsity, if anything did."""
    found = [f"{row['method']} {row['missed']}" for row in rows if row["missed"]]
    return [f"off by more than 2 points, 1 beyond 90%: {', '.join(found)}"] if found else []


def _level(row: Mapping[str, Any]) -> str:
    asked = level(row)
    return asked if isinstance(asked, str) else _number(asked, "{:g}")


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else style.format(value)


def _failure(record: Mapping[str, Any]) -> str:
    cell = f"{record['model']} {record['method']} sparsity {_level(record)}"
    return f"{record['status']} ({cell}, prompt {record['prompt']!r}, seed {record['seed']})"
