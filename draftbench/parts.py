"""Named parts of an attention call, timed only while somebody collects them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PARTS = ("estimate", "order", "kernel", "restore")

_collecting: dict[str, float] | None = None
_device: torch.device = torch.device("cpu")


@contextmanager
def part(name: str) -> Iterator[None]:
    """Mark the enclosed work as `name`, one of `PARTS`; free of cost and of synchronisation unless collected."""
    if _collecting is None:
        yield
        return
    start = _now()
    yield
    _collecting[name] += (_now() - start) * 1000


@contextmanager
def collect(device: torch.device) -> Iterator[dict[str, float]]:
    """Milliseconds of each part run inside; waits for the device around every part, so time nothing else meanwhile."""
    global _collecting, _device
    before, before_device = _collecting, _device
    _collecting, _device = defaultdict(float), device
    try:
        yield _collecting
    finally:
        _collecting, _device = before, before_device


def _now() -> float:
    if _device.type == "cuda":
        torch.cuda.synchronize(_device)
    return time.perf_counter()
