"""XAttention (Xu et al., 2025, arXiv 2503.16428; github.com/mit-han-lab/x-attention).

Scores along antidiagonals: of every 8 queries in reverse and 8 keys in turn, the sum of the 8 products, a softmax over
a row of them, and its sums over blocks of 128 x 128 tokens. Each row of blocks keeps the fewest whose sum passes tau.
Deviations: text stays dense; keys that fill up the last block take no part in the softmax (the official code leaves
their zeros in it where attention is not causal); and no row keeps the first block for nothing, as the official code
has it, where the index of what is dropped becomes that block's.

Its knob is tau, .9 and .95 in the paper; `sparsity` means one calibrated tau.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attention import Call, Plan
from ..hints import Count
from ..kernels.devices import on_device_of
from ..kernels.select import fast, keep_share, plan_from_mask
from ..knob import Knobbed
from ..layout import Identity, even_sizes
from ..parts import part

MOST = 2**27  # scores at a time


@dataclass
class XAttention(Knobbed):
    """tau: the original's knob; stride: tokens of an antidiagonal; block: tokens, a multiple of stride."""

    tau: float | None = None
    stride: Count = 8
    block: Count = 128
    knob: ClassVar[str] = "tau"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block % self.stride:
            raise ValueError(f"method.stride must divide method.block={self.block}, got {self.stride}")

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """See `Method.plan`."""
        weights = antidiagonal_map(q, k, call.layout.video, self.block, self.stride)
        mask = keep_share(weights, self.value)
        sizes = even_sizes(call.layout.video, self.block, q.device)
        return plan_from_mask(mask, Identity(), sizes, self.block, call, regular=True)


@part("score")
def antidiagonal_map(q: Tensor, k: Tensor, video: int, block: int, stride: int) -> Tensor:
    """Attention mass of blocks [B, H, n, n] by antidiagonals, float32, rows summing to one; q, k: [B, S, H, D].

    One product where dense attention's scores take `stride`. On a GPU `kernels/antidiagonals.py` forms it, where its
    tiles hold whole blocks, and keeps no scores.
    """
    if fast(q):
        from draftbench.kernels import antidiagonals

        if antidiagonals.takes(q, block // stride):
            with on_device_of(q):
                return antidiagonals.block_map(q, k, video, block, stride)
    batch, _, heads, dim = q.shape
    pad = -video % block
    # [B * H, groups, stride * D]; a product of two is the sum of an antidiagonal.
    low_q, low_k = (
        torch.nn.functional.pad(x[:, :video].transpose(1, 2), (0, 0, 0, pad)).unflatten(2, (-1, stride)) for x in (q, k)
    )
    low_q, low_k = low_q.flip(3).flatten(3).flatten(0, 1), low_k.flatten(3).flatten(0, 1)
    groups, each, real = low_k.shape[1], block // stride, -(-video // stride)
    rows = max(1, MOST // (batch * heads * groups * each)) * each
    weights = []
    for part_q in low_q.split(rows, 1):
        # The scale within the product, float32 within the softmax: alone each would be one more pass over the scores.
        scores = torch.baddbmm(low_q.new_empty(1, 1, 1), part_q, low_k.mT, beta=0, alpha=dim**-0.5 / stride)
        scores[..., real:] = -torch.inf
        mass = scores.softmax(-1, dtype=torch.float32).unflatten(-1, (-1, each)).sum(-1)
        weights.append(mass.unflatten(1, (-1, each)))
    found = torch.cat(weights, 1)
    live = (torch.arange(groups, device=q.device) < real).view(-1, each, 1)
    return ((found * live).sum(2) / live.sum(1)).unflatten(0, (batch, heads))
