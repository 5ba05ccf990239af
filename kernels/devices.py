"""What the kernels ask of the machine."""

from __future__ import annotations

import functools
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the GPU of x the current one, since that is where Triton launches; nothing for a tensor on a CPU."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@functools.cache
def triton_version() -> tuple[int, ...] | None:
    """Triton's version (major, minor), None where it is not installed; it is not imported, since that takes a second.

    A build under another name, whose version is not known, counts as (0, 0).
    """
    if not importlib.util.find_spec("triton"):
        return None
    try:
        return tuple(map(int, version("triton").split(".")[:2]))
    except PackageNotFoundError:
        return (0, 0)
