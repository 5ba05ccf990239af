"""Where a step's time goes by what computes it, from PyTorch's profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MATMUL = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def kernels(run: Callable[[], Any], device: torch.device, most: int = 24) -> dict[str, Any]:
    """What the device did while `run` ran, once; on a CPU its operators stand for kernels.

    Returns matmul_ms and matmul_tflop, the milliseconds of the matrix products outside of attention and their 10^12
    floating-point operations; fused_ms, those of the kernels that torch.compile made of what lies between; and kernels,
    [name, calls, ms] of the `most` that took longest.
    """
    cuda = device.type == "cuda"
    kind, activity = (DeviceType.CUDA, ProfilerActivity.CUDA) if cuda else (DeviceType.CPU, ProfilerActivity.CPU)
    with profile(activities={ProfilerActivity.CPU, activity}, record_shapes=True, with_flops=True) as found:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    spent: dict[str, list[float]] = defaultdict(list)
    matmul = flops = 0.0
    for event in found.events():
        if event.device_type == DeviceType.CPU and event.name in MATMUL and not _in_attention(event):
            matmul += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000
            flops += event.flops or 0
        if event.device_type == kind and not event.is_user_annotation:  # which spans others
            spent[event.name].append((event.device_time if cuda else event.self_cpu_time_total) / 1000)
    longest = sorted(spent, key=lambda name: -sum(spent[name]))[:most]
    return {
        "matmul_ms": matmul, "matmul_tflop": flops / 1e12,
        "fused_ms": sum(sum(times) for name, times in spent.items() if name.startswith("triton_")),
        "kernels": [[name, len(spent[name]), sum(spent[name])] for name in longest],
    }  # fmt: skip


def _in_attention(event: Any) -> bool:
    """Whether an operator runs within one of attention."""
    while event is not None:
        if event.name.startswith("draftbench::attend"):
            return True
        event = event.cpu_parent
    return False
