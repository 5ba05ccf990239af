"""bench=methods: what each method's estimate costs at one attention call, beside its own kernel; see bench.py.

On q and k of pocket tiled to a shape (cases.py), a method plans as it would in the middle of a clip: its first plan,
timed once, may build masks, compile, or run k-means from nothing; what it keeps between steps is kept. Then its plan,
the kernel on that plan, the whole operation and dense attention are timed in turn, and each row has its own dense time.
A knob is set so that this call meets the sparsity, and what a search would choose is taken as if no mask lost more than
another: neither changes what an estimate costs. A time counts only if the kernel's output agrees with float32 attention
on sampled rows. A row is written as it is measured; a method that fails, or cannot reach a sparsity, has its reason.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from tqdm import tqdm

from draftbench.kernels import dense as dense_kernel
from draftbench.kernels import resolve, run

from . import records, schema
from .attention import Call, Executor, Meter, Method, Plan
from .attention_bench import RULE, TOLERANCE, Entry, check, in_turn, second_call, shapes, stopwatch, timings, unsteady
from .calibrate import solve
from .cases import SHAPES, Case, Shape, dense_case, no_executor, threads
from .contest import Contest, first_line, names
from .estimate_tables import lacks, page
from .help import CONFIGS, options
from .knob import Knobbed, Losses, OutOfReach, Searched
from .latency import quantiles
from .parts import now
from .peers import Ready

__all__ = ["ROWS", "Bench", "lacks", "listing", "page", "plan"]

ROWS = "methods.jsonl"
STEP, STEPS = 5, 20  # of the first call; the timed ones are of the step after it


def plan(config: DictConfig) -> list[tuple[str, list[str]]]:
    """Each shape asked for and its methods; ValueError or RuntimeError for what is unknown or cannot run here."""
    chosen = names("bench.methods", config.methods, methods(), methods())
    found = [(shape, chosen) for shape in shapes(config)]
    for shape, _ in found:
        resolve(config.executor, torch.device(SHAPES[shape].device))
    return found


def methods() -> list[str]:
    """The methods that drop pairs of attention: those of conf/method but the controls of the dense run."""
    made = {name: made_for(SHAPES["tiny"], name, 0.5) for name in options("method")}
    return [name for name, one in made.items() if one.sparse and one.sparsity and not one.changes_request]


def made_for(shape: Shape, name: str, sparsity: float) -> Method:
    """A method with the settings of its config and blocks of the size of draft's region on a shape."""
    block = shape.region[0] * shape.region[1]
    tile = (6, 8, 8) if block == 128 else (1, *shape.region)
    with initialize_config_module(CONFIGS, version_base="1.3"):
        geometry = [
            f"model.geometry.{key}={list(value) if isinstance(value, tuple) else value}".replace(" ", "")
            for key, value in (("region", shape.region), ("tile", tile), ("block", block))
        ]
        config = compose("config", [f"method={name}", f"sparsity={sparsity}", *geometry])
    return schema.method(config)


def listing() -> list[str]:
    """Lines for --help: the methods."""
    return [f"Shapes: those of bench=attention. Methods: {', '.join(methods())}"]


