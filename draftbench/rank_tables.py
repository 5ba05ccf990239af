"""Do methods keep their ranks when the model is trained again from another seed? One table of two files of records.

The second file differs from the first in the weights alone (and perhaps in the commit); a knob may have another
calibrated value there. Means are over the clips that worked under both weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from .contrasts import METRICS, Cells, Contrasts, Row, Setting, labels, twins
from .method_tables import SAME, fixed, grouped, mean, namer, provenance
from .tabular import Column, Table

MAY_DIFFER = ("weights_hash",)
_LOWER = ("lpips",)  # metrics of which less is better


def ranks(rows: Sequence[Row], again: Sequence[Row], source: str, rule: Contrasts) -> Table:
    """Means and ranks of every method at every setting that both files have; a rank that changes is marked.

    Raises ValueError if the weights are the same, or anything else that a table's rows share is not.
    """
    for name in SAME:
        values = [repr(fixed(group[0], name)) for group in (rows, again)]
        if name not in MAY_DIFFER and values[0] != values[1]:
            raise ValueError(f"{source}: ranks are compared at one {name}, not at {values[0]} and {values[1]}")
    if rows[0]["weights_hash"] == again[0]["weights_hash"]:
        raise ValueError(f"{source}: ranks are compared between two weights, and both have {rows[0]['weights_hash']}")
    first, second = _comparable(grouped(rows)), _comparable(grouped(again))
    shared = [key for key in first if key in second]
    found: dict[tuple[Setting, str], Row] = {key: {**key[0]._asdict(), "method": key[1]} for key in shared}
    changed = 0
    for metric in rule.metrics:
        for key in shared:
            pairs = twins(first[key], second[key])
            for name, side in (("", 0), ("_again", 1)):
                found[key][metric + name] = mean([pair[side] for pair in pairs], metric)
        for name in ("", "_again"):
            for setting in {setting for setting, _ in shared}:
                here = [found[key] for key in shared if key[0] == setting and found[key][metric + name] is not None]
                here.sort(key=lambda row: row[metric + name] if metric in _LOWER else -row[metric + name])
                for place, row in enumerate(here, 1):
                    row[f"{metric}_rank{name}"] = place
        changed += sum(_moved(row, metric) for row in found.values())
    columns: dict[str, Column] = labels({key: first[key] for key in shared})
    for metric, form in zip(METRICS, (".2f", ".3f", ".3f"), strict=True):
        if metric in rule.metrics:
            columns[METRICS[metric]] = f"{{{metric}:{form}}} / {{{metric}_again:{form}}}"
            columns[f"rank, {METRICS[metric].split()[0]}"] = _shown(metric)
    note = (
        "Means with these weights / with the others, over the same clips; ranks among the methods and controls of a "
        f"sparsity, 1 the nearest to dense; a rank that changes is marked *: {changed} of "
        f"{len(shared) * len(rule.metrics)}.{_steps(shared, first, second)} The others: {provenance(again)}"
    )
    return Table("ranks", columns, list(found.values()), "Ranks on the model trained again", note)


def _comparable(cells: Cells) -> Cells:
    """What stands at a sparsity: not dense, nor a control that none changes."""
    return {key: group for key, group in cells.items() if key[0].sparsity and key[1] != "dense"}


def _steps(shared: Sequence[tuple[Setting, str]], first: Cells, second: Cells) -> str:
    """A sentence on what takes as many steps as the time of another method allows, where that differs."""
    pairs = {key: (first[key][0]["steps"], second[key][0]["steps"]) for key in shared}
    name = namer([first[key][0] for key in shared])
    found = [f"{name(first[key][0])} {a} and {b}" for key, (a, b) in pairs.items() if a != b]
    return f" Steps that differ: {', '.join(found)}." if found else ""


def _moved(row: Row, metric: str) -> bool:
    return bool(row.get(f"{metric}_rank") != row.get(f"{metric}_rank_again"))


def _shown(metric: str) -> Column:
    def text(row: Row) -> str:
        before, after = row.get(f"{metric}_rank"), row.get(f"{metric}_rank_again")
        return "-" if before is None else f"{before} -> {after} *" if _moved(row, metric) else f"{before}"

    return text
