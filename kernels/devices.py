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


def needs_triton(least: tuple[int, int] = (0, 0)) -> str | None:
    """What is missing where Triton is not installed, or is older than `least`; None where it will do."""
    found = triton_version()
    if found is None:
        return "it needs Triton: pip install 'draftbench[triton]'"
    if found < least:
        return f"it needs Triton {'.'.join(map(str, least))} or newer, got {'.'.join(map(str, found))}"
    return None


def not_hopper(device: torch.device) -> str | None:
    """Why a kernel for Hopper GPUs cannot run on a device, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, got device={device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"it needs a Hopper GPU (compute capability 9.x), got {major}.{minor}"
    return None


def not_for_tensor_cores(q: Tensor, head_dims: tuple[int, ...]) -> str | None:
    """Why a kernel for half precision and these head dims does not take q [B, S, H, D], or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype must be bfloat16 or float16, got {q.dtype}"
    if q.shape[-1] not in head_dims:
        return f"head_dim must be one of {', '.join(map(str, head_dims))}, got {q.shape[-1]}"
    return None


def side_by_side(x: Tensor) -> bool:
    """Whether the copy engine can read x [B, S, H, D] where it lies: channels together, steps of 16 bytes."""
    steps = [x.stride(0) if len(x) > 1 else 0, x.stride(1), x.stride(2), x.storage_offset()]
    return x.stride(3) == 1 and not any(step * x.element_size() % 16 for step in steps)


def product(a: Tensor, b: Tensor) -> Tensor:
    """A batched product [N, n, K] @ [N, K, m] in float32: half-precision operands on a GPU are read as they are."""
    if a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
