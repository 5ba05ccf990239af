"""The CPU executor: gathers the kept blocks of a query block, then torch's flash attention for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import Plan
from ..layout import Layout, permutation
from ..parts import part


def refuse(q: Tensor, plan: Plan) -> str | None:
    """Why this executor cannot take the request, or None."""
    return f"it needs a CPU, got tensors on {q.device.type}" if q.device.type != "cpu" else None


def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
    """See `draftbench.kernels`; any plan, float32, float64 or bfloat16."""
    batch, length, heads, dim = q.shape
    q_order, kv_order = (permutation(order, layout, q.device) for order in (plan.q_order, plan.kv_order))
    with part("order"):
        q, k, v = _ordered(q, q_order), _ordered(k, kv_order), _ordered(v, kv_order)
    out = torch.zeros_like(q)
    lse = torch.full((batch, heads, length), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q_starts, kv_starts = (s.expand(batch, heads, -1).tolist() for s in (plan.q_offsets, plan.kv_offsets))
    counts, blocks = plan.counts.tolist(), plan.blocks.tolist()
    for b in range(batch):
        for h in range(heads):
            q_start, kv_start = q_starts[b][h], kv_starts[b][h]
            for row, count in enumerate(counts[b][h]):
                first, end = q_start[row], q_start[row + 1]
                spans = _spans([(kv_start[i], kv_start[i + 1]) for i in sorted(blocks[b][h][row][:count])])
                if first == end or not spans:
                    continue
                keys, values = (torch.cat([x[b, h, s:e] for s, e in spans])[None, None] for x in (k, v))
                found, total = attend(q[b : b + 1, h : h + 1, first:end], keys, values)
                out[b, h, first:end], lse[b, h, first:end] = found[0, 0], total.view(-1)
    if q_order is not None:
        with part("restore"):
            where = q_order.expand(batch, heads, -1)
            out = torch.zeros_like(out).scatter_(2, where[..., None].expand(-1, -1, -1, dim), out)
            lse = torch.empty_like(lse).scatter_(2, where, lse)
    return out.transpose(1, 2), lse


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    """[B, S, H, D] to [B, H, S, D] in the plan's order, contiguous."""
    x = x.transpose(1, 2)
    if order is None:
        return x.contiguous()
    return x.gather(2, order.expand(x.shape[0], x.shape[1], -1)[..., None].expand(-1, -1, -1, x.shape[-1]))


def _spans(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge neighbouring ranges and drop empty ones: fewer and longer copies."""
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if start == end:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged
