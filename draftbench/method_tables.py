"""Tables of records of kind "cell": methods by sparsity, the spread between clips, by warm-up, contrasts, diagnostics.

One row a method at a setting (share of dense first steps, sparsity), means over clips with their intervals. A table
never mixes devices, versions, weights, grids, dense kernels or dense clips, nor has prompts or seeds that a calibration
used: it refuses. Rows of several commits or dense kernels may stand in one if nothing was timed and their dense clips
are the same bytes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from .bootstrap import estimate
from .contrasts import METRICS, Cells, Contrasts, Row, Setting, by_prompt, clip, contrasts, labels
from .records import missed_by
from .tabular import Column, Page, Table, check_alike, commits, label, named, ok, versions

SAME = (
    "device", "versions", "weights_hash", "grid", "model", "model_settings", "dense", "executor", "batch", "lpips_net",
)  # fmt: skip
ALIKE = ("method_settings", "steps", "commit")  # within a method at a sparsity
_QUANTILES = {"least": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "most": 1.0}


def check_same(rows: Sequence[Row], source: str) -> None:
    """Raise ValueError, naming the field, if rows that share a table differ in what must be the same."""
    for name in SAME:
        check_alike((fixed(row, name) for row in rows), name, source)
    check_alike((row["steps"] for row in rows if "like" not in (row["method_settings"] or {})), "steps", source)
    _check_dense([row for row in rows if ok(row)], source)
    for name in ALIKE:
        found: dict[tuple[Setting, str], set[str]] = defaultdict(set)
        for row in rows:
            found[Setting.of(row), row["method"]].add(repr(row.get(name)))
        for (setting, method), values in found.items():
            if len(values) > 1:
                raise ValueError(
                    f"{source}: {method} at {setting.sparsity:g} has different {name}: {', '.join(sorted(values))}"
                )
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        cell = (Setting.of(row), row["method"], *clip(row))
        if cell in seen:
            raise ValueError(
                f"{source}: {row['method']} at {row['sparsity']:g} has two records of {row['prompt']!r}, seed "
                f"{row['seed']}, of runs that differ in what no table shows (videos, diagnostics, latency): keep one"
            )
        seen.add(cell)


def _check_dense(rows: Sequence[Row], source: str) -> None:
    """See `check_same`: a prompt and seed has one dense clip; commits and dense kernels may differ where its digest
    ties rows."""
    references: dict[tuple[str, int], set[str]] = defaultdict(set)
    for row in rows:
        own = row["frames_sha256"] if row["method"] == "dense" else None
        references[clip(row)] |= {digest for digest in (own, row["reference_sha256"]) if digest}
    for (prompt, seed), found in references.items():
        if len(found) > 1:
            digests = ", ".join(sorted(digest[:12] for digest in found))
            raise ValueError(f"{source}: rows against different dense clips of {prompt!r}, seed {seed}: {digests}")
    timed = any(row["generate_s"] is not None for row in rows)
    untied = [row for row in rows if timed or not row["reference_sha256"]]
    if untied:  # the others are tied to them by their dense rows
        dense = {clip(row) for row in untied if row["method"] == "dense" and row["frames_sha256"]}
        untied += [row for row in rows if clip(row) not in dense]
    for name in ("commit", "dense_kernel"):
        check_alike((row[name] for row in untied), name, source)


def fixed(row: Row, name: str) -> Any:
    """A field that all rows of a table share; the share of dense first steps is part of a row's setting instead."""
    value = row.get(name)
    return {key: x for key, x in value.items() if key != "steps"} if name == "dense" and value else value


def check_page(rows: Sequence[Row], source: str) -> None:
    """As `check_same`, and ValueError for a prompt or a seed that a method of the page was calibrated on."""
    check_same(rows, source)
    for (prompts, seeds), methods in _calibrated(rows).items():
        for name, values in (("prompt", prompts), ("seed", seeds)):
            if used := {row[name] for row in rows} & set(values):
                what = f"on a {name} of this table, {min(used)!r}"
                raise ValueError(f"{source}: {', '.join(sorted(methods))} was calibrated {what}")


def page(rows: Sequence[Row], source: str, rule: Contrasts, notes: Sequence[Row] = ()) -> Page:
    """The tables of one file of records, and of the diagnostics beside it; ValueError if its rows do not mix."""
    check_page(rows, source)
    cells = grouped(rows)
    prompts, seeds = ({row[name] for row in rows} for name in ("prompt", "seed"))
    clips = f"{len(prompts)} prompts x seeds {', '.join(map(str, sorted(seeds)))}."
    intro = [provenance(rows), clips, *_caveats(rows), "Generated by `python -m draftbench.tables`."]
    parts: list[Table | str] = [" ".join(intro), _methods(cells, rule), *_warmup(cells), *_spread(cells)]
    return Page(source, source, [*parts, *contrasts(cells, rule), *([_diagnostics(notes)] if notes else [])])


