"""What a method's plans do to attention itself, on the dense trajectory: output error and recalled mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import Call, Plan, Session
from .heatmaps import Maps, maps
from .kernels.select import full_plan
from .layout import Box, Layout


@dataclass(frozen=True)
class Spot:
    """The call whose maps are drawn, the first active one where None, and its head and regions."""

    step: int | None
    layer: int | None
    head: int
    box: Box

    def at(self, call: Call) -> bool:
        """Whether this is the call."""
        return self.step in (None, call.step) and self.layer in (None, call.layer)


class Probe(Session):
    """A session that asks the method at every active call, notes how far it is off, and goes on with dense attention.

    rows: one a call: step, layer, branch, error = ||O - O_sparse|| / ||O||, and mass, the mean share of attention that
    video queries give to what the last executed plan kept, exp(LSE_kept - LSE_all). maps: those of the call at `spot`.
    """

    def __init__(self, *arguments: Any, spot: Spot | None = None):
        super().__init__(*arguments)
        self.rows: list[dict[str, Any]] = []
        self.spot = spot
        self.maps: Maps | None = None
        self._plan: Plan | None = None
        self._plain, self._lse = self.executor, torch.empty(0)
        self.executor = self._execute

    def _execute(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
        self._plan = plan
        out, self._lse = self._plain(q, k, v, plan, layout)
        return out, self._lse

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        sparse = super()._attend(q, k, v, call)
        kept = self._lse
        if self.spot and self.maps is None and self._plan and self.spot.at(call):
            self.maps = maps(q, k, self._plan, call, self.spot.box, self.spot.head)
        _, everything = self._plain(q, k, v, full_plan(call, q.shape[2]), call.layout)
        dense = self.dense(q, k, v, call.layout, self.on_host(call.text_lengths))
        mass = (kept - everything)[..., : call.layout.video].float().exp().mean()
        error = (sparse.float() - dense.float()).norm() / dense.float().norm()
        self.rows.append(
            {"step": call.step, "layer": call.layer, "branch": call.branch, "error": float(error), "mass": float(mass)}
        )
        return dense
