"""Tokens in a plan's order with every block filled up to one size, for kernels that take whole blocks only.

A place beyond a block's end repeats token 0: as a query nobody reads it, as a key it must be masked. Nothing here
synchronises with the host.
"""

from __future__ import annotations

import torch
from draftbench.kernels.devices import on_device_of
from draftbench.kernels.select import fast
from torch import Tensor

from ..attention import Plan
from ..layout import Layout, permutation


def even(plan: Plan, layout: Layout, batch: int) -> bool:
    """Whether every block is known, without asking the device, to be whole: one item's text is the layout's."""
    text_is_known = not layout.text or batch == 1
    return text_is_known and all(
        (starts.shape[-1] - 1) * block == layout.length
        for starts, block in ((plan.q_offsets, plan.q_block), (plan.kv_offsets, plan.kv_block))
    )


def places(starts: Tensor, order: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """(Token of each place, whether it is real) of blocks filled up to `block`, [B, H or 1, blocks * block].

    starts: int32 [B, H or 1, blocks + 1]; order: as `layout.permutation` gives it.
    """
    inside = torch.arange(block, device=starts.device)
    real = inside < starts.diff(dim=-1)[..., None]
    where = torch.where(real, starts[..., :-1, None] + inside, 0).flatten(2).long()
    real = real.flatten(2)
    if order is None:
        return where, real
    batch, heads = max(len(where), len(order)), max(where.shape[1], order.shape[1])
    tokens = order.expand(batch, heads, -1).gather(2, where.expand(batch, heads, -1))
    return torch.where(real, tokens, 0), real.expand(batch, heads, -1)


def take(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows of x [B, S, H, D] at tokens [B or 1, H or 1, P] -> [B, P, H, D], contiguous."""
    batch, length, heads, dim = x.shape
    if tokens.shape[1] > 1:
        if fast(x) and not dim & (dim - 1):
            from draftbench.kernels import gather

            with on_device_of(x):
                return gather.rows(x, tokens)
        return x.gather(1, tokens.transpose(1, 2)[..., None].expand(batch, -1, heads, dim))
    if len(tokens) == 1:
        return x.index_select(1, tokens[0, 0])
    rows = tokens[:, 0] + torch.arange(batch, device=x.device)[:, None] * length
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(batch, -1, heads, dim)


class Ordered:
    """The places of a plan's queries and keys; `q(x)`, `kv(x)` arrange, `restore` puts results back."""

    def __init__(self, plan: Plan, layout: Layout, batch: int, device: torch.device):
        self.even, self.layout = even(plan, layout, batch), layout
        self.lengths = plan.q_offsets[:, 0, -1]
        orders = [permutation(order, layout, device) for order in (plan.q_order, plan.kv_order)]
        self.q_tokens, self.kv_tokens = orders
        self.real: Tensor | None = None
        if not self.even:
            self.q_tokens, self.real = places(plan.q_offsets, orders[0], plan.q_block)
            self.kv_tokens, _ = places(plan.kv_offsets, orders[1], plan.kv_block)

    def q(self, x: Tensor) -> Tensor:
        """Queries [B, S, H, D] -> [B, places, H, D]."""
        return x if self.q_tokens is None else take(x, self.q_tokens)

    def kv(self, x: Tensor) -> Tensor:
        """Keys or values [B, S, H, D] -> [B, places, H, D]."""
        return x if self.kv_tokens is None else take(x, self.kv_tokens)

    def restore(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Output [B, places, H, D] and LSE [B, H, places] to tokens; text padding gives zero and -inf."""
        tokens, real, length = self.q_tokens, self.real, self.layout.length
        if tokens is None:
            return out, lse
        slots = tokens if real is None else torch.where(real, tokens, length)  # padding goes to a slot behind the end
        place = torch.zeros(*tokens.shape[:2], length + 1, dtype=torch.int64, device=tokens.device)
        place.scatter_(2, slots, torch.arange(tokens.shape[2], device=tokens.device).expand_as(slots))
        place = place[..., :length]
        out, lse = take(out, place), lse.gather(2, place.expand(*lse.shape[:2], -1))
        if not self.even and self.layout.text:
            video = self.layout.video
            absent = torch.arange(video, length, device=out.device) >= self.lengths[:, None]
            out[:, video:].masked_fill_(absent[..., None, None], 0)
            lse[:, :, video:].masked_fill_(absent[:, None], -torch.inf)
        return out, lse


def real_keys(plan: Plan, heads: int, size: int) -> Tensor:
    """Real keys in each piece of `size` places of the filled-up key blocks, int32 [B, H, pieces]."""
    pieces = torch.arange(0, plan.kv_block, size, dtype=torch.int32, device=plan.kv_offsets.device)
    held = (plan.kv_offsets.diff(dim=-1)[..., None] - pieces).clamp(0, size).flatten(2)
    return held.expand(-1, heads, -1).contiguous()


def pieces(plan: Plan, count: int) -> tuple[Tensor, Tensor]:
    """(Counts, indices) of a plan's lists with each key block cut into `count` equal pieces."""
    if count == 1:
        return plan.counts, plan.blocks
    cut = plan.blocks[..., None] * count + torch.arange(count, dtype=torch.int32, device=plan.blocks.device)
    return plan.counts * count, cut.flatten(3)


def split(counts: Tensor, blocks: Tensor, held: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lists of blocks with some padding and of whole ones: (counts, indices) of each, int32.

    held: real keys of each block [B, H, blocks]; empty blocks are left out.
    """
    live = torch.arange(blocks.shape[-1], device=blocks.device) < counts[..., None]
    where = torch.where(live, blocks, 0)
    keys = held.gather(2, where.flatten(2).long()).view_as(where)
    keys = torch.where(live, keys, 0)
    return *_packed((keys > 0) & (keys < size), where), *_packed(keys == size, where)


def _packed(chosen: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(Counts, the chosen blocks first and in their order); what lies behind them is never read."""
    last = blocks.shape[-1]
    place = torch.where(chosen, chosen.cumsum(-1, dtype=torch.int32) - 1, last).long()
    packed = torch.zeros(*blocks.shape[:-1], last + 1, dtype=torch.int32, device=blocks.device)
    packed.scatter_(-1, place, blocks)
    return chosen.sum(-1, dtype=torch.int32), packed[..., :last].contiguous()
