"""Re-ttention (Chen et al., 2025, arXiv 2505.22918; github.com/cccrrrccc/Re-ttention).

A static window of places in a frame, repeated in every frame; text stays dense. Every `period` steps one step is full:
it stores, of each row, rho, the share of the softmax's denominator that the window holds, and the residual R, which is
what the rest adds to the output. The steps between give rho * (output over the window) + R, with rho grown by .04
after each of them, to 1 at most.
Full steps are run as two plans, the window and what it leaves out, and put together by their log-sum-exps: every pair
once, as dense attention, and rho and R for nothing. They are executed and counted as what they are.
Deviations: the window is one of block diagonals over the tokens in patch-major order (place * frames + frame), whose
density is nearest to what it should be; the first active step is full, since a dense step before it tells a method
nothing, and so is the first of a second transformer, as Wan 2.2 has, whose attention is another.

Between steps each layer and guidance branch holds R, as large as the attention's output, and one float32 a row and
head: at HunyuanVideo's 768p shape .79 GB a layer in bfloat16, 47 GB for its 60.

A record's `parts_ms` are those of a first step, and so of a full one.

`sparsity` counts the full steps too, as the records do: with the paper's period of 5 no window drops more than 80% of
the pairs. So the period is the least from `period` on that leaves the window its share, 1/32 (the paper's 96.9%) or
more; what no period leaves is refused.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from draftbench.methods.svg import band_mask, patch_major
from torch import Tensor

from ..attention import Call, DenseParts, Method, Plan, spans
from ..hints import Count
from ..kernels.select import complement, plan_from_mask
from ..layout import Index, even_sizes
from ..parts import part

if TYPE_CHECKING:
    from ..models import Model

THINNEST = 1 / 32  # a window's density


@dataclass
class ReTtention(Method):
    """window_sparsity: the original's knob, the share that the window drops (.969 there); if given, sparsity must
    be 0 and the period is as it is. period: steps from one full one to the next, at least; growth: of rho, a step;
    block: tokens."""

    window_sparsity: Annotated[float | None, "null or a number in [0, 1)", lambda x: 0 <= x < 1] = None
    period: Count = 5
    growth: Annotated[float, "a number of at least 0", lambda x: x >= 0] = 0.04
    block: Count = 128
    knob: ClassVar[str] = "window_sparsity"
    steady: ClassVar[bool] = False

    def meet(self, model: Model, parts: DenseParts) -> None:
        """See `Method.meet`: whether the sparsity can be met in the model's steps."""
        steps = range(model.steps)
        first = next((step for step in steps if not parts.covers(step, model.steps, -math.inf, parts.layers)), None)
        if first is not None and parts.timestep is None:
            self.schedule(spans(first, model.switches, model.steps))

    def schedule(self, spans: tuple[int, ...]) -> tuple[int, float]:
        """(Period, density of the window) over `Call.spans`; ValueError for a sparsity out of reach."""
        if self.window_sparsity is not None:
            return self.period, 1 - self.window_sparsity
        if self.sparsity == 0:
            return self.period, 1.0
        lengths = [end - start for start, end in itertools.pairwise(spans)]
        active, least = sum(lengths), len(lengths)
        for period in range(self.period, max(self.period, *lengths) + 1):
            full = sum(math.ceil(length / period) for length in lengths)
            left = (1 - self.sparsity) * active - full
            if full < active and left >= THINNEST * (active - full):
                return period, left / (active - full)
        raise ValueError(
            f"sparsity={self.sparsity:g} is out of re_ttention's reach in {active} active steps, {least} of which "
            f"{'is' if least == 1 else 'are'} full: its window must keep {THINNEST:g} or more; give more steps, less "
            f"sparsity, or method.window_sparsity with sparsity=0"
        )

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """See `Method.plan`: the window, which depends on the grid and the schedule alone."""
        _, density = self.schedule(call.spans)
        video = call.layout.video
        mask = band_mask(video, self.block, round(density, 9), q.device).expand(len(q), q.shape[2], -1, -1)
        order = Index(patch_major(call.layout.grid, q.device)[None, None])
        return plan_from_mask(mask, order, even_sizes(video, self.block, q.device), self.block, call)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """See `Method.attend`: over the window, and what it leaves out added as it was at the last full step."""
        with part("estimate"):
            plan = self.plan(q, k, v, call)
        if self.sparsity == 0 and self.window_sparsity is None:
            return call.execute(plan, q, k, v)
        period, _ = self.schedule(call.spans)
        since = (call.step - max(start for start in call.spans if start <= call.step)) % period
        if since == 0:
            with part("list"):
                rest = complement(plan)
            beside, beside_lse = call.execute_lse(rest, q, k, v, more=True)
            out, lse = call.execute_lse(plan, q, k, v)
            with part("restore"):
                rho = (lse - beside_lse).sigmoid().nan_to_num(1.0).mT[..., None]  # padding has no log-sum-exps
                residual = ((1 - rho) * beside).to(out.dtype)
            call.state |= {"rho": rho, "residual": residual}
        else:
            out = call.execute(plan, q, k, v)
            rho = (call.state["rho"] + self.growth * (since - 1)).clamp(max=1)
        with part("restore"):
            return torch.addcmul(call.state["residual"].float(), out.float(), rho.float()).to(out.dtype)