def grouped(rows: Sequence[Row]) -> Cells:
    """The rows of each method at each setting, dense first."""
    groups: Cells = defaultdict(list)
    for row in rows:
        groups[Setting.of(row), row["method"]].append(row)
    return dict(sorted(groups.items(), key=lambda item: (item[0][1] != "dense", *item[0])))


def _caveats(rows: Sequence[Row]) -> list[str]:
    """What pocket's numbers are no evidence of, and on what methods were calibrated."""
    found = ["Pocket's numbers are no evidence about larger models."] if rows[0]["model"] == "pocket" else []
    for (prompts, seeds), methods in _calibrated(rows).items():
        names = ", ".join(sorted(methods))
        found.append(
            f"Calibrated on {len(prompts)} prompts x {len(seeds)} seeds, none of them of the clips here: {names}."
        )
    return found


def _calibrated(rows: Sequence[Row]) -> dict[tuple[Any, ...], set[str]]:
    """The methods that were calibrated on each set of prompts and seeds."""
    found: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for row in rows:
        if of := (row.get("method_settings") or {}).get("calibrated"):
            found[tuple(of["prompts"]), tuple(of["seeds"])].add(row["method"])
    return found


def provenance(rows: Sequence[Row]) -> str:
    """A sentence: the model, grid, steps, weights, guidance, device, versions and commits of rows of one table."""
    first, warmups = rows[0], {Setting.of(row).warmup for row in rows}
    steps = all_steps(rows)
    (share,) = warmups if len(warmups) == 1 else (None,)
    taken = f"{steps} steps{'' if share is None else f', the first {share:.0%} dense'}, " if steps else ""
    same = "; the dense clips of all are the same bytes" if len({row["commit"] for row in rows}) > 1 else ""
    guidance = (first["model_settings"] or {}).get("guidance")
    return (
        f"{first['model']}, token grid {'x'.join(map(str, first['grid']))}, {taken}"
        f"weights `{first['weights_hash'][:12]}`, "
        f"{'' if guidance is None else f'guidance {guidance:g}, '}on one {first['device']}, {versions(first)}, "
        f"{commits(rows, _whole(rows))}{same}."
    )


def _whole(rows: Sequence[Row]) -> Callable[[Row], str]:
    """What names a row's cell where commits are told apart: the method alone if all of its cells are of one."""
    cell, made = namer(rows), defaultdict(set)
    for row in rows:
        made[row["method"]].add((row["commit"], row["dirty"]))
    return lambda row: row["method"] if len(made[row["method"]]) == 1 else cell(row)


def namer(rows: Sequence[Row]) -> Callable[[Row], str]:
    """What names a row's cell in a sentence: the method, its knob or sparsity, and its warm-up if that varies."""
    varies = len({Setting.of(row).warmup for row in rows}) > 1

    def name(row: Row) -> str:
        warmup, sparsity, knob = Setting.of(row)
        return f"{row['method']} {knob or format(sparsity, 'g')}{f' after {warmup:.0%}' if varies and warmup else ''}"

    return name


def short(rows: Sequence[Row]) -> Table:
    """The table for the README: a row a method, PSNR and LPIPS at each sparsity, or at each warm-up if those vary."""
    cells = grouped(list(filter(ok, rows)))
    return _pivot(cells, "short", "warmup" if len({setting.warmup for setting, _ in cells}) > 1 else "sparsity")


def _pivot(cells: Cells, name: str, across: str, note: str = "") -> Table:
    """PSNR and LPIPS with a column for each value of `across`, a row a method at each value of the other."""
    down = "sparsity" if across == "warmup" else "warmup"
    found: dict[tuple[str, Any], Row] = {}
    levels: dict[Any, str] = {}
    steps = all_steps(_rows(cells))
    for (setting, method), group in cells.items():
        if method != "dense":
            level, row = getattr(setting, across), getattr(setting, down)
            psnr, lpips = mean(group, "psnr_db"), mean(group, "lpips")
            numbers = [format(x, form) if x is not None else "-" for x, form in ((psnr, ".1f"), (lpips, ".3f"))]
            text = f"{' / '.join(numbers)} ({sum(map(ok, group))})"
            if off := _missed(group):
                text += f", {off}"
            if group[0]["steps"] not in (None, steps):
                text += f", {group[0]['steps']} steps"
            if setting.knob:
                text += f", {mean(group, 'sparsity_achieved') or 0:.0%} by {setting.knob}"
            if setting.knob and across == "sparsity":
                level = math.inf  # stands at none, so it comes last
            levels[level] = "own knob" if level == math.inf else f"{100 * level:.6g}%"
            line = found.setdefault((method, row), {"method": method, down: row})
            line[levels[level]] = "; ".join(filter(None, [line.get(levels[level]), text]))
    columns: dict[str, Column] = {"PSNR dB / LPIPS (clips)": lambda row: f"`{row['method']}`{label(row['method'])}"}
    if len({row for _, row in found}) > 1:
        columns[down] = f"{{{down}:g}}"
    columns |= {levels[level]: partial(_said, levels[level]) for level in sorted(levels)}
    rows = [dict.fromkeys(levels[level] for level in sorted(levels)) | found[key] for key in sorted(found)]
    return Table(name, columns, rows, "" if name == "short" else "By dense first steps", note)


