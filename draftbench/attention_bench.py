"""bench=attention: one attention call, our operation against the kernels of others; see bench.py.

Contestants of one shape are timed in turn in one process, CUDA events on a GPU, and each row divides by the dense
kernel of the lowest median, timed again among them. A timing counts only if the output agreed with float32 attention on
sampled rows, the last timed output with that one in every row, and the output of a kernel with that of another on the
same lists. A row has budget_s / (time of one call) timings, at least `LEAST` (`LEAST_SLOW` if a call takes `SLOW_MS` or
more) and at most `MOST`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from . import parts, records
from .attention_tables import lacks, page
from .cases import SHAPES, Case, Shape, dense_case, difference, sampled_error, sparse_cases, threads
from .contest import Contest, first_line, names, runnable
from .latency import quantiles
from .models.pocket.prompts import tokens
from .peers import Absent, Contestant, Ready, contestants

__all__ = ["ROWS", "Bench", "lacks", "listing", "page", "plan"]

ROWS = "attention.jsonl"
LEAST, LEAST_SLOW, MOST = 20, 5, 100  # timings a row
SLOW_MS = 100.0
AHEAD = 4_000_000  # cycles of a GPU, about 2 ms, in which the host can issue what a call launches
RULE = (
    f"{LEAST} to {MOST} timings, {LEAST_SLOW} to {MOST} of calls of {SLOW_MS:g} ms or more; a GPU spins for "
    f"{AHEAD} cycles before each"
)
TOLERANCE = {torch.bfloat16: 5e-3, torch.float32: 1e-4}
LSE_TOLERANCE = 1e-2  # nats


def plan(config: DictConfig) -> list[tuple[str, list[Contestant]]]:
    """Each shape asked for and its contestants.

    ValueError for an unknown one, what this machine cannot run, a contestant that is not for the device of a shape, or
    a shape without a dense one.
    """
    known, jobs = contestants(), []
    for shape in shapes(config):
        fit = _fit(shape, known)
        chosen = names("bench.contestants", config.contestants, list(known), list(fit))
        if wrong := [name for name in config.contestants if name not in (*fit, "all")]:
            raise ValueError(
                f"bench.contestants must be of all, {', '.join(fit)} for the shape {shape}, got {wrong[0]!r}"
            )
        dense = [name for name, contestant in fit.items() if contestant.kind == "dense"]
        if not set(dense) & set(chosen):
            allowed = f"have a dense one to compare with for the shape {shape} ({', '.join(dense)}; or all)"
            raise ValueError(f"bench.contestants must {allowed}, got {', '.join(config.contestants)}")
        jobs.append((shape, [known[name] for name in chosen]))
    return jobs


def shapes(config: DictConfig) -> list[str]:
    """The shapes asked for, and a look at the prompt; ValueError for what is unknown or cannot run on this machine."""
    try:
        tokens(config.prompt)
    except ValueError as error:
        raise ValueError(f"bench.prompt: {error}") from error
    return runnable("bench.shapes", config.shapes, SHAPES)


def _fit(shape: str, known: dict[str, Contestant]) -> dict[str, Contestant]:
    """Those for the device of a shape."""
    return {name: one for name, one in known.items() if one.device in (None, SHAPES[shape].device)}


@dataclass
class Entry:
    """A contestant on a case: what is timed, its row so far, the milliseconds of one call, the output [1, S, H, D] that
    was checked, and what its last call returned."""

    ready: Ready
    row: dict[str, Any]
    once_ms: float = 0.0
    checked: Tensor | None = None
    last: Any = None

    def run(self) -> None:
        """One call; what it returns is kept, what the call before returned is given up first."""
        self.last = None
        self.last = self.ready.run()


class Bench(Contest):
    """See `Contest`."""

    def run(self, jobs: list[tuple[str, list[Contestant]]]) -> None:
        """Every shape in turn, with its contestants."""
        for name, chosen in jobs:
            self.requested = {
                "shapes": [shape for shape, _ in jobs], "sparsities": list(self.config.sparsities),
                "masks": list(self.config.masks), "contestants": [one.name for one in chosen], "timings": RULE,
                "others": [one for one in _fit(name, contestants()) if one not in {one.name for one in chosen}],
            }  # fmt: skip
            with torch.no_grad(), threads(SHAPES[name].threads):
                self.shape(name, SHAPES[name], chosen)

    def shape(self, name: str, shape: Shape, chosen: list[Contestant]) -> None:
        """The dense kernels, then each sparsity and mask with the fastest of them among its contestants."""
        everything = dense_case(shape, self.config.prompt, int(self.config.seed))
        bar = tqdm(desc=name, unit=" rows")
        dense = [self.enter(name, contestant, everything) for contestant in chosen if contestant.takes(everything)]
        rows = self.time(shape, dense, None, bar)
        best = min((row for row in rows if row["status"] == "ok"), key=lambda row: row["ms"]["p50"], default=None)
        anchor = next((entry for entry in dense if best and entry.row["contestant"] == best["contestant"]), None)
        del dense  # and the outputs that the others hold
        for sparsity in self.config.sparsities:
            masks = self.config.masks if sparsity else ["captured"]  # all keep everything at 0
            for case in sparse_cases(everything, float(sparsity), masks, int(self.config.seed)):
                # The list is not kept: its copies of q, k and v would lie beside those of the next case.
                self.time(shape, [self.enter(name, one, case) for one in chosen if one.takes(case)], anchor, bar)
        bar.close()

    def enter(self, name: str, contestant: Contestant, case: Case) -> Entry:
        """Prepare a contestant, run it once and check what it computed; its row says what went wrong if anything."""
        shape = case.shape
        row = records.new(
            kind="attention", run=self.run_id, shape=name, shape_settings={**asdict(shape), "dtype": str(shape.dtype)},
            source={"prompt": self.config.prompt, "seed": int(self.config.seed)}, mask=case.mask,
            sparsity=case.sparsity, contestant=contestant.name, contestant_kind=contestant.kind,
            budget_s=float(self.config.budget_s), tolerance=TOLERANCE[shape.dtype], requested=self.requested,
            plan_ms=None, **self.environment(shape.device),
        )  # fmt: skip
        names = ("shape", "shape_settings", "source", "mask", "sparsity", "contestant", "device", "versions", "commit")
        row["cell_id"] = records.cell_id({key: row[key] for key in names})
        entry = Entry(Ready(lambda: None, lambda: case.plan), row)
        try:
            entry.ready = contestant.make(case)
            entry.checked = check(entry.ready, case, row)
            entry.once_ms, row["peak_memory_gib"] = second_call(entry.ready, shape)
            row["status"] = "ok"
        except Absent as reason:
            row["status"] = f"absent: {reason}"
        except Exception as error:  # whatever a package of others raises is a reason
            row["status"] = f"failed: {first_line(error)}"
        return entry

    def time(self, shape: Shape, entries: list[Entry], anchor: Entry | None, bar: tqdm) -> list[dict[str, Any]]:
        """Time what has passed its check, in turn, and write the rows; dense ones compare with their own fastest."""
        running = [entry for entry in entries if entry.row["status"] == "ok"]
        turns = [*running, *([anchor] if anchor and running else [])]
        selecting = [entry for entry in running if entry.ready.select]
        runs = [stopwatch(entry.run, shape) for entry in turns]
        runs += [stopwatch(entry.ready.select, shape) for entry in selecting if entry.ready.select]
        counts = [timings(float(self.config.budget_s), entry.once_ms) for entry in [*turns, *selecting]]
        times = in_turn(runs, counts)
        medians: dict[str, float] = {}
        problems: dict[str, str] = {}
        for entry, found in zip(turns, times, strict=False):
            name = entry.row["contestant"]
            result: dict[str, Any]
            problem = found if isinstance(found, str) else unsteady(entry)
            if problem or isinstance(found, str):
                problems[name], result = str(problem), {"status": f"failed: {problem}"}
            else:
                result = {"ms": quantiles(found)}
                medians[name] = result["ms"]["p50"]
            if entry is not anchor:  # whose row is written
                entry.row |= result
        try:
            problems |= disagreeing([entry for entry in running if entry.row["contestant"] in medians])
            for entry, found in zip(selecting, times[len(turns) :], strict=True):
                if isinstance(found, str):
                    problems.setdefault(entry.row["contestant"], f"its selection alone: {found}")
                else:
                    entry.row["plan_ms"] = quantiles(found)
            dense = [entry.row["contestant"] for entry in turns if entry.row["contestant_kind"] == "dense"]
            timed = [name for name in dense if name not in problems]
            best = min(timed, key=lambda name: medians[name], default=None)
            against: dict[str, Any] = {"contestant": best, "ms": medians[best]} if best else {
                "contestant": dense[0] if dense else None, "ms": None,
                "failed": problems[dense[0]] if dense else "no dense kernel has a time",
            }  # fmt: skip
            for entry in running:
                if reason := problems.get(entry.row["contestant"]):
                    entry.row |= {"status": f"failed: {reason}", "ms": None, "plan_ms": None}
                else:
                    entry.row["dense"] = against
                    rate(entry.row, shape)
            for entry in running:
                if entry.row["status"] == "ok" and entry.row["contestant_kind"] == "whole":
                    entry.row |= parts_of(entry.ready, shape)
        finally:  # whatever stops the comparisons and the passes for the parts, the times are written
            for entry in entries:
                self.write(entry.row)
                bar.update()
        return [entry.row for entry in entries]


def check(ready: Ready, case: Case, row: dict[str, Any]) -> Tensor:
    """Run once into memory full of NaN, and note the error and the pairs of the plan that was carried out.

    Returns the output [1, S, H, D]. Raises ValueError if it is off by more than the row's tolerance, in all or in its
    worst sampled row, or the LSE by more than `LSE_TOLERANCE`.
    """
    poison(case.q)
    result = ready.run()
    carried_out = ready.plan()
    pairs = case.pairs(carried_out)
    row["kept_pairs"], row["all_pairs"] = pairs["kept"], pairs["all"]
    row["density"] = pairs["kept"] / pairs["all"]
    row["sparsity_achieved"] = 1 - pairs["video"] / pairs["all_video"]
    out = ready.output(result)
    error = sampled_error(out, case, carried_out, seed=0, lse=ready.lse(result) if ready.lse else None)
    row["error"] = {name: value for name, value in error.items() if math.isfinite(value)}  # what JSON can hold
    if not within(error, row["tolerance"]):
        raise ValueError(
            f"wrong output: relative error {error['all']:.2g} over {error['rows']} sampled rows, "
            f"{error['worst']:.2g} in the worst, above {row['tolerance']:g}"
        )
    if not error.get("lse", 0) <= LSE_TOLERANCE:
        raise ValueError(f"wrong LSE: off by {error['lse']:.2g} in a sampled row, above {LSE_TOLERANCE:g}")
    return out


def within(error: dict[str, float], tolerance: float) -> bool:
    """Whether a relative error is at most the tolerance, in all and in the worst row; NaN is not."""
    return error["all"] <= tolerance and error["worst"] <= tolerance


def unsteady(entry: Entry) -> str | None:
    """Why the last timed output does not count as the checked one, or None if it does."""
    assert entry.checked is not None
    try:
        error = difference(entry.ready.output(entry.last), entry.checked)
    except Exception as reason:  # an error of the device may be told as late as here
        return first_line(reason)
    if not within(error, entry.row["tolerance"]):
        return (
            f"the last timed output is not the checked one: relative difference {error['all']:.2g}, "
            f"{error['worst']:.2g} in the worst row, above {entry.row['tolerance']:g}"
        )
    return None


def disagreeing(entries: Sequence[Entry]) -> dict[str, str]:
    """Contestants whose whole output agrees with that of no other on the same plan, and the reason.

    Dense ones and kernels that are given the case's lists have the same plan; a contestant alone has none to ask.
    """
    same = [entry for entry in entries if entry.row["contestant_kind"] in ("dense", "kernel")]
    off: dict[str, dict[str, float]] = {entry.row["contestant"]: {} for entry in same}
    for one, other in itertools.combinations(same, 2):
        assert one.checked is not None and other.checked is not None
        a, b = one.row["contestant"], other.row["contestant"]
        off[a][b] = off[b][a] = difference(one.checked, other.checked)["all"]
    return {
        name: "its output differs from all others on the same plan, relative: "
        + ", ".join(f"{other} {value:.2g}" for other, value in others.items())
        for name, others in off.items()
        if others and not any(value <= same[0].row["tolerance"] for value in others.values())
    }


def poison(like: Tensor, copies: int = 4) -> None:
    """Leave NaN in the memory that the next tensors of this size are likely to get, so that what a kernel does not
    write is seen."""
    if like.device.type == "cuda":
        torch.cuda.empty_cache()  # or an earlier, right result might be what it finds
    blocks = [torch.full_like(like, torch.nan) for _ in range(copies)]
    del blocks


def second_call(ready: Ready, shape: Shape) -> tuple[float, float | None]:
    """Milliseconds of a call that compiles nothing any more, and the GiB it needs beside what was there (GPU only).

    The lesser of two, for FlexAttention's second call may still compile.
    """
    cuda = shape.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    ms = min(stopwatch(ready.run, shape)() for _ in range(2))
    return ms, (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None


def in_turn(runs: Sequence[Callable[[], float]], counts: Sequence[int]) -> list[list[float] | str]:
    """Times of each run, as many as its count, in rounds over all of them in alternating direction.

    A run of fewer times is spread over the rounds; one that raises has its reason instead of times. A round of all of
    them, untimed, goes before: the first call pays for memory that the later ones find allocated.
    """
    rounds = max(counts, default=0)
    times: list[list[float] | str] = [[] for _ in runs]
    for i in range(-1, rounds):
        due = [j for j, n in enumerate(counts) if i < 0 or (i + 1) * n // rounds > i * n // rounds]
        for j in due[:: -1 if i % 2 else 1]:
            found = times[j]
            if isinstance(found, list):
                try:
                    ms = runs[j]()
                    if i >= 0:
                        found.append(ms)
                except Exception as error:
                    times[j] = first_line(error)
    return times


def timings(budget_s: float, once_ms: float) -> int:
    """How many timings a row has, see the module's text; once_ms: of one call."""
    least = LEAST if once_ms < SLOW_MS else LEAST_SLOW
    return int(min(max(1000 * budget_s / max(once_ms, 1e-3), least), MOST))


