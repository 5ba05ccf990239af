"""Executors: kernels that run a `Plan`. Each is a module with `run` and `refuse`.

`run(q, k, v, plan, layout)` takes [B, S, H, D] and returns (output [B, S, H, D], LSE [B, H, S], natural log); rows of
text padding come out as zero with an LSE of -inf. `refuse(q, plan)` says why it can't take a request, or None.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..attention import Plan
from ..layout import Layout

NAMES = ("reference", "cpu", "triton")


def resolve(name: str, device: torch.device) -> str:
    """The executor that `name` stands for on `device`; "auto" is triton on a GPU and cpu elsewhere.

    Raises ValueError for an unknown name, RuntimeError for one that cannot run on this device.
    """
    if name == "auto":
        return "triton" if device.type == "cuda" else "cpu"
    if name not in NAMES:
        raise ValueError(f"executor must be one of auto, {', '.join(NAMES)}, got {name!r}")
    needs = {"triton": "cuda", "cpu": "cpu"}.get(name)
    if needs and device.type != needs and not (name == "triton" and _interpreted()):
        raise RuntimeError(f"executor={name} needs a {needs} device, got device={device.type}")
    return name


class run:
    """An executor by name, checked at every call: `run("cpu")(q, k, v, plan, layout)`."""

    def __init__(self, name: str):
        self.name = name
        self.module = importlib.import_module(f".{name}", __name__)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
        reason = self.module.refuse(q, plan)
        if reason:
            raise ValueError(f"executor={self.name} cannot run this plan: {reason}")
        output: tuple[Tensor, Tensor] = self.module.run(q, k, v, plan, layout)
        return output


def _interpreted() -> bool:
    import os

    return os.environ.get("TRITON_INTERPRET") == "1"
