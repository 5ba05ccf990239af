"""From scores over blocks to kept-block lists: what the block-selecting methods share.

Nothing here synchronises with the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import Call, Plan
from ..layout import Box, Identity, Order, box_sizes, even_sizes, offsets
from ..parts import part


@part("pool")
def pool(x: Tensor, box: Box, grid: tuple[int, int, int], how: str = "average") -> Tensor:
    """Mean or maximum of video tokens over each box, a smaller box at the edges: [B, S, H, D] -> [B, H, boxes, D].

    Float32; text tokens, which lie behind the video, are ignored.
    """
    batch, _, heads, dim = x.shape
    frames, height, width = grid
    video = x[:, : frames * height * width].float().permute(0, 2, 3, 1).reshape(batch, heads * dim, *grid)
    size = (box.t, box.h, box.w)
    if how == "average":
        pooled = torch.nn.functional.avg_pool3d(video, size, size, ceil_mode=True, count_include_pad=False)
    else:
        pooled = torch.nn.functional.max_pool3d(video, size, size, ceil_mode=True)
    return pooled.reshape(batch, heads, dim, -1).transpose(2, 3)


@part("select")
def keep_over_threshold(scores: Tensor, sparsity: float, box: Box, grid: tuple[int, int, int]) -> Tensor:
    """Keep the highest of each head's map [B, H, n, n] down to one threshold; ties at it are kept.

    Drops int(sparsity * n * n) blocks; where boxes at the grid's edge are smaller, the blocks of the lowest scores that
    hold a share `sparsity` of the token pairs.
    """
    flat = scores.flatten(2)
    total = flat.shape[-1]
    if all(n % b == 0 for n, b in zip(grid, (box.t, box.h, box.w), strict=True)):
        threshold = flat.topk(total - int(sparsity * total), dim=-1, sorted=False).values.amin(-1)
    else:
        sizes = box_sizes(box, grid, scores.device).double()
        ranked, where = flat.sort(-1, descending=True)
        pairs = (sizes[:, None] * sizes).flatten()[where].cumsum(-1)
        last = (pairs <= (1 - sparsity) * pairs[..., -1:]).sum(-1).clamp(1, total) - 1
        threshold = ranked.gather(-1, last[..., None])[..., 0]
    return scores >= threshold[..., None, None]


@part("select")
def keep_per_row(scores: Tensor, counts: Tensor) -> Tensor:
    """Keep the `counts` [B, H, n] largest of each row of scores [B, H, n, m]."""
    rank = scores.argsort(-1, descending=True).argsort(-1)
    return rank < counts[..., None]


@part("select")
def fill_empty_rows(mask: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Give each row of mask [B, H, n, m] that keeps nothing its best block; also their number an item."""
    empty = ~mask.any(-1, keepdim=True)
    best = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).bool()
    return mask | (empty & best), empty.sum((1, 2, 3))


@part("list")
def lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [B, H, n] and block indices [B, H, n, m], kept ones first and ascending, int32, of a bool mask."""
    return mask.sum(-1, dtype=torch.int32), (~mask).to(torch.int8).argsort(dim=-1, stable=True).int()


def plan_from_mask(
    mask: Tensor, order: Order, sizes: Tensor, block: int, call: Call, fallbacks: Tensor | None = None
) -> Plan:
    """A plan from kept video blocks [B, H, n, n] of `sizes` tokens in `order`; text rows and columns stay dense."""
    starts = offsets(sizes, call.layout, call.text_lengths, block)
    text = starts.shape[-1] - 1 - mask.shape[-1]
    counts, blocks = lists(torch.nn.functional.pad(mask, (0, text, 0, text), value=True))
    return Plan(starts, starts, counts, blocks, block, block, order, order, fallbacks)


def full_plan(call: Call, heads: int, block: int = 128) -> Plan:
    """A plan that keeps everything, in blocks of `block` tokens."""
    sizes = even_sizes(call.layout.video, block, call.text_lengths.device)
    mask = torch.ones(len(call.text_lengths), heads, len(sizes), len(sizes), dtype=torch.bool, device=sizes.device)
    return plan_from_mask(mask, Identity(), sizes, block, call)


def box_plan(mask: Tensor, box: Box, call: Call, fallbacks: Tensor | None = None) -> Plan:
    """As `plan_from_mask`, for boxes in grid order."""
    sizes = box_sizes(box, call.layout.grid, mask.device)
    return plan_from_mask(mask, box, sizes, box.t * box.h * box.w, call, fallbacks)
