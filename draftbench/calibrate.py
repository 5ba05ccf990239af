"""Find what a sparsity means for a method that must be told beforehand: `python -m draftbench.calibrate method=svg2`.

Of a knob one global value for each sparsity, by bisection: every trial is a whole generation of the calibration's
prompts and seeds under the method, and counts what was executed, so the value holds on the method's own trajectory.
Of masks to choose from, one for each step, layer and head as the method's rule says: one dense generation of the same
prompts and seeds, at whose calls every mask is tried. The rows are added, as they are found, to the file that the
method reads (method.calibration; null is the one in conf/calibration).
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from . import kernels, schema
from .attention import Call, Request, Session
from .environment import alone, drop_working_folder
from .kernels import dense
from .knob import (
    FARTHEST,
    Calibrated,
    Knobbed,
    Losses,
    Option,
    OutOfReach,
    Searched,
    identity,
    name,
    read,
    settings,
)
from .records import probe, replacing

TOLERANCE = 0.003  # of the mean sparsity
ROUNDS = 20
SPARSITIES = "0.5,0.75,0.9,0.95"


def solve(
    measure: Callable[[float], float], sparsity: float, ends: tuple[float, float], known: dict[float, float]
) -> tuple[float, float]:
    """(Value, its sparsity) nearest to `sparsity`, by bisection between `ends`, (keeps the least, keeps everything).

    measure: the sparsity at a value; `known` holds what was measured so far, and grows. Raises OutOfReach.
    """

    def at(value: float) -> float:
        if value not in known:
            known[value] = measure(value)
        return known[value]

    sparse, full = ends
    known[full] = 0.0
    if at(sparse) < sparsity - FARTHEST:
        raise OutOfReach(f"sparsity={sparsity:g} is out of reach: the knob at {sparse:g} gives {at(sparse):.3f}")
    for value, found in known.items():  # the tightest bracket of what is known
        if found >= sparsity and abs(value - full) < abs(sparse - full):
            sparse = value
    for value, found in known.items():
        if found < sparsity and abs(value - sparse) < abs(full - sparse):
            full = value
    for turn in range(ROUNDS):
        best = min((sparse, full), key=lambda value: abs(at(value) - sparsity))
        if abs(at(best) - sparsity) <= TOLERANCE:
            break
        share = 0.5
        if turn % 2 == 0:  # in turn with halving: where a line between both would meet the sparsity
            share = min(0.9, max(0.1, (at(sparse) - sparsity) / max(at(sparse) - at(full), 1e-9)))
        middle = sparse + share * (full - sparse)
        sparse, full = (middle, full) if at(middle) >= sparsity else (sparse, middle)
    best = min(known, key=lambda value: abs(known[value] - sparsity))
    if abs(known[best] - sparsity) > FARTHEST:
        raise OutOfReach(f"sparsity={sparsity:g} is out of reach: the nearest is {known[best]:.3f}, at {best:g}")
    return best, known[best]


class Search(Session):
    """Dense attention that notes, at every active call, what each option of a searched method would lose."""

    def __init__(self, *arguments: Any, sparsities: Sequence[float]):
        super().__init__(*arguments)
        self.sparsities = sparsities
        self.noted: dict[tuple[int, int], list[Tensor]] = {}  # [options, heads] of each call at (step, layer)
        self.options: list[Option] = []

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        method: Any = self.method
        grid = call.layout.grid
        self.options = list({option: 0 for x in self.sparsities for option in method.options(grid, x)})
        dense = self.dense(q, k, v, call.layout, self.on_host(call.text_lengths))
        size = dense.float().square().sum((0, 1, 3))
        found = []
        for option in self.options:
            out, _ = self.executor(q, k, v, method.option_plan(option, q, call), call.layout)
            found.append((out.float() - dense.float()).square().sum((0, 1, 3)) / size)
        self.noted.setdefault((call.step, call.layer), []).append(torch.stack(found))
        return dense

    def losses(self) -> Losses:
        """The means over all calls of a step and a layer: clips and guidance branches."""
        steps, layers = (sorted(set(keys)) for keys in zip(*self.noted, strict=True))
        rows = [torch.stack([torch.stack(self.noted[s, x]).mean(0) for x in layers]) for s in steps]
        every = torch.stack(rows).double().cpu()  # [steps, layers, options, heads]
        return Losses(steps, layers, {option: every[:, :, i] for i, option in enumerate(self.options)})


def calibrate(config: DictConfig, sparsities: Sequence[float]) -> Path:
    """Solve for each sparsity on the prompts and seeds of a checked config and write the file; returns its path.

    A row is written as it is found; one that the file has for the same prompts and seeds is not sought again. Raises
    ValueError for a method without anything to calibrate, or whose knob is given, and OutOfReach for sparsities that
    cannot be met, when all others are found; before any work if that can be known of every one.
    """
    method = schema.method(config)
    if not isinstance(method, Calibrated):
        raise ValueError(f"method={name(method)} takes its sparsity as it is: there is nothing to calibrate")
    if not method.asked:
        raise ValueError(f"method.{method.knob} must be null to be calibrated, got {getattr(method, method.knob)}")
    model = schema.check_job(config)
    parts = schema.parts(config)
    parts.check(model.layers, model.steps)
    cells = [(prompt, int(seed)) for prompt in config.prompts for seed in config.seeds]
    executor = kernels.run(kernels.resolve(config.executor, model.device))
    entry: dict[str, Any] = {
        "of": identity(model, parts), "method": settings(method), "knob": method.knob,
        "prompts": list(config.prompts), "seeds": list(config.seeds),
    }  # fmt: skip
    rows = [row for old in read(method.path) if all(old[key] == entry[key] for key in entry) for row in old["rows"]]
    wanted = sorted({x for x in sparsities if not any(abs(row["sparsity"] - x) < 1e-9 for row in rows)})
    if not wanted:
        return method.path
    _try(method.path)
    method.sparsity = 0.5  # any but 0, at which nothing is asked
    beyond: list[str] = []

    def generations(make: Callable[[], Session]) -> Iterator[Session]:
        for start in range(0, len(cells), config.batch):
            prompts, seeds = zip(*cells[start : start + config.batch], strict=True)
            session = make()
            model.generate(Request(prompts, seeds, model.steps), session)
            yield session

    def measure(value: float) -> float:
        started = time.monotonic()
        found: list[float] = []
        for session in generations(lambda: Session(method.at(value), executor, dense.run, parts)):
            found += session.meter.sparsity()
        mean = sum(found) / len(found)
        took = time.monotonic() - started
        print(f"{name(method)} {method.knob}={value:.6g}: sparsity {mean:.4f} ({took:.1f} s)", file=sys.stderr)
        return mean

    def searched() -> Losses:
        session, started = Search(method, executor, dense.run, parts, sparsities=wanted), time.monotonic()
        for _ in generations(lambda: session):
            took = time.monotonic() - started
            print(f"{name(method)}: {len(session.options)} masks at every call ({took:.1f} s)", file=sys.stderr)
        if not session.noted:
            raise ValueError("every call is dense, so there is nothing to search")
        return session.losses()

    for sparsity in list(wanted):
        try:
            method.reach(model.grid, sparsity)
        except OutOfReach as error:
            wanted.remove(sparsity)
            beyond.append(str(error))
    if not wanted:
        raise OutOfReach("; ".join(beyond))
    for reason in beyond:  # before the long generations
        print(f"draftbench: left out: {reason}", file=sys.stderr)
    with alone(model.device):  # only now: what is refused, or there already, waits for no run
        if isinstance(method, Knobbed):
            known = {row["value"]: row["achieved"] for row in rows}
            find = functools.partial(solve, measure, ends=method.ends, known=known)
        elif isinstance(method, Searched):
            find = functools.partial(pick, method, searched(), model.grid)
        else:
            raise TypeError(f"{type(method).__name__} must be Knobbed or Searched")
        for sparsity in wanted:
            try:
                value, achieved = find(sparsity=sparsity)
            except OutOfReach as error:
                beyond.append(str(error))
                continue
            row = {"sparsity": sparsity, "value": value, "achieved": round(achieved, 5)}
            _write(method.path, entry | {"rows": [row]})
    if beyond:
        raise OutOfReach("; ".join(beyond))
    return method.path


def _try(path: Path) -> None:
    """Raise OSError, naming the key, for a file that cannot be written: before the generations, not after them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe(path.parent)
    except OSError as error:
        raise OSError(f"method.calibration must be a file that can be written, got {path}: {error.strerror}") from error


