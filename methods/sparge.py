"""SpargeAttn's mask (Zhang et al., 2025, arXiv 2502.18137; github.com/thu-ml/SpargeAttn), without its quantisation.

Blocks of 128 queries and 64 keys are pooled; a block is alike if the mean cosine of its tokens with one another is over
a threshold, that of keys after the mean of all keys is taken from them. Key blocks that are not alike are always kept,
query blocks that are not keep every key; the rest take, by the softmax of pooled scores over the alike key blocks, the
highest whose sum stays within cdf, one at least.
The original also computes in int8 and fp8, skips products within its kernel, and tunes thresholds for each head; this
row is the mask alone, with one threshold for all. Text stays dense, and is not in the mean of the keys, where the
original has it.

Its knob here is cdf, .98 beside a similarity of .6 in the original; `sparsity` means one calibrated cdf, and then the
similarity is that of the original's plug-and-play variant, -.1, since .6 may forbid any sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..attention import Call, Plan
from ..kernels.select import Cut, cut_plan, keep_share, pool
from ..knob import Knobbed
from ..layout import Box, Identity, even_sizes
from ..parts import part


@dataclass
class Sparge(Knobbed):
    """cdf: the original's knob; similarity: null is .6 beside a given cdf and else -.1; block: queries, two of keys."""

    cdf: float | None = None
    similarity: float | None = None
    block: Annotated[int, "an even integer of at least 2", lambda x: x >= 2 and x % 2 == 0] = 128
    label: ClassVar[str] = "mask only"
    knob: ClassVar[str] = "cdf"

    @property
    def alike(self) -> float:
        """The threshold in force."""
        default = -0.1 if self.asked else 0.6
        return default if self.similarity is None else self.similarity

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """See `Method.plan`."""
        video = call.layout.video
        cuts = [Cut(Identity(), even_sizes(video, block, q.device), block) for block in (self.block, self.block // 2)]
        boxes = [Box(1, 1, cut.block) for cut in cuts]
        low_q, low_k = (pool(x, box, (1, 1, video)) for x, box in zip((q, k), boxes, strict=True))
        with part("score"):
            scores = low_q @ low_k.mT * q.shape[-1] ** -0.5
        if self.alike < 0:  # then all blocks are
            return cut_plan(keep_share(scores.softmax(-1), self.value, crossing=False), cuts[0], cuts[1], call)
        with part("pool"):
            keys = k[:, :video] - k[:, :video].mean(1, keepdim=True, dtype=torch.float32).to(k.dtype)
        # The mean of a Gram matrix of unit vectors is the squared length of their mean.
        odd_q, odd_k = (
            pool(x, box, (1, 1, video), "direction").square().sum(-1) <= self.alike
            for x, box in zip((q, keys), boxes, strict=True)
        )
        with part("score"):
            weights = scores.masked_fill(odd_k[:, :, None], -torch.inf).softmax(-1)
            weights = weights.nan_to_num(0)  # no key block is alike: all are kept below
        mask = keep_share(weights, self.value, crossing=False) | odd_k[:, :, None] | odd_q[..., None]
        return cut_plan(mask, cuts[0], cuts[1], call)
