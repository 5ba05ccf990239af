"""Executors: kernels that run a `Plan`. Each is a module with `run` and `refuse`.

`run(q, k, v, plan, layout)` takes [B, S, H, D] and returns (output [B, S, H, D], LSE [B, H, S], natural log); rows of
text padding come out as zero with an LSE of -inf. `refuse(q, plan)` says why it can't take a request, or None. Each is
called as a PyTorch operator (operators.py).
"""

from __future__ import annotations

import importlib
import os

# No relative imports: transformers looks for a package `kernels`, which is this folder for a `python` in the repo root.
import torch
from draftbench.kernels import fa4, gluon, operators
from draftbench.kernels.devices import needs_triton
from draftbench.kernels.operators import NAMES
from torch import Tensor

from draftbench.attention import Plan
from draftbench.layout import Layout


def resolve(name: str, device: torch.device) -> str:
    """The executor that `name` stands for on `device`.

    "auto" is cpu on a CPU; on a GPU triton, behind gluon and fa4 where they can run: "gluon+fa4+triton" runs a plan on
    the first of them that takes it. Raises ValueError for an unknown name, RuntimeError, saying what it needs, for one
    that cannot run on this device.
    """
    if name == "auto":
        if device.type != "cuda":
            return "cpu"
        if reason := unavailable("triton", device):
            raise RuntimeError(f"executor=auto cannot run here: {reason}")
        return "+".join(part for part in ("gluon", "fa4", "triton") if not unavailable(part, device))
    if name not in NAMES:
        raise ValueError(f"executor must be one of auto, {', '.join(NAMES)}, got {name!r}")
    reason = unavailable(name, device)
    if reason:
        raise RuntimeError(f"executor={name} cannot run here: {reason}")
    return name


def unavailable(name: str, device: torch.device) -> str | None:
    """Why an executor cannot run on a device at all, or None; imports no kernel."""
    if name in ("fa4", "gluon"):
        return (fa4 if name == "fa4" else gluon).unavailable(device)
    if name == "cpu" and device.type != "cpu":
        return f"it needs a CPU, got device={device.type}"
    if name == "triton":
        if reason := needs_triton():
            return reason
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it needs a CUDA device, got device={device.type}"
    return None


class run:
    """An executor by name, checked at every call: `run("cpu")(q, k, v, plan, layout)`.

    Names joined by "+" are tried in that order, and the first that takes a plan runs it; `ran` holds those that did.
    """

    def __init__(self, name: str):
        self.name = name
        self.modules = {part: importlib.import_module(f".{part}", __name__) for part in name.split("+")}
        self.ran: set[str] = set()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
        reasons = []
        for name, module in self.modules.items():
            reason = module.refuse(q, plan)
            if reason is None:
                self.ran.add(name)
                operator = getattr(torch.ops.draftbench, name)
                output: tuple[Tensor, Tensor] = operator(q, k, v, *operators.flatten(plan, layout))
                return output
            reasons.append(reason)
        raise ValueError(f"executor={self.name} cannot run this plan: {'; '.join(reasons)}")
