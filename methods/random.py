"""Control: as many blocks in each row as DraftAttention would keep, drawn at random, anew at every call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from draftbench.methods.draft import Draft
from torch import Tensor

from ..attention import Call, Plan
from ..kernels.select import box_plan, fill_empty_rows, keep_per_row


@dataclass
class Random(Draft):
    """The knobs are draft's, whose counts it takes: of blocks, so that on a ragged grid its pairs differ by a few in a
    hundred."""

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """See `Method.plan`."""
        scores = self.scores(q, k, call)
        mask, fallbacks = fill_empty_rows(self.mask(scores, call), scores)
        draws = [
            torch.rand(scores.shape[1:], device=q.device, generator=call.generator(item, q.device))
            for item in range(len(q))
        ]
        return box_plan(keep_per_row(torch.stack(draws), mask.sum(-1)), self.box(call.layout.grid), call, fallbacks)
