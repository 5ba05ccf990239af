"""From scores over blocks to kept-block lists: what the block-selecting methods share.

Plain torch, the reference and the way on a CPU; what `fast` allows goes to the kernels in `draft.py` and `rows.py`
instead. Nothing here synchronises with the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from draftbench.kernels.devices import on_device_of, triton_version
from torch import Tensor

from ..attention import Call, Plan
from ..layout import Box, Layout, Order, box_sizes, even_sizes, offsets
from ..parts import part


def fast(x: Tensor) -> bool:
    """Whether the Triton kernels take x: any tensor on a GPU but float64, where Triton is installed. Decided here only.

    The rest is plain torch, whose results are the same up to rounding.
    """
    return x.device.type == "cuda" and x.dtype != torch.float64 and triton_version() is not None


def fits(x: Tensor) -> bool:
    """Whether `rows.py` takes x, whose rows it holds in registers."""
    if not fast(x):
        return False
    from draftbench.kernels import rows

    return x.shape[-1] <= rows.WIDEST


@part("pool")
def pool(x: Tensor, box: Box, grid: tuple[int, int, int], how: str = "average") -> Tensor:
    """Pooled video tokens of each box, a smaller box at the edges: [B, S, H, D] -> [B, H, boxes, D] float32.

    how: "average", "max", or "direction", the mean of tokens that are divided by their norms. Text tokens, which lie
    behind the video, are ignored.
    """
    grid = box.over(grid)
    if fast(x):
        from draftbench.kernels import draft

        with on_device_of(x):
            return draft.pool(x, box, grid, how)
    counts, average = box.counts(grid), how != "max"
    video = x[:, : math.prod(grid)].float().unflatten(1, grid)
    if how == "direction":
        video = torch.nn.functional.normalize(video, dim=-1)
    rest = [n * b - size for n, b, size in zip(counts, (box.t, box.h, box.w), grid, strict=True)]
    if any(rest):
        around = (0, 0, 0, 0, 0, rest[2], 0, rest[1], 0, rest[0])
        video = torch.nn.functional.pad(video, around, value=0.0 if average else -torch.inf)
    cut = video.unflatten(3, (counts[2], box.w)).unflatten(2, (counts[1], box.h)).unflatten(1, (counts[0], box.t))
    if not average:
        return cut.amax((2, 4, 6)).flatten(1, 3).transpose(1, 2)
    sizes = box_sizes(box, grid, x.device)
    # Axis by axis: all at once takes a CPU ten times as long.
    return cut.sum(6).sum(4).sum(2).flatten(1, 3).transpose(1, 2) / sizes[:, None]


@part("score")
def draft_map(low_q: Tensor, low_k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) of pooled q and k [B, H, n, D]: float32 [B, H, n, n], rows summing to one."""
    batch, heads, _, dim = low_q.shape
    low_q, low_k = low_q.flatten(0, 1), low_k.flatten(0, 1)
    # The scale within the product: alone it would be one more pass over the map.
    scores = torch.baddbmm(low_q.new_empty(1, 1, 1), low_q, low_k.mT, beta=0, alpha=dim**-0.5)
    return scores.softmax(-1).unflatten(0, (batch, heads))


def pair_budget(sparsity: float, box: Box, grid: tuple[int, int, int]) -> int:
    """How many token pairs a map of n x n boxes may keep.

    All but int(sparsity * n * n) blocks, or, where boxes at the grid's edge are smaller, a share 1 - sparsity of pairs.
    """
    if all(n % b == 0 for n, b in zip(box.over(grid), (box.t, box.h, box.w), strict=True)):
        total = math.prod(box.counts(grid)) ** 2
        return (total - int(sparsity * total)) * (box.t * box.h * box.w) ** 2
    return int((1 - sparsity) * math.prod(grid) ** 2)


@part("select")
def keep_over_threshold(scores: Tensor, sparsity: float, box: Box, grid: tuple[int, int, int]) -> Tensor:
    """Keep the highest of each head's map [B, H, n, n] for as long as their pairs fit `pair_budget`.

    One threshold a head; ties at it are kept in the order of the map (row by row), as far as they fit.
    """
    sizes = box_sizes(box, grid, scores.device).long()
    ranked = scores.flatten(2).argsort(dim=-1, descending=True, stable=True)
    pairs = (sizes[:, None] * sizes).flatten()[ranked].cumsum(-1)
    kept = pairs <= pair_budget(sparsity, box, grid)
    return torch.empty_like(kept).scatter_(-1, ranked, kept).view(scores.shape)


@part("select")
def keep_per_row(scores: Tensor, counts: Tensor) -> Tensor:
    """Keep the `counts` [B, H, n] largest of each row of scores [B, H, n, m], of equal ones the first."""
    if fits(scores):
        from draftbench.kernels import rows

        with on_device_of(scores):
            return rows.most(scores, counts)
    ranked = scores.argsort(dim=-1, descending=True, stable=True)
    kept = torch.arange(scores.shape[-1], device=scores.device) < counts[..., None]
    return torch.empty_like(kept).scatter_(-1, ranked, kept)


