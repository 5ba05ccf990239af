"""Where a step's time goes by what computes it, from PyTorch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MATMUL = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
# Matrix products outside of attention; the attention operators, all that they launch; the kernels that torch.compile
# made of what lies between; and the rest, such as what a block that is not compiled calls one by one.
KINDS = ("matmul", "attention", "fused", "other")


def by_kind(run: Callable[[], Any], device: torch.device, top: int = 24) -> dict[str, Any]:
    """Milliseconds of the device (on a CPU of its operators) in each of `KINDS` while `run` runs, once.

    Also matmul_tflop, the 10^12 floating-point operations of the matrix products, and kernels, the `top` kernels by
    their time: [name, calls, ms]. What the device does while nothing is launched on it is in none of them.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True, with_flops=True) as found:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    spent, flops = dict.fromkeys(KINDS, 0.0), 0
    kernels: dict[str, list[float]] = {}
    for event in found.events():
        own = event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU)
        if own:
            times = kernels.setdefault(event.name, [])
            times.append(event.device_time if cuda else event.self_cpu_time_total)
        if event.device_type != DeviceType.CPU:
            continue
        kind = _kind(event)
        spent[kind] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000
        flops += (event.flops or 0) if kind == "matmul" else 0
    whole = {name: sum(times) / 1000 for name, times in kernels.items()}
    spent["other"] += sum(whole.values()) - sum(spent.values())  # launched outside of any operator
    longest = Counter(whole).most_common(top)
    return {f"{kind}_ms": ms for kind, ms in spent.items()} | {
        "matmul_tflop": flops / 1e12, "kernels": [[name, len(kernels[name]), ms] for name, ms in longest],
    }  # fmt: skip


def _kind(event: Any) -> str:
    """Which of `KINDS` an operator's own time belongs to: attention's if it runs within it."""
    outer = event
    while outer is not None:
        if outer.name.startswith("draftbench::attend"):
            return "attention"
        outer = outer.cpu_parent
    if event.name in MATMUL:
        return "matmul"
    return "fused" if event.name.startswith("triton_") else "other"
