"""DraftAttention (Shen et al., 2025, arXiv 2505.14708; github.com/shawnricecake/draft-attention).

A low-resolution attention map of average-pooled queries and keys ranks regions of 8x16 tokens within a frame; one
threshold per head over the whole map drops the lowest. As the official code does: dropped blocks are skipped (the
paper writes zeroed logits), text stays dense. Beyond it: any grid, with regions of 16x8 where fewer of those cover it;
a row left with nothing keeps its best block; and the last block that the sparsity drops is dropped, which the official
code keeps, as the threshold itself.
Where the region does not divide a frame's height, regions may run on into the next frame (`stacked`): 45x80 tokens
in 33 frames are then 930 regions instead of 990, and only the last of them are cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention import Call, DenseParts, Method, Plan
from ..hints import Region
from ..kernels.select import (
    box_plan,
    draft_map,
    fill_empty_rows,
    keep_over_threshold,
    keep_per_row,
    pool,
    threshold_plan,
)
from ..layout import Box

REGIONS = ((8, 16), (16, 8))  # (h, w) tokens

if TYPE_CHECKING:
    from ..models import Model


@dataclass
class Draft(Method):
    """region: (h, w) tokens, None the one of `REGIONS` that makes fewest of them; stacked: regions run on from frame to
    frame, None where that makes fewer; pool: average or max; per_row: top-k of each row instead of one threshold per
    head; first_frame_sink and same_frame keep those blocks before all others, whatever the sparsity, and need regions
    that do not run on."""

    region: Region = None
    stacked: bool | None = None
    pool: str = "average"
    per_row: bool = False
    first_frame_sink: bool = False
    same_frame: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in ("average", "max"):
            raise ValueError(f"method.pool must be average or max, got {self.pool!r}")
        if self.region is not None:
            self.region = (int(self.region[0]), int(self.region[1]))
        if self.first_frame_sink or self.same_frame:
            if self.stacked:
                raise ValueError("method.stacked must be false with method.first_frame_sink or method.same_frame")
            self.stacked = False

    def box(self, grid: tuple[int, int, int]) -> Box:
        """The region as a box on a grid."""
        regions = REGIONS if self.region is None else (self.region,)
        ways = (False, True) if self.stacked is None else (self.stacked,)
        boxes = [Box(1, *region, stacked=stacked) for region in regions for stacked in ways]
        return min(boxes, key=lambda box: math.prod(box.counts(grid)))

    def meet(self, model: Model, parts: DenseParts) -> None:
        """See `Method.meet`: what the grid decides is decided here, so that records state it."""
        box = self.box(model.grid)
        self.region, self.stacked = (box.h, box.w), box.stacked

    def scores(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """The draft map [B, H, regions, regions], rows summing to one."""
        grid = call.layout.grid
        return draft_map(*(pool(x, self.box(grid), grid, self.pool) for x in (q, k)))

    def mask(self, scores: Tensor, call: Call) -> Tensor:
        """Kept blocks of the map, before empty rows are filled."""
        n, grid = scores.shape[-1], call.layout.grid
        always = None
        if self.first_frame_sink or self.same_frame:
            frame = torch.arange(n, device=scores.device) // (n // grid[0])
            always = (self.first_frame_sink & (frame == 0)) | (self.same_frame & (frame[:, None] == frame))
            scores = scores.masked_fill(always, torch.inf)
        if self.per_row:
            mask = keep_per_row(scores, torch.full_like(scores[..., 0], n - int(self.sparsity * n)))
        else:
            mask = keep_over_threshold(scores, self.sparsity, self.box(grid), grid)
        return mask if always is None else mask | always

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """See `Method.plan`."""
        scores, box = self.scores(q, k, call), self.box(call.layout.grid)
        if not (self.per_row or self.first_frame_sink or self.same_frame):
            return threshold_plan(scores, self.sparsity, box, call)
        # These three are masks in plain torch on every device.
        mask, fallbacks = fill_empty_rows(self.mask(scores, call), scores)
        return box_plan(mask, box, call, fallbacks)
