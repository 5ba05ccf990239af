"""Video sparse attention (Zhang et al., 2025, arXiv 2505.13389; github.com/hao-ai-lab/FastVideo), untrained.

Tiles of 4x4x4 tokens; the scores of mean-pooled queries and keys pick, for each query tile, its top k tiles. The paper
trains the model with this choice and adds a gated coarse output; without its training there are no gates and no coarse
output, so this row is the selection alone and says nothing of the trained method. Any grid, edge tiles may be smaller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attention import Call, Method, Plan
from ..hints import Tile
from ..kernels.select import box_plan, draft_map, keep_per_row, pool
from ..layout import Box


@dataclass
class VSA(Method):
    """cube: (t, h, w) tokens of a tile.

    Each query tile keeps max(1, ceil((1 - sparsity) n)) of n tiles, which may be almost one more than asked. Where the
    tiles at a grid's edge are smaller that may be fewer tokens: at 5x15x26, 79 to 82% are dropped for 75.
    """

    cube: Tile = (4, 4, 4)
    label: ClassVar[str] = "untrained"

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """See `Method.plan`."""
        box = Box(*(int(n) for n in self.cube))
        scores = draft_map(*(pool(x, box, call.layout.grid) for x in (q, k)))
        kept = max(1, math.ceil(round((1 - self.sparsity) * scores.shape[-1], 6)))
        mask = keep_per_row(scores, torch.full_like(scores[..., 0], kept))
        return box_plan(mask, box, call)
