"""Control: the blocks with the most true attention mass, which no estimate can beat in recalled mass; slow."""

from __future__ import annotations

from dataclasses import dataclass

from draftbench.methods.draft import Draft
from torch import Tensor

from ..attention import Call
from ..kernels.mass import attention_mass
from ..layout import box_sizes


@dataclass
class Oracle(Draft):
    """Draft's selection over the true map instead of the pooled one."""

    def scores(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """The true map [B, H, regions, regions]: mean attention mass a token pair, so that size earns no place."""
        box = self.box(call.layout.grid)
        sizes = box_sizes(box, call.layout.grid, q.device)
        return attention_mass(q, k, box, call) / (sizes[:, None] * sizes)