@part("select")
def fill_empty_rows(mask: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Give each row of mask [B, H, n, m] that keeps nothing its best block; also their number an item."""
    empty = ~mask.any(-1, keepdim=True)
    best = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).bool()
    return mask | (empty & best), empty.sum((1, 2, 3))


@part("select")
def keep_share(weights: Tensor, share: float, least: int = 1, crossing: bool = True) -> Tensor:
    """Keep the largest of each row of weights [B, H, n, m], which sum to one, until their sum passes `share`.

    The weight that crosses it is kept too if `crossing`; `least` at least are kept, and a share of 1 keeps everything.
    Of equal weights the first are kept.
    """
    if share >= 1:
        return torch.ones_like(weights, dtype=torch.bool)
    if fits(weights):
        from draftbench.kernels import rows

        with on_device_of(weights):
            return rows.share(weights, share, least, crossing)
    ranked, where = weights.sort(dim=-1, descending=True, stable=True)
    total = ranked.cumsum(-1)
    kept = (total - ranked if crossing else total) <= share
    kept[..., :least] = True
    return torch.empty_like(kept).scatter_(-1, where, kept)


@part("list")
def lists(mask: Tensor, text: int = 0, key_text: int | None = None) -> tuple[Tensor, Tensor]:
    """Counts [B, H, n'] and block indices [B, H, n', m'], kept ones first and ascending, int32.

    Of a bool mask [B, H, n, m] and, behind it, `text` blocks of queries and `key_text` (as many, if None) of keys that
    are all kept; n' = n + text, m' = m + key_text.
    """
    key_text = text if key_text is None else key_text
    if fast(mask):
        from draftbench.kernels import draft

        with on_device_of(mask):
            return draft.mask_lists(mask, text, key_text)
    mask = torch.nn.functional.pad(mask, (0, key_text, 0, text), value=True)
    return mask.sum(-1, dtype=torch.int32), (~mask).to(torch.int8).argsort(dim=-1, stable=True).int()


@dataclass(frozen=True, eq=False)
class Cut:
    """How the video's queries or keys are arranged and cut: order, sizes of the blocks as `offsets` takes them, and
    `block`, the tokens of the largest and of the text's blocks."""

    order: Order
    sizes: Tensor
    block: int


def cut_plan(mask: Tensor, queries: Cut, keys: Cut, call: Call, fallbacks: Tensor | None = None) -> Plan:
    """A plan from kept video blocks [B, H, n, m] of queries and keys that are cut each in its way; text stays dense."""
    starts, ends = (offsets(cut.sizes, call.layout, call.text_lengths, cut.block) for cut in (queries, keys))
    n, m = mask.shape[-2:]
    counts, blocks = lists(mask, starts.shape[-1] - 1 - n, ends.shape[-1] - 1 - m)
    return Plan(starts, ends, counts, blocks, queries.block, keys.block, queries.order, keys.order, fallbacks)


def plan_from_mask(
    mask: Tensor, order: Order, sizes: Tensor, block: int, call: Call, fallbacks: Tensor | None = None,
    regular: bool = False,
) -> Plan:  # fmt: skip
    """A plan from kept video blocks [B, H, n, n] of `sizes` tokens in `order`; text rows and columns stay dense."""
    cut = Cut(order, sizes, block)
    return replace(cut_plan(mask, cut, cut, call, fallbacks), regular=regular)


def complement(plan: Plan) -> Plan:
    """The plan of all pairs that a plan does not execute, text's included."""
    width = plan.kv_offsets.shape[-1] - 1
    kept = torch.zeros(*plan.counts.shape, width + 1, dtype=torch.bool, device=plan.counts.device)
    # What lies behind the counts goes to one column more, which is dropped.
    kept.scatter_(-1, torch.where(plan.live, plan.blocks, width).long(), True)
    counts, blocks = lists(~kept[..., :-1])
    return replace(plan, counts=counts, blocks=blocks, fallbacks=None)


def threshold_plan(scores: Tensor, sparsity: float, box: Box, call: Call) -> Plan:
    """The plan of `keep_over_threshold`, rows that keep nothing filled, for boxes in grid order.

    scores: float32 [B, H, n, n], none below 0.
    """
    if not fast(scores):
        mask, fallbacks = fill_empty_rows(keep_over_threshold(scores, sparsity, box, call.layout.grid), scores)
        return box_plan(mask, box, call, fallbacks)
    from draftbench.kernels import draft

    block = box.t * box.h * box.w
    starts = offsets(box_sizes(box, call.layout.grid, scores.device), call.layout, call.text_lengths, block)
    with part("select"), on_device_of(scores):
        cuts = draft.select(scores, sparsity, box, call.layout.grid)
    with part("list"), on_device_of(scores):
        counts, blocks, fallbacks = draft.lists(scores, cuts, starts.shape[-1] - 1 - scores.shape[-1])
    return Plan(starts, starts, counts, blocks, block, block, box, box, fallbacks, regular=True)


def full_plan(call: Call, heads: int, block: int = 128) -> Plan:
    """A plan that keeps everything, in blocks of `block` tokens."""
    return every_pair(call.layout, call.text_lengths, heads, block)


def every_pair(layout: Layout, text_lengths: Tensor, heads: int, block: int = 128) -> Plan:
    """As `full_plan`, of real text [B]."""
    starts = offsets(even_sizes(layout.video, block, text_lengths.device), layout, text_lengths, block)
    blocks = starts.shape[-1] - 1
    counts = starts.new_full((len(text_lengths), heads, blocks), blocks)
    every = torch.arange(blocks, dtype=torch.int32, device=starts.device).expand(*counts.shape, blocks).contiguous()
    return Plan(starts, starts, counts, every, block, block, regular=True)


def box_plan(mask: Tensor, box: Box, call: Call, fallbacks: Tensor | None = None) -> Plan:
    """As `plan_from_mask`, for boxes in grid order."""
    sizes = box_sizes(box, call.layout.grid, mask.device)
    return plan_from_mask(mask, box, sizes, box.t * box.h * box.w, call, fallbacks, regular=True)
