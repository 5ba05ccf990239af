"""Efficient-vDiT's attention tile (Ding et al., 2025, arXiv 2502.06155), the training-free part, by the paper alone.

Tiles are pairs of frames: each frame attends to itself and to k evenly spaced global frames, and those attend to all
frames: k * F + (F - k) * (k + 1) of F * F. Text stays dense.
As in the paper, a search gives each layer the sparsest mask whose loss is within a bound, the same bound for all
layers; `sparsity` means the bound at which the layers' mean is nearest to it. `globals` gives one k to all layers.
Ours to choose: the loss is the squared error of the attention output over the squared output, on dense trajectories;
global frames are those at floor(i F / k). The paper's distillation, which its speed-ups include, is left out. Where a
second transformer takes over, as in Wan 2.2, both share the k of a layer.

No mask drops more than the frames' diagonal leaves, 1 - 1 / F: what lies beyond cannot be calibrated.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ..attention import Call, Plan
from ..hints import Count
from ..kernels.select import full_plan, plan_from_mask
from ..knob import Losses, Searched
from ..layout import Identity, even_sizes

Grid = tuple[int, int, int]


@dataclass
class EfficientVDiT(Searched):
    """globals: the k of all layers; block: tokens, into which the tokens of a frame are cut."""

    globals: Annotated[int | None, "null or an integer of at least 0", lambda x: x >= 0] = None
    block: Count = 128
    knob: ClassVar[str] = "globals"

    def options(self, grid: Grid, sparsity: float) -> dict[int, float]:
        """See `Searched.options`: every k, whatever the sparsity."""
        frames = grid[0]
        return {k: (k * frames + (frames - k) * (k + 1)) / frames**2 for k in range(frames)}

    def option_plan(self, option: int, q: Tensor, call: Call) -> Plan:
        """See `Searched.option_plan`."""
        grid = call.layout.grid
        each = even_sizes(call.layout.frame, self.block, q.device)
        mask = tile_mask(grid[0], min(option, grid[0]), q.device)
        mask = mask.repeat_interleave(len(each), 0).repeat_interleave(len(each), 1)
        mask, sizes = mask.expand(len(q), q.shape[2], -1, -1), each.repeat(grid[0])
        whole = call.layout.frame % self.block == 0
        return plan_from_mask(mask, Identity(), sizes, self.block, call, regular=whole)

    def pick(self, losses: Losses, grid: Grid, sparsity: float) -> tuple[Any, float]:
        """See `Searched.pick`: a k for each layer, by one bound on the loss."""
        densities = self.options(grid, sparsity)
        # [options, layers]; that a denser mask loses no more is so but for noise
        table = torch.stack([losses.of[k].mean((0, 2)) for k in densities]).cummin(0).values
        density = torch.tensor(list(densities.values()), dtype=torch.float64)
        best: tuple[float, list[int], float] | None = None
        for bound in [*table.flatten().unique().tolist(), torch.inf]:
            inside = table <= bound
            ks = torch.where(inside.any(0), inside.int().argmax(0), len(table) - 1)
            kept = float(density[ks].mean())
            if best is None or abs(kept - 1 + sparsity) < best[0]:
                best = abs(kept - 1 + sparsity), ks.tolist(), kept
        assert best is not None
        return {"layers": losses.layers, "globals": best[1]}, best[2]

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """See `Method.plan`; the masks depend on the layer and the grid alone."""
        if self.globals is not None:
            return self.option_plan(self.globals, q, call)
        if self.sparsity == 0:
            return full_plan(call, q.shape[2], self.block)
        # A layer that is dense in the search, as when timing warms up, has its neighbour's.
        near = min(range(len(self.found["layers"])), key=lambda i: abs(self.found["layers"][i] - call.layer))
        return self.option_plan(self.found["globals"][near], q, call)


@functools.lru_cache(maxsize=64)
def tile_mask(frames: int, k: int, device: torch.device) -> Tensor:
    """Kept pairs of frames, bool [frames, frames], with k global ones."""
    mask = torch.eye(frames, dtype=torch.bool)
    for i in range(k):
        mask[i * frames // k] = mask[:, i * frames // k] = True
    return mask.to(device)