def _said(name: str, row: Row) -> str:
    return row.get(name) or "-"


def _warmup(cells: Cells) -> list[Table]:
    """The pivot over warm-ups, if they vary."""
    if len({setting.warmup for setting, _ in cells}) < 2:
        return []
    note = "A column for each share of the steps, from the first, that stays dense; all against the same dense clips."
    return [_pivot(cells, "warmup", "warmup", note)]


def mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The mean of a field over the rows that have it, or None."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None


def _rows(cells: Cells) -> list[Row]:
    return [row for group in cells.values() for row in group]


def _missed(group: Sequence[Row]) -> str | None:
    """See `missed_by`: of one method at one setting, on the mean of the clips that worked."""
    return missed_by(group[0], mean(list(filter(ok, group)), "sparsity_achieved"))


def incomplete(cells: Cells) -> dict[tuple[Setting, str], str]:
    """`40 of 64` for each cell of which fewer clips worked than there are on the page, if any did."""
    most = len(set(map(clip, _rows(cells))))
    counts = {key: sum(map(ok, group)) for key, group in cells.items()}
    return {key: f"{count} of {most}" for key, count in counts.items() if 0 < count < most}


def all_steps(rows: Iterable[Row]) -> int | None:
    """The steps of what does not take fewer."""
    return max((row["steps"] or 0 for row in rows), default=0) or None


def summary(group: Sequence[Row]) -> Row:
    """The values of one method at one setting: clips, and the mean of each measure over those that worked."""
    worked = list(filter(ok, group))
    failed = "; ".join(sorted({row["status"] for row in group} - {"ok"}))
    clips = failed if not worked else f"{len(worked)} of {len(group)}; {failed}" if failed else f"{len(worked)}"
    quality = [row["quality"]["method"] for row in worked if row.get("quality")]
    names = ("sparsity_achieved", "density_effective", *METRICS)
    values: Row = {name: mean(worked, name) for name in names}
    values |= {name: mean(quality, name) for name in ("motion_right", "scene_right")}
    values |= {name: mean(worked, name) for name in ("generate_s", "speedup_generate", "speedup_attention")}
    setting = Setting.of(group[0])
    clips_missed = sum(_missed([row]) is not None for row in worked)
    values |= {"missed": _missed(group), "clips_missed": clips_missed, "steps": group[0]["steps"]}
    return {**setting._asdict(), "method": group[0]["method"], "clips": clips, **values}


def _achieved(steps: int | None) -> Column:
    """Its sparsity, with a mark if that is not the row's; of what took fewer than `steps`, its steps."""

    def text(row: Row) -> str:
        if row["steps"] not in (None, steps):
            return f"{row['steps']} of {steps} steps"
        if row["sparsity_achieved"] is None:
            return "-"
        some = f" ({row['clips_missed']} off)" if row["clips_missed"] else ""
        return f"{row['sparsity_achieved']:.3f}{' *' if row['missed'] else some}"

    return text


