"""Paired contrasts between methods at a setting: which there are is settled in conf/tables.yaml, before the runs.

Pairs have one prompt, seed and noise; Holm's correction is over all contrasts of a page.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from .bootstrap import Estimate, estimate, holm, least_p
from .tabular import Column, Table, named, ok

Row: TypeAlias = dict[str, Any]
LEVEL = 0.05  # what p-values are read against
METRICS = {"psnr_db": "PSNR dB", "ssim": "SSIM", "lpips": "LPIPS"}


class Setting(NamedTuple):
    """What sets rows of a method apart within a table; no mean is taken over different ones."""

    warmup: float | None  # share of the steps, from the first, that is dense
    sparsity: float
    knob: str  # a method's own knob, given in place of a sparsity, or nothing

    @classmethod
    def of(cls, row: Row) -> Setting:
        """The setting of a record."""
        knob = ", ".join(f"{name}={value}" for name, value in (row.get("knob") or {}).items())
        return cls((row.get("dense") or {}).get("steps"), row["sparsity"], knob)


Cells: TypeAlias = dict[tuple[Setting, str], list[Row]]  # by setting and method


@dataclass(frozen=True)
class Contrasts:
    """Each method minus each of `against`, on each of `metrics`; how often and from where the bootstrap draws."""

    against: Sequence[str]
    metrics: Sequence[str]
    draws: int
    seed: int


def labels(cells: Cells) -> dict[str, Column]:
    """The columns that tell a table's rows apart: the warm-up only where it varies."""
    varies = len({setting.warmup for setting, _ in cells}) > 1
    found: dict[str, Column] = {"dense steps": "{warmup:.0%}"} if varies else {}
    return found | {
        "sparsity": lambda row: row["knob"] or f"{row['sparsity']:g}",
        "method": lambda row: named(row["method"]),
    }


def by_prompt(clips: Iterable[tuple[str, float | None]]) -> dict[str, list[float]]:
    """Prompt and value of each clip as values by prompt, those without one left out."""
    found: dict[str, list[float]] = defaultdict(list)
    for prompt, value in clips:
        if value is not None:
            found[prompt].append(value)
    return found


def clip(row: Row) -> tuple[str, int]:
    """What a clip is paired by: its prompt and seed."""
    return row["prompt"], row["seed"]


def twins(group: Sequence[Row], other: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The clips of one prompt and seed that both groups have, and that worked in both."""
    known = {clip(row): row for row in other if ok(row)}
    pairs = ((row, known.get(clip(row))) for row in group if ok(row))
    return [(row, twin) for row, twin in pairs if twin]


def contrasts(cells: Cells, rule: Contrasts) -> Iterator[Table]:
    """A table for each method of `rule.against`: every other minus it, corrected over all of them together.

    Raises ValueError if, corrected for so many, even the least p-value would not reach `LEVEL`.
    """
    found = {
        (base, setting, method): {m: _contrast(group, cells[setting, base], m, rule) for m in rule.metrics}
        for base in rule.against
        for (setting, method), group in cells.items()
        if method not in (base, "dense") and (setting, base) in cells
    }  # fmt: skip
    tested = [made for row in found.values() for made in row.values() if made and made.p is not None]
    if (floor := len(tested) * least_p(rule.draws)) > LEVEL:
        raise ValueError(
            f"contrasts.draws must be at least {len(tested) / LEVEL - 1:.0f} for {len(tested)} contrasts on a "
            f"page, got {rule.draws}: no corrected p-value would be below {floor:.2g}"
        )
    corrected = dict(zip(map(id, tested), holm([made.p for made in tested if made.p is not None]), strict=True))
    columns = labels(cells)
    for metric in rule.metrics:
        mean, low, high = (f"{{{metric}_{name}:+.3f}}" for name in ("mean", "low", "high"))
        p = f"{{{metric}_below}}{{{metric}_holm:.2g}}"
        columns |= {METRICS[metric]: (f"{mean} [{low}, {high}]", mean), f"p, {METRICS[metric].split()[0]}": p}
    for base in rule.against:
        rows = []
        for (against, setting, method), made_of in found.items():
            if against == base and any(made_of.values()):
                values: Row = {**setting._asdict(), "method": method}
                for metric, made in made_of.items():
                    numbers = (made.mean, made.low, made.high, made.p) if made else (None,) * 4
                    numbers = (*numbers, "<" if made and made.bound else "", corrected.get(id(made)))
                    names = (f"{metric}_{name}" for name in ("mean", "low", "high", "p", "below", "holm"))
                    values |= dict(zip(names, numbers, strict=True))
                rows.append(values)
        note = (
            f"Paired by prompt and seed; 95% intervals from {rule.draws} bootstrap draws of prompts, then seeds (seed "
            f"{rule.seed}). p: two-sided, of no difference: the share of {rule.draws} turns of prompts, or of all "
            "where there are fewer, in which the mean is as far from 0; Holm-corrected for the "
            f"{len(tested)} contrasts of this page. < stands where no drawn one is: {floor:.2g}, {len(tested)} times 1 "
            f"of {rule.draws + 1}, is the least corrected value that they resolve."
            if tested
            else "Paired by prompt and seed; too few prompts for an interval or a test."
        )
        if rows:
            yield Table(f"minus_{base}", columns, rows, f"Minus {base}", note)


def _contrast(group: Sequence[Row], other: Sequence[Row], metric: str, rule: Contrasts) -> Estimate | None:
    """The mean difference of the clips that both have, or None if there are none."""
    pairs = [
        (row["prompt"], row[metric] - twin[metric])
        for row, twin in twins(group, other)
        if row[metric] is not None and twin[metric] is not None
    ]
    return estimate(by_prompt(pairs), rule.draws, rule.seed) if pairs else None
