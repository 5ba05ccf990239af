"""Sliding tile attention (Zhang et al., 2025, arXiv 2502.04507; github.com/hao-ai-lab/FastVideo), windows searched.

The windows of `sta`, one for each step, layer and head, as in the paper: on dense trajectories of other prompts and
seeds, every candidate's loss is measured, the squared error of the head's attention output over its squared output.
The paper picks each head's least loss from a handful of windows and has no sparsity to meet. Here the candidates are
the 16 windows nearest to the density that a sparsity allows, and the picks are those of the least summed loss whose
mean density is that one (by a price on density, the same for all heads). Any grid, edge tiles may be smaller.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from draftbench.methods.sta import Window, nearest_windows, window_plan
from torch import Tensor

from ..attention import Call, Plan
from ..hints import Tile
from ..kernels.select import full_plan
from ..knob import Losses, Searched
from ..layout import Box

Grid = tuple[int, int, int]
CANDIDATES = 16  # a hexadecimal digit names one


@dataclass
class STASearched(Searched):
    """tile: (t, h, w) tokens."""

    tile: Tile = (6, 8, 8)
    knob: ClassVar[str] = "windows"
    windows: str = field(default="searched", init=False)  # for the records

    @property
    def given(self) -> None:
        """See `Method.given`: the windows never are."""

    @property
    def box(self) -> Box:
        """The tile."""
        return Box(*(int(n) for n in self.tile))

    def options(self, grid: Grid, sparsity: float) -> dict[Window, float]:
        """See `Searched.options`."""
        nearest = nearest_windows(self.box, grid, round(1 - sparsity, 9), CANDIDATES)
        return {window: density for density, _, window in nearest}

    def option_plan(self, option: Window, q: Tensor, call: Call) -> Plan:
        """See `Searched.option_plan`."""
        return window_plan(self.box, [option] * q.shape[2], q, call)

    def pick(self, losses: Losses, grid: Grid, sparsity: float) -> tuple[Any, float]:
        """See `Searched.pick`: a window for each step, layer and head."""
        options = self.options(grid, sparsity)
        table = torch.stack([losses.of[window] for window in options])  # [options, steps, layers, heads]
        density = torch.tensor(list(options.values()), dtype=torch.float64)
        picks, mean = priced(table.flatten(1), density, 1 - sparsity)
        named = [
            " ".join("".join(f"{head:x}" for head in layer) for layer in step)
            for step in picks.view(table.shape[1:]).tolist()
        ]
        windows = [list(window) for window in options]
        return {"steps": losses.steps, "layers": losses.layers, "windows": windows, "picks": named}, mean

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """See `Method.plan`; the windows depend on the step, the layer and the head alone."""
        if self.sparsity == 0:
            return full_plan(call, q.shape[2])
        found = self.found
        # A step or a layer that is dense in the search, as when timing warms up, has its neighbour's.
        step, layer = (
            min(range(len(places)), key=lambda i: abs(places[i] - at))
            for places, at in ((found["steps"], call.step), (found["layers"], call.layer))
        )
        heads = found["picks"][step].split()[layer][call.head_offset : call.head_offset + q.shape[2]]
        windows = [tuple(found["windows"][int(head, 16)]) for head in heads]
        return window_plan(self.box, windows, q, call)


def priced(table: Tensor, density: Tensor, budget: float) -> tuple[Tensor, float]:
    """(Option of each unit, their mean density), of the least summed loss at a mean density nearest to `budget`.

    table: loss [options, units]; density: of each option. The least of loss + price * density solves it for the mean
    density that comes out; the price is halved to the budget, and what changes at that price is changed one by one.
    """

    def at(price: float) -> Tensor:
        return (table + price * density[:, None]).argmin(0)

    gaps = density.sort().values.diff()
    high = float((table.max() - table.min() + 1e-12) / gaps[gaps > 1e-9].min()) if (gaps > 1e-9).any() else 1.0
    low = -high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if density[at(middle)].mean() <= budget else (middle, high)
    sparse, dense = at(high), at(low)
    steps = torch.cat([density.new_zeros(1), (density[dense] - density[sparse]).cumsum(0)]) / len(sparse)
    reached = density[sparse].mean() + steps
    changed = int((reached - budget).abs().argmin())
    return torch.cat([dense[:changed], sparse[changed:]]), float(reached[changed])
