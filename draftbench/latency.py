"""Timing: a whole generation, one denoising step and its attention, a method and the dense run in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .attention import Watch


class Timer(Watch):
    """Marks the steps and attention calls of one generation; read `timing` when it is over.

    CUDA events on a GPU, so that nothing waits while the generation runs; a monotonic clock on a CPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[Any] = []
        self.calls: list[list[tuple[Any, Any]]] = []

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) if self.device.type == "cuda" else 1000 * (end - start)

    def step(self, index: int) -> None:
        """See `Watch.step`."""
        self.steps.append(self._mark())
        self.calls.append([])

    def finish(self) -> None:
        """See `Watch.finish`."""
        self.steps.append(self._mark())

    @contextmanager
    def attention(self) -> Iterator[None]:
        """See `Watch.attention`."""
        start = self._mark()
        try:
            yield
        finally:
            self.calls[-1].append((start, self._mark()))

    def timing(self) -> Timing:
        """The whole generation, and of each step: all of it and its attention calls together."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        step = [self._ms(a, b) for a, b in zip(self.steps, self.steps[1:], strict=False)]
        attention = [sum(self._ms(a, b) for a, b in calls) for calls in self.calls]
        return Timing([sum(step) / 1000], step, attention)


@dataclass
class Timing:
    """Seconds of whole generations; milliseconds of their steps one after the other, and of each step's attention."""

    generate_s: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    attention_ms: list[float] = field(default_factory=list)

    def add(self, other: Timing) -> None:
        """Append another generation's."""
        self.generate_s += other.generate_s
        self.step_ms += other.step_ms
        self.attention_ms += other.attention_ms

    def only(self, kept: set[int]) -> Timing:
        """The same generations with the steps of these indices alone; with all of them if `kept` is empty."""
        steps = len(self.step_ms) // len(self.generate_s)
        live = [i for i in range(len(self.step_ms)) if not kept or i % steps in kept]
        return Timing(self.generate_s, [self.step_ms[i] for i in live], [self.attention_ms[i] for i in live])

    def median(self, name: str) -> float:
        """The median of a field."""
        return statistics.median(getattr(self, name))

    def summary(self) -> dict[str, dict[str, float]]:
        """n, p20, p50 and p80 of every field."""
        return {name: quantiles(values) for name, values in vars(self).items()}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """n, p20, p50 and p80, linearly interpolated."""
    points = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return {"n": len(values), **{f"p{p}": round(x, 6) for p, x in zip((20, 50, 80), points.tolist(), strict=True)}}


def in_turn(runs: dict[str, Callable[[], Timing]], repeats: int) -> dict[str, Timing]:
    """Run each `repeats` times in turn, in the other direction every second time: a drifting clock meets all alike."""
    timings = {name: Timing() for name in runs}
    for i in range(repeats):
        for name in list(runs)[:: -1 if i % 2 else 1]:
            timings[name].add(runs[name]())
    return timings
