"""DraftAttention (Shen et al., 2025, arXiv 2505.14708; github.com/shawnricecake/draft-attention).

A low-resolution attention map of average-pooled queries and keys ranks regions of 8x16 tokens within a frame; one
threshold per head over the whole map drops the lowest. As the official code does: dropped blocks are skipped (the
paper writes zeroed logits), text stays dense. Beyond it: any grid, and a row left with nothing keeps its best block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import Call, Method, Plan
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


@dataclass
class Draft(Method):
    """region: (h, w) tokens; pool: average or max; per_row: top-k of each row instead of one threshold per head;
    first_frame_sink and same_frame keep those blocks too."""

    region: tuple[int, int] = (8, 16)
    pool: str = "average"
    per_row: bool = False
    first_frame_sink: bool = False
    same_frame: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in ("average", "max"):
            raise ValueError(f"method.pool must be average or max, got {self.pool!r}")
        self.region = (int(self.region[0]), int(self.region[1]))

    @property
    def box(self) -> Box:
        """The region as a box of one frame."""
        return Box(1, *self.region)

    def scores(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """The draft map [B, H, regions, regions], rows summing to one."""
        return draft_map(*(pool(x, self.box, call.layout.grid, self.pool) for x in (q, k)))

    def mask(self, scores: Tensor, call: Call) -> Tensor:
        """Kept blocks of the map, before empty rows are filled."""
        n = scores.shape[-1]
        if self.per_row:
            mask = keep_per_row(scores, torch.full_like(scores[..., 0], n - int(self.sparsity * n)))
        else:
            mask = keep_over_threshold(scores, self.sparsity, self.box, call.layout.grid)
        per_frame = n // call.layout.grid[0]
        frame = torch.arange(n, device=scores.device) // per_frame
        if self.first_frame_sink:
            mask = mask | (frame == 0)
        if self.same_frame:
            mask = mask | (frame[:, None] == frame)
        return mask

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """See `Method.plan`."""
        scores = self.scores(q, k, call)
        if not (self.per_row or self.first_frame_sink or self.same_frame):
            return threshold_plan(scores, self.sparsity, self.box, call)
        # These three are masks in plain torch on every device.
        mask, fallbacks = fill_empty_rows(self.mask(scores, call), scores)
        return box_plan(mask, self.box, call, fallbacks)