class Bench(Contest):
    """See `Contest`."""

    def run(self, jobs: list[tuple[str, list[str]]]) -> None:
        """Every shape, sparsity and method in turn."""
        for shape, chosen in jobs:
            self.requested = {
                "shapes": [name for name, _ in jobs], "methods": chosen, "sparsities": list(self.config.sparsities),
                "timings": RULE, "executor": self.config.executor,
            }  # fmt: skip
            with torch.no_grad(), threads(SHAPES[shape].threads):
                case = dense_case(SHAPES[shape], self.config.prompt, int(self.config.seed))
                wanted = [(float(sparsity), name) for sparsity in self.config.sparsities for name in chosen]
                for sparsity, name in tqdm(wanted, desc=shape, unit=" rows"):
                    self.write(self.measured(shape, case, name, sparsity))

    def measured(self, name: str, case: Case, method: str, sparsity: float) -> dict[str, Any]:
        """The row of a method at a sparsity."""
        shape = case.shape
        row = records.new(
            kind="methods", run=self.run_id, shape=name, shape_settings={**asdict(shape), "dtype": str(shape.dtype)},
            source={"prompt": self.config.prompt, "seed": int(self.config.seed)}, method=method, sparsity=sparsity,
            budget_s=float(self.config.budget_s), tolerance=TOLERANCE[shape.dtype], requested=self.requested,
            **self.environment(shape.device),
        )  # fmt: skip
        keys = ("shape", "shape_settings", "source", "method", "sparsity", "device", "versions", "commit")
        row["cell_id"] = records.cell_id({key: row[key] for key in keys} | {"executor": self.config.executor})
        try:
            self.time(Midway(case, made_for(shape, method, sparsity), self.config.executor), row)
            row["status"] = "ok"
        except OutOfReach as error:
            row["status"] = f"absent: {error}"
        except Exception as error:  # the other methods go on
            row["status"] = f"failed: {first_line(error)}"
        if row["status"] != "ok":
            row |= dict.fromkeys(("ms", "plan_ms", "kernel_ms"))
        return row

    def time(self, one: Midway, row: dict[str, Any]) -> None:
        """Time a method that is ready; raises what went wrong."""
        case, shape = one.case, one.case.shape
        row["first_plan_ms"], row["method_settings"] = one.first_ms, asdict(one.method)
        made = one.plan()
        ready = Ready(lambda: one.execute(case.q, case.k, case.v, made, shape.layout), lambda: made,
                      lambda result: result[0], lambda result: result[1])  # fmt: skip
        kernel = Entry(ready, row)
        kernel.checked = check(ready, case, row)
        lengths = [shape.text]
        whole = Ready(one.attend, lambda: made)
        row["peak_memory_gib"] = second_call(whole, shape)[1]
        runs = {
            "ms": stopwatch(one.attend, shape), "plan_ms": stopwatch(one.plan, shape),
            "kernel_ms": stopwatch(kernel.run, shape),
            "dense": stopwatch(lambda: dense_kernel.run(case.q, case.k, case.v, shape.layout, lengths), shape),
        }  # fmt: skip
        counts = [timings(float(self.config.budget_s), once()) for once in runs.values()]
        found = dict(zip(runs, in_turn(list(runs.values()), counts), strict=True))
        if problem := unsteady(kernel):
            raise RuntimeError(problem)
        for name, times in found.items():
            if isinstance(times, str):
                raise RuntimeError(f"{name}: {times}")
            row[name] = quantiles(times)
        row["dense"] = {"contestant": dense_kernel.name(case.q.device, case.q.dtype), "ms": row["dense"]["p50"]}
        row["executors_run"] = sorted(one.execute.ran)
        row["share"] = row["plan_ms"]["p50"] / row["kernel_ms"]["p50"]
        row["speedup"] = row["dense"]["ms"] / row["ms"]["p50"]


class Midway:
    """A method in the middle of a clip of a case: what its first call left, and its sparsity met; raises OutOfReach."""

    def __init__(self, case: Case, method: Method, executor: str = "auto"):
        self.case, self.method, self.state = case, method, dict[str, Any]()
        self.execute = run(resolve(executor, case.q.device))
        q, k, v = case.q, case.k, case.v
        if isinstance(method, Searched):
            grid, options = case.shape.grid, method.options(case.shape.grid, method.sparsity)
            alike = {option: torch.zeros(1, 1, case.shape.heads, dtype=torch.float64) for option in options}
            self.method = method.at(method.pick(Losses([0], [0], alike), grid, method.sparsity)[0])
        elif isinstance(method, Knobbed):
            self.method = method.at(method.ends[0])
        start = now(q.device)
        self.method.plan(q, k, v, self.call(STEP, self.state, no_executor))
        self.first_ms = now(q.device) - start
        if isinstance(method, Knobbed):
            self.method = method.at(solve(self.dropped, method.sparsity, method.ends, {})[0])
        self.method.attend(q, k, v, self.call(STEP, self.state, self.execute))

    def dropped(self, value: float) -> float:
        """The sparsity of this call at a value of the method's knob."""
        assert isinstance(self.method, Knobbed)
        case, call = self.case, self.call(STEP + 1, dict(self.state), no_executor)
        pairs = case.pairs(self.method.at(value).plan(case.q, case.k, case.v, call))
        return 1 - pairs["video"] / pairs["all_video"]

    def plan(self) -> Plan:
        """The plan of the step after the first."""
        call = self.call(STEP + 1, dict(self.state), no_executor)
        return self.method.plan(self.case.q, self.case.k, self.case.v, call)

    def attend(self) -> Any:
        """The whole operation of that step."""
        call = self.call(STEP + 1, dict(self.state), self.execute)
        return self.method.attend(self.case.q, self.case.k, self.case.v, call)

    def call(self, step: int, state: dict[str, Any], executor: Executor) -> Call:
        """A call at a step, as an adapter would make it; nothing is counted."""
        shape = self.case.shape
        lengths = torch.full((1,), shape.text, device=self.case.q.device)
        meter = Meter(counting=False)
        return Call(shape.layout, step, STEPS, 0, "cond", lengths, (0,), 0, state, executor, meter, (STEP, STEPS))
