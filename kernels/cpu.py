"""The CPU executor: gathers the kept keys of many query blocks, then torch's flash attention for CPUs.

Query blocks of like key counts share one call, each an item of its batch: thousands of small calls would cost more
than the arithmetic saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import Plan
from ..layout import Layout, permutation
from ..parts import part

LONGEST = 1.15  # keys of a call's longest block over its shortest; shorter ones are padded and masked
MOST = 2**24  # gathered numbers a call


def refuse(q: Tensor, plan: Plan) -> str | None:
    """Why this executor cannot take the request, or None."""
    return f"it needs a CPU, got tensors on {q.device.type}" if q.device.type != "cpu" else None


def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
    """See `draftbench.kernels`; any plan, float32, float64 or bfloat16."""
    batch, length, heads, dim = q.shape
    q_order, kv_order = (permutation(order, layout, q.device) for order in (plan.q_order, plan.kv_order))
    with part("order"):
        q, k, v = (_ordered(x, order).view(-1, dim) for x, order in ((q, q_order), (k, kv_order), (v, kv_order)))
    out = torch.zeros_like(q)
    lse = torch.full((len(q),), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q_start, kv_start = (s.expand(batch, heads, -1).long() for s in (plan.q_offsets, plan.kv_offsets))
    base = (torch.arange(batch * heads) * length).view(batch, heads, 1)
    keys = _kept_keys(plan, kv_start.diff(dim=-1))
    for rows in _groups(keys.flatten(), q_start.diff(dim=-1).flatten(), dim):
        item, row = rows // plan.counts.shape[2], rows % plan.counts.shape[2]
        starts, ends = (q_start.flatten(0, 1)[item, row + i] for i in (0, 1))
        where, real = _tokens(starts[:, None], (ends - starts)[:, None])
        count = plan.counts.flatten(0, 1)[item, row]
        blocks = plan.blocks.flatten(0, 1)[item, row, : int(count.max())].long()
        live = torch.arange(blocks.shape[1]) < count[:, None]
        blocks = torch.where(live, blocks, 0)
        first, last = (kv_start.flatten(0, 1)[item[:, None], blocks + i] for i in (0, 1))
        column, present = _tokens(first, torch.where(live, last - first, 0))
        shift = base.flatten()[item, None]
        queries = q[where + shift][:, None]
        mask = None
        if not present.all():
            mask = torch.zeros(present.shape, dtype=q.dtype).masked_fill_(~present, -torch.inf)[:, None, None]
            mask = mask.expand(-1, 1, queries.shape[2], -1)
        part_out, part_lse = attend(queries, k[column + shift][:, None], v[column + shift][:, None], attn_mask=mask)
        out[(where + shift)[real]], lse[(where + shift)[real]] = part_out[:, 0][real], part_lse.view(real.shape)[real]
    out, lse = out.view(batch, heads, length, dim), lse.view(batch, heads, length)
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


def _kept_keys(plan: Plan, sizes: Tensor) -> Tensor:
    """Number of keys that each query block keeps, [B, H, q_blocks]; sizes of the key blocks [B, H, kv_blocks]."""
    live = plan.live
    found = sizes.gather(2, torch.where(live, plan.blocks, 0).long().flatten(2)).view(live.shape)
    return (found * live).sum(-1)


def _groups(keys: Tensor, queries: Tensor, dim: int) -> list[Tensor]:
    """Indices of the query blocks that have work, in groups of like numbers of keys."""
    order = keys.argsort()
    order = order[(keys[order] > 0) & (queries[order] > 0)]
    groups, first, counts = [], 0, keys[order].tolist()
    for i, count in enumerate([*counts, None]):
        if count is None or count > LONGEST * counts[first] or (i - first) * count * dim > MOST:
            groups.append(order[first:i])
            first = i
    return [group for group in groups if len(group)]


def _tokens(starts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The places of blocks [R, n] side by side, [R, longest], and which of them are real; the others are 0."""
    inside = torch.arange(int(sizes.max()))
    real = (inside < sizes[..., None]).flatten(1)
    places = torch.where(real, (starts[..., None] + inside).flatten(1), 0)
    longest = int(real.sum(1).max())
    if longest < real.shape[1]:
        front = (~real).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
        places, real = places.gather(1, front), real.gather(1, front)
    return places, real
