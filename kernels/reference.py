"""The plain executor: a token mask from the lists, float32 softmax. Every other executor is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import Plan
from ..layout import Layout, permutation

LIMIT = 16384  # tokens: the mask is quadratic


def refuse(q: Tensor, plan: Plan) -> str | None:
    """Why this executor cannot take the request, or None."""
    return f"it holds S x S scores, so at most {LIMIT} tokens, got {q.shape[1]}" if q.shape[1] > LIMIT else None


def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
    """See `draftbench.kernels`; any plan, any dtype, float32 or float64 arithmetic."""
    batch, length, heads, dim = q.shape
    high = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(batch, length, heads, dim, dtype=high, device=q.device)
    lse = torch.full((batch, heads, length), -torch.inf, dtype=high, device=q.device)
    orders = [permutation(order, layout, q.device) for order in (plan.q_order, plan.kv_order)]
    for b in range(batch):
        for h in range(heads):
            q_rows, q_block = _places(orders[0], plan.q_offsets, b, h)
            kv_rows, kv_block = _places(orders[1], plan.kv_offsets, b, h)
            kept = torch.zeros(plan.counts.shape[2], plan.kv_offsets.shape[-1] - 1, dtype=torch.bool, device=q.device)
            for row, count in enumerate(plan.counts[b, h].tolist()):
                kept[row, plan.blocks[b, h, row, :count].long()] = True
            scores = q[b, q_rows, h].to(high) @ k[b, kv_rows, h].to(high).T / dim**0.5
            scores = scores.masked_fill(~kept[q_block][:, kv_block], -torch.inf)
            total = scores.logsumexp(-1)
            weights = torch.where(total[:, None].isneginf(), 0.0, (scores - total[:, None]).exp())
            out[b, q_rows, h] = weights @ v[b, kv_rows, h].to(high)
            lse[b, h, q_rows] = total
    return out.to(q.dtype), lse


def _places(order: Tensor | None, starts: Tensor, b: int, h: int) -> tuple[Tensor, Tensor]:
    """(Token index, block index) of each real place of the ordered sequence, for one item and head."""
    start = starts[min(b, len(starts) - 1), min(h, starts.shape[1] - 1)].long()
    sizes = start.diff()
    block = torch.repeat_interleave(torch.arange(len(sizes), device=start.device), sizes)
    places = torch.arange(len(block), device=start.device)
    if order is None:
        return places, block
    return order[min(b, len(order) - 1), min(h, order.shape[1] - 1)][places], block
