"""Named parts of an attention call, timed only while somebody collects them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# "estimate" is what a method's plan takes beside the parts of it that are named: pool, score, select, list.
PARTS = ("pool", "score", "select", "list", "estimate", "order", "kernel", "restore")


class _Clock:
    """Milliseconds by part; the time of an inner part is taken from the outer one."""

    def __init__(self, device: torch.device):
        self.device, self.total, self.inner = device, dict.fromkeys(PARTS, 0.0), [0.0]

    def now(self) -> float:
        return now(self.device)


def now(device: torch.device) -> float:
    """Milliseconds of a monotonic clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1000


_clock: _Clock | None = None


@contextmanager
def part(name: str) -> Iterator[None]:
    """Mark the enclosed work as `name`, one of `PARTS`; no cost and no synchronisation unless collected."""
    clock = _clock
    if clock is None:
        yield
        return
    clock.inner.append(0.0)
    start = clock.now()
    try:
        yield
    finally:
        elapsed = clock.now() - start
        clock.total[name] += elapsed - clock.inner.pop()
        clock.inner[-1] += elapsed


@contextmanager
def collect(device: torch.device) -> Iterator[dict[str, float]]:
    """Milliseconds of each part run inside; waits for the device around every part, so time nothing else meanwhile."""
    global _clock
    before, _clock = _clock, _Clock(device)
    try:
        yield _clock.total
    finally:
        _clock = before
