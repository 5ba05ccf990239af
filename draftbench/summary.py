"""Means of records by machine, method and sparsity, and the plain-text table that a run prints."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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

    A row has those, n (ok cells) and the mean of each of MEASURES over the cells that have it, else None. The variant
    holds the settings, executor, grid, steps, weights and what stays dense. Cells that failed are left out.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        if record["status"] == "ok":
            groups[_group(record)].append(record)
    rows = []
    for key in sorted(groups):
        cells = groups[key]
        row = {name: cells[0][name] for name in ("device", "versions", "model", "method", "sparsity")}
        row |= {"variant": _variant(cells[0]), "n": len(cells)}
        for name in MEASURES:
            values = [cell[name] for cell in cells if cell.get(name) is not None]
            row[name] = sum(values) / len(values) if values else None
        rows.append(row)
    return rows


def _group(record: Mapping[str, Any]) -> tuple[Any, ...]:
    machine = (str(record["device"]), json.dumps(record["versions"], sort_keys=True))
    method = (record["method"] != "dense", str(record["method"]), record["sparsity"] or 0.0)
    return (*machine, str(record["model"]), *method, json.dumps(_variant(record), sort_keys=True))


def _variant(record: Mapping[str, Any]) -> dict[str, Any]:
    variant = {**(record["method_settings"] or {}), **{name: record[name] for name in ("executor", "grid", "steps")}}
    dense = {f"dense.{name}": value for name, value in (record.get("dense") or {}).items()}
    return variant | dense | {"weights": str(record.get("weights_hash"))[:12]}


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
        blocks.append("\n".join([", ".join([machine[0], *used]), *_lines(block)]))
    failed = [record for record in records if record["status"] != "ok"]
    if failed:
        blocks.append("\n".join(_failure(record) for record in failed))
    return "\n\n".join(blocks) or "no records"


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    head = ["model", "method", "sparsity", "n", *(short for short, _ in MEASURES.values()), ""]
    body = []
    for row in rows:
        same = [r["variant"] for r in rows if all(r[k] == row[k] for k in ("model", "method", "sparsity"))]
        differing = [k for k, v in row["variant"].items() if any(other.get(k) != v for other in same)]
        names = [str(row["model"]), str(row["method"]), _number(row["sparsity"], "{:g}"), str(row["n"])]
        numbers = [_number(row[name], style) for name, (_, style) in MEASURES.items()]
        body.append([*names, *numbers, " ".join(f"{k}={row['variant'][k]}" for k in differing)])
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    pads = [str.ljust, str.ljust, *[str.rjust] * (len(head) - 3), str.ljust]
    return [
        "  ".join(pad(text, width) for pad, text, width in zip(pads, line, widths, strict=True)).rstrip()
        for line in [head, *body]
    ]


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else style.format(value)


def _failure(record: Mapping[str, Any]) -> str:
    cell = f"{record['model']} {record['method']} sparsity {_number(record['sparsity'], '{:g}')}"
    return f"{record['status']} ({cell}, prompt {record['prompt']!r}, seed {record['seed']})"