def pick(method: Searched, losses: Losses, grid: tuple[int, int, int], sparsity: float) -> tuple[Any, float]:
    """(What a searched method is to do, its sparsity), by its own rule; raises OutOfReach if that is not near."""
    value, density = method.pick(losses, grid, sparsity)
    if abs(1 - density - sparsity) > FARTHEST:
        raise OutOfReach(f"sparsity={sparsity:g} is out of reach: the nearest is {1 - density:.3f}")
    return value, 1 - density


def _write(path: Path, entry: dict[str, Any]) -> None:
    """Add an entry; rows of the same prompts and seeds stay, those of others go."""
    entries = read(path)
    for old in list(entries):
        if all(old[key] == entry[key] for key in ("of", "method")):
            entries.remove(old)
            if all(old[key] == entry[key] for key in ("prompts", "seeds")):
                new = {row["sparsity"] for row in entry["rows"]}
                kept = [row for row in old["rows"] if row["sparsity"] not in new]
                entry["rows"] = sorted([*kept, *entry["rows"]], key=lambda row: row["sparsity"])
    text = "# Written by python -m draftbench.calibrate; each value is the mean over the prompts and seeds beside it.\n"
    with replacing(path) as temporary:
        temporary.write_text(text + OmegaConf.to_yaml(OmegaConf.create([*entries, entry])), encoding="utf-8")


def _numbers(text: str) -> list[float]:
    """The sparsities of A,B,...; ValueError for what is none."""
    try:
        found = [float(x) for x in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < x < 1 for x in found):
        raise ValueError(f"sparsity must be numbers in (0, 1), separated by commas, got {text}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: overrides as draftbench takes them, and sparsity=A,B,...; 2 for what is wrong or not met."""
    parser = argparse.ArgumentParser("python -m draftbench.calibrate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="+", help=f"method=NAME, sparsity={SPARSITIES}, model=..., prompts=[...]")
    given = parser.parse_args(arguments).overrides
    asked = [item.partition("=")[2] for item in given if item.startswith("sparsity=")]
    try:
        sparsities = _numbers((asked or [SPARSITIES])[-1])
        with initialize_config_module("draftbench.conf", version_base="1.3"):
            config = compose("calibrate", [item for item in given if not item.startswith("sparsity=")])
        schema.check(config)
        print(calibrate(config, sparsities))
    except KeyboardInterrupt:
        print(
            "draftbench: interrupted; the rows found so far are kept, the same command finds the rest", file=sys.stderr
        )
        return 130
    except Exception as error:
        from .cli import message

        print(f"draftbench: {message(error, given, 'calibrate')}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    drop_working_folder()
    sys.exit(main())
