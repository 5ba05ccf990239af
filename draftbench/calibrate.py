"""Find the value of a method's own knob at which it reaches a sparsity: `python -m draftbench.calibrate method=svg2`.

One global value for each sparsity, by bisection: every trial is a whole generation of the calibration's prompts and
seeds under the method, and counts what was executed, so the value holds on the method's own trajectory. The rows are
added to the file that the method reads (method.calibration; null is the one in conf/calibration).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from . import kernels, schema
from .attention import Request, Session
from .kernels import dense
from .knob import Knobbed, identity, name, read, settings
from .records import replacing

TOLERANCE = 0.002  # of the mean sparsity
FARTHEST = 0.01  # a value that misses by more is no calibration
ROUNDS = 20
SPARSITIES = "0.5,0.75,0.9,0.95"


class OutOfReach(ValueError):
    """No value of the knob comes near to the sparsity."""


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


def calibrate(config: DictConfig, sparsities: Sequence[float]) -> Path:
    """Solve for each sparsity on the prompts and seeds of a checked config and write the file; returns its path.

    Raises ValueError for a method without such a knob, or whose knob is given, and for a sparsity out of reach.
    """
    method = schema.method(config)
    if not isinstance(method, Knobbed):
        raise ValueError(f"method={name(method)} takes its sparsity as it is: there is nothing to calibrate")
    if not method.asked:
        raise ValueError(f"method.{method.knob} must be null to be calibrated, got {method.value}")
    model = schema.check_job(config)
    parts = schema.parts(config)
    cells = [(prompt, int(seed)) for prompt in config.prompts for seed in config.seeds]
    executor = kernels.run(kernels.resolve(config.executor, model.device))

    def measure(value: float) -> float:
        found: list[float] = []
        for start in range(0, len(cells), config.batch):
            prompts, seeds = zip(*cells[start : start + config.batch], strict=True)
            session = Session(method.at(value), executor, dense.run, parts)
            model.generate(Request(prompts, seeds, model.steps), session)
            found += session.meter.sparsity()
        mean = sum(found) / len(found)
        print(f"{name(method)} {method.knob}={value:.6g}: sparsity {mean:.4f}", file=sys.stderr)
        return mean

    method.sparsity = 0.5  # any but 0, at which no knob is asked
    known: dict[float, float] = {}
    rows = []
    for sparsity in sorted(sparsities):
        try:
            value, achieved = solve(measure, sparsity, method.ends, known)
        except OutOfReach as error:
            print(f"draftbench: {name(method)}: {error}; no row for it", file=sys.stderr)
            continue
        rows.append({"sparsity": sparsity, "value": value, "achieved": round(achieved, 5)})
    entry = {
        "of": identity(model, parts), "method": settings(method), "knob": method.knob,
        "prompts": list(config.prompts), "seeds": list(config.seeds), "rows": rows,
    }  # fmt: skip
    _write(method.path, entry)
    return method.path


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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: overrides as draftbench takes them, and sparsity=A,B,...; 2 for what is wrong."""
    parser = argparse.ArgumentParser("python -m draftbench.calibrate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="+", help=f"method=NAME, sparsity={SPARSITIES}, model=..., prompts=[...]")
    given = parser.parse_args(arguments).overrides
    asked = [item.partition("=")[2] for item in given if item.startswith("sparsity=")]
    try:
        sparsities = [float(x) for x in (asked or [SPARSITIES])[-1].split(",")]
        if not all(0 < x < 1 for x in sparsities):
            raise ValueError(f"sparsity must be numbers in (0, 1), got {asked[-1]}")
        with initialize_config_module("draftbench.conf", version_base="1.3"):
            config = compose("calibrate", [item for item in given if not item.startswith("sparsity=")])
        schema.check(config)
        print(calibrate(config, sparsities))
    except Exception as error:
        from .cli import message

        print(f"draftbench: {message(error, given, 'calibrate')}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