def _methods(cells: Cells, rule: Contrasts) -> Table:
    dense = [row["quality"]["dense"] for row in _rows(cells) if row.get("quality")]
    judged = [mean(dense, name) for name in ("motion_right", "scene_right")]
    motion, scene = ("-" if share is None else f"{share:.2f}" for share in judged)
    rows = [summary(group) | _intervals(group, rule) for group in cells.values()]
    timed = any(row["generate_s"] is not None for row in rows)
    times = "speed-ups over the dense timing of the same process" if timed else "nothing was timed"
    note = (
        "Mean over clips [95% interval, from a bootstrap of prompts, then seeds]; PSNR (at most 100), SSIM and LPIPS "
        f"against the dense clip of the same prompt, seed and noise; {times}; achieved: sparsity of the active calls; "
        "density: executed pairs of all steps taken, layers and text; motion, scene: share of clips in which pocket's "
        f"judge sees what was asked for. The dense clips: motion {motion}, scene {scene}."
    )
    if any(row["missed"] for row in rows):
        each = (f"{named(row['method'])} {row['missed']}" for row in rows if row["missed"])
        note += f" *: off by more than 2 points, 1 beyond 90%, so no row of that sparsity: {', '.join(each)}."
    if any(row["clips_missed"] and not row["missed"] for row in rows):
        note += " (n off): clips that are off by more than 2 points, 1 beyond 90%, though their mean is not."
    cell = namer(_rows(cells))
    if part := [f"{cell(cells[key][0])} ({some})" for key, some in incomplete(cells).items()]:
        note += f" Means over some of the clips, to be compared by the contrasts alone: {', '.join(part)}."
    if timed:
        note += " Generate s, and what divides by it, is the first clip's of a job, which alone is timed."
        jobs = [(g[0], {row["baseline_id"] for row in g if row["generate_s"] is not None}) for g in cells.values()]
        if several := [f"{cell(row)} ({len(timings)})" for row, timings in jobs if len(timings) > 1]:
            note += f" Of several jobs, the mean of theirs, each over its own dense timing: {', '.join(several)}."
    columns: dict[str, Column] = labels(cells) | {
        "clips": "{clips}", "achieved": _achieved(all_steps(_rows(cells))), "density": "{density_effective:.3f}",
    }  # fmt: skip
    for name, form in zip(METRICS, (".2f", ".3f", ".3f"), strict=True):
        bare = f"{{{name}:{form}}}"
        columns[METRICS[name]] = (f"{bare} [{{{name}_low:{form}}}, {{{name}_high:{form}}}]", bare)
    columns |= {"motion": "{motion_right:.2f}", "scene": "{scene_right:.2f}"}
    if timed:
        columns |= {
            "generate s": "{generate_s:.2f}", "speed-up": "{speedup_generate:.2f}",
            "attention": "{speedup_attention:.2f}",
        }  # fmt: skip
    return Table("methods", columns, rows, "", note)


def _intervals(group: Sequence[Row], rule: Contrasts) -> Row:
    """The ends of the 95% interval of each metric's mean, None where there is none."""
    values: Row = {}
    for name in METRICS:
        clips = by_prompt((row["prompt"], row[name]) for row in group if ok(row))
        made = estimate(clips, rule.draws, rule.seed) if clips else None
        values |= {f"{name}_low": made and made.low, f"{name}_high": made and made.high}
    return values


def _spread(cells: Cells) -> list[Table]:
    """The table, unless no method has several clips."""
    rows: list[Row] = []
    for (setting, method), group in cells.items():
        values: Row = {**setting._asdict(), "method": method}
        for metric in METRICS:
            numbers = _values(group, metric)
            cuts = np.quantile(numbers, list(_QUANTILES.values())).tolist() if len(numbers) > 1 else [None] * 5
            values |= {f"{metric}_{name}": cut for name, cut in zip(_QUANTILES, cuts, strict=True)}
            values[f"{metric}_sd"] = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
        if method != "dense" and any(values[f"{metric}_median"] is not None for metric in METRICS):
            rows.append(values)
    columns = labels(cells)
    for metric, form in zip(METRICS, (".1f", ".3f", ".3f"), strict=True):
        cuts = " / ".join(f"{{{metric}_{name}:{form}}}" for name in _QUANTILES)
        columns[METRICS[metric]] = f"{cuts} ({{{metric}_sd:{form}}})"
    note = "Each cell: least / 10% / median / 90% / most over the clips (their standard deviation)."
    return [Table("spread", columns, rows, "Spread between clips", note)] if rows else []


def _diagnostics(notes: Sequence[Row]) -> Table:
    """Output error and recalled attention mass on the dense trajectory."""
    prompts = sorted({f"{note['prompt']} (seed {note['seed']})" for note in notes})
    note = (
        f"Means over the active calls of one clip: {', '.join(prompts)}. error: ||O - O_sparse|| / ||O||; mass: the "
        "share of attention that the kept blocks recall. By layer and step in results/records."
    )
    columns: dict[str, Column] = {"sparsity": "{sparsity:g}", "method": lambda row: named(row["method"])}
    columns |= {"error": "{error:.3f}", "mass": "{mass:.3f}"}
    rows = [{name: n[name] for name in ("sparsity", "method")} | n["mean"] for n in notes]
    return Table("diagnostics", columns, rows, "On the dense trajectory", note)


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in filter(ok, rows) if row[name] is not None]
