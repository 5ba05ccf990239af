"""The CPU executor: gathers the kept keys of many query blocks, then torch's flash attention for CPUs.

Query blocks of like key counts share one call, each an item of its batch: thousands of small calls would cost more
than the arithmetic saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import Plan
from ..layout import Layout, Order, permutation

LONGEST = 1.15  # keys of a call's longest block over its shortest; shorter ones are padded and masked
MOST = 2**24  # gathered numbers a call


def refuse(q: Tensor, plan: Plan) -> str | None:
    """Why this executor cannot take the request, or None."""
    return f"it needs a CPU, got tensors on {q.device.type}" if q.device.type != "cpu" else None


def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: Layout) -> tuple[Tensor, Tensor]:
    """See `draftbench.kernels`; any plan, any floating dtype."""
    batch, length, heads, dim = q.shape
    q_rows, kv_rows = (_rows(order, layout, batch, heads) for order in (plan.q_order, plan.kv_order))
    q, k, v = (x.reshape(-1, dim) for x in (q, k, v))
    out = torch.zeros_like(q)
    lse = torch.full((len(q),), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q_start, kv_start = (s.expand(batch, heads, -1).long() for s in (plan.q_offsets, plan.kv_offsets))
    base = torch.arange(batch * heads) * length
    keys = _kept_keys(plan, kv_start.diff(dim=-1))
    for group in _groups(keys.flatten(), q_start.diff(dim=-1).flatten(), dim):
        item, row = group // plan.counts.shape[2], group % plan.counts.shape[2]
        starts, ends = (q_start.flatten(0, 1)[item, row + i] for i in (0, 1))
        where, real = _tokens(starts[:, None], (ends - starts)[:, None])
        count = plan.counts.flatten(0, 1)[item, row]
        blocks = plan.blocks.flatten(0, 1)[item, row, : int(count.max())].long()
        live = torch.arange(blocks.shape[1]) < count[:, None]
        blocks = torch.where(live, blocks, 0)
        first, last = (kv_start.flatten(0, 1)[item[:, None], blocks + i] for i in (0, 1))
        column, present = _tokens(first, torch.where(live, last - first, 0))
        shift = base[item, None]
        mask = None
        if not present.all():
            mask = torch.zeros(present.shape, dtype=q.dtype).masked_fill_(~present, -torch.inf)[:, None, None]
            mask = mask.expand(-1, 1, where.shape[1], -1)
        queries, columns = q_rows[where + shift], kv_rows[column + shift]
        taken = (_taken(x, n) for x, n in ((q, queries), (k, columns), (v, columns)))
        part_out, part_lse = attend(*taken, attn_mask=mask)
        part_out, part_lse = part_out.reshape(-1, dim), part_lse.flatten()
        queries, real = queries.flatten(), real.flatten()
        if not real.all():
            queries, part_out, part_lse = queries[real], part_out[real], part_lse[real]
        out[queries], lse[queries] = part_out, part_lse
    lse = lse.view(batch, length, heads).transpose(1, 2).contiguous()
    return out.view(batch, length, heads, dim), lse


def _rows(order: Order, layout: Layout, batch: int, heads: int) -> Tensor:
    """Of each item, head and place in order, the row of its token in [B, S, H, D] seen as [B * S * H, D]."""
    tokens = permutation(order, layout, torch.device("cpu"))
    if tokens is None:
        tokens = torch.arange(layout.length)[None, None]
    item, head = torch.arange(batch)[:, None, None], torch.arange(heads)[:, None]
    return (((item * layout.length + tokens) * heads) + head).flatten()


def _taken(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x [n, D] at rows [R, places], as a batch of one head: [R, 1, places, D]."""
    return x.index_select(0, rows.flatten()).view(len(rows), 1, -1, x.shape[1])


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