def rate(row: dict[str, Any], shape: Shape) -> None:
    """TFLOP/s of the kept pairs, and against the dense kernel, if it has a time: the speed-up and the share of the
    ideal, which is the dense time times the share of pairs kept, over the time."""
    ms = row["ms"]["p50"]
    row["tflops"] = 4 * shape.dim * row["kept_pairs"] / ms / 1e9
    if row["dense"]["ms"] is not None:
        row["speedup"] = row["dense"]["ms"] / ms
        row["ideal_share"] = row["dense"]["ms"] * row["kept_pairs"] / row["all_pairs"] / ms


def parts_of(ready: Ready, shape: Shape) -> dict[str, Any]:
    """The field parts_ms of a row; parts_failed, with the reason, if a pass for it raises."""
    try:
        return {"parts_ms": parts_ms(ready, shape)}
    except Exception as error:
        return {"parts_failed": first_line(error)}


def parts_ms(ready: Ready, shape: Shape, repeats: int = 3) -> dict[str, float]:
    """Median milliseconds by part, in passes of their own that wait around every part; "rest" is what none covers."""
    found = []
    device = torch.device(shape.device)
    for _ in range(repeats):
        with parts.collect(device) as collected:
            start = parts.now(device)
            ready.run()
            total = parts.now(device) - start
        found.append({**collected, "rest": total - sum(collected.values())})
    return {name: quantiles([one[name] for one in found])["p50"] for name in found[0]}


def stopwatch(run: Callable[[], Any], shape: Shape) -> Callable[[], float]:
    """`run`, timed, in milliseconds: by CUDA events on a GPU, by the clock on a CPU.

    The GPU spins first, so that the host is ahead of it, as within a model; a call that waits for the GPU loses that.
    """

    def timed() -> float:
        if shape.device != "cuda":
            start = time.perf_counter()
            run()
            return 1000 * (time.perf_counter() - start)
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))

    return timed


def listing() -> list[str]:
    """Lines for --help: the shapes and the contestants."""
    found = [f"  {name:<18}{contestant.about}" for name, contestant in contestants().items()]
    return [f"Shapes: {', '.join(SHAPES)}", "", "Contestants", *found]
