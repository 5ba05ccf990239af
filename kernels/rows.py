"""Which blocks of a row are kept, by their number or by their share, as Triton kernels that hold a row in registers.

`select.py` is the reference and chooses between the two. A row is read once, its threshold is searched for by halving
the range of its values' bits, some 30 sums over what registers hold, and ties at it are kept in the order of the row.
Nothing synchronises with the host.

Floor at 33x48x80 tokens in 1980 tiles of 64, 24 heads: the map read once and the mask written, .47 GB, .11 ms at
4.3 TB/s. Sorting a row instead, to rank it, passes over it many times with 12 bytes an entry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 16384  # entries of a row that registers are asked to hold


def most(scores: Tensor, counts: Tensor) -> Tensor:
    """As `select.keep_per_row`; scores [B, H, n, m] with m up to `WIDEST`."""
    scores = scores.float().contiguous()
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    _most[(counts.numel(),)](
        scores, counts.int().contiguous(), mask.view(torch.uint8), scores.shape[-1], **_launch(scores)
    )
    return mask


def share(weights: Tensor, part: float, least: int, crossing: bool) -> Tensor:
    """As `select.keep_share`, up to the rounding of sums; weights [B, H, n, m], none below 0, m up to `WIDEST`."""
    weights = weights.float().contiguous()
    mask = torch.empty(weights.shape, dtype=torch.bool, device=weights.device)
    _share[(weights.shape[:-1].numel(),)](
        weights, mask.view(torch.uint8), weights.shape[-1], part, least, CROSSING=crossing, **_launch(weights)
    )
    return mask


def _launch(x: Tensor) -> dict[str, int]:
    block = triton.next_power_of_2(x.shape[-1])
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


@triton.jit
def _first(chosen, number):
    """The first `number` of the chosen entries."""
    return chosen & (tl.cumsum(chosen.to(tl.int32), 0) <= number)


@triton.jit
def _largest(keys, live, number):
    """The `number` largest keys of a row, and of equal ones the first."""
    low = tl.min(tl.where(live, keys, 0x7FFFFFFF)).to(tl.int64)
    high = tl.max(tl.where(live, keys, -0x7FFFFFFF)).to(tl.int64)
    while low < high:  # for the highest key that leaves enough at and above it
        middle = low + (high - low + 1) // 2
        enough = tl.sum((live & (keys >= middle)).to(tl.int32)) >= number
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    above = live & (keys > low)
    return above | _first(live & (keys == low), number - tl.sum(above.to(tl.int32)))


@triton.jit
def _most(SCORES, COUNTS, MASK, m, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    live = at < m
    bits = (tl.load(SCORES + row * m + at, mask=live, other=0) + 0.0).to(tl.int32, bitcast=True)  # -0 as 0
    keys = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)  # ascending as the numbers are
    kept = _largest(keys, live, tl.load(COUNTS + row))
    tl.store(MASK + row * m + at, kept.to(tl.uint8), mask=live)


@triton.jit
def _share(WEIGHTS, MASK, m, part, least, CROSSING: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    live = at < m
    weights = tl.load(WEIGHTS + row * m + at, mask=live, other=0.0)
    keys = tl.minimum(weights.to(tl.int32, bitcast=True), 0x7F800000)  # NaN as infinity: -1 below it is an int32
    low, high = -1, tl.max(keys)
    while low < high:  # for the lowest key such that what is above it fits
        middle = low + (high - low) // 2
        fits = tl.sum(tl.where(keys > middle, weights, 0.0)) <= part
        low, high = tl.where(fits, low, middle + 1), tl.where(fits, middle, high)
    kept = live & (keys > low)
    spare = part - tl.sum(tl.where(kept, weights, 0.0))
    tie = live & (keys == low)
    each = tl.max(tl.where(tie, weights, 0.0))
    number = tl.floor(spare / tl.where(each > 0, each, 1.0)).to(tl.int32) + (1 if CROSSING else 0)
    kept = kept | _first(tie, number)
    if tl.sum(kept.to(tl.int32)) < least:
        kept = _largest(keys, live, least)
    tl.store(MASK + row * m + at, kept.to(tl.uint8), mask=live)
