"""The two halves of a round of k-means as Triton kernels: each token's nearest centroid, and the means of clusters.

`kmeans.py` is the reference and chooses between the two. Nothing synchronises with the host and no float is added
atomically: results are the same from run to run, and up to rounding whatever `LAUNCH` says.

Floors of a round at 33x48x80 tokens, 24 heads of 128, bfloat16 (778 MB a tensor), at 500 TFLOP/s and 3 TB/s:

- `nearest` forms the product of each token and centroid once and keeps none: 2 S C D, .78 TFLOP and 1.6 ms for 1000
  centroids, .3 and .6 for 391. It reads x once, .26 ms, and a head's centroids from L2 for every tile of tokens: 6 GB
  for 1000 of them and 128 tokens a tile. A score costs one comparison and two selections, .6 ms at 64 a clock and SM,
  behind which the products of other programs on the SM can go on: tiles are such that two fit one at least.
- `means` reads x once in the order of clusters, a row at a time: .26 ms.

On one H100 (torch 2.11.0, Triton 3.6.0), the best of twelve tiles: `nearest` 1.78 ms for 1000 centroids and 1.03 for
391, `means` .37 and .39, the sort between them .23, each timed alone; two rounds of both, one after the other, 7.3.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Launch parameters: M tokens x N centroids of a tile, R tokens at a time.
LAUNCH = {
    "nearest": {"M": 128, "N": 64, "num_warps": 4, "num_stages": 2},
    "means": {"R": 32, "num_warps": 4},
}


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """As `kmeans.nearest`, int32, of x [B, H, S, D] in bfloat16 or float16, which is read by its strides."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, length, dim = x.shape
    count, width, launch = centroids.shape[2], _width(dim), LAUNCH["nearest"]
    m, n = (min(launch[side], _width(size)) for side, size in (("M", length), ("N", count)))
    more = -count % n  # centroids that fill the last tile and are never the nearest
    half = torch.nn.functional.pad(centroids.square().sum(-1) / 2, (0, more), value=torch.inf)
    low = torch.nn.functional.pad(centroids.to(x.dtype), (0, width - dim, 0, more))
    labels = torch.empty(batch, heads, length, dtype=torch.int32, device=x.device)
    _nearest[(-(-length // m), batch * heads)](
        x, low, half, labels, heads, length, count + more, *x.stride()[:3], D=dim, WIDTH=width,
        UPCAST=INTERPRETED, LEVELS=(n // 8).bit_length() - 1, **launch | {"M": m, "N": n},
    )  # fmt: skip
    return labels


def means(x: Tensor, order: Tensor, starts: Tensor, centroids: Tensor) -> Tensor:
    """As `kmeans.means`; `order` and `starts` as `by_cluster` has them."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    heads, length, dim = x.shape[1:]
    moved, centroids = torch.empty_like(centroids, memory_format=torch.contiguous_format), centroids.contiguous()
    _means[(starts.numel() - 1,)](
        x, order, starts, centroids, moved, heads, length, centroids.shape[2], *x.stride()[:3], D=dim,
        WIDTH=_width(dim), **LAUNCH["means"],
    )  # fmt: skip
    return moved


def _width(size: int) -> int:
    """The side of a tile that holds `size`: a power of two, at least 16 (what tl.dot takes)."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def _pairs(x):
    """The even and the odd eights of columns of x [M, 2 * W], each [M, W]."""
    M: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1] // 2
    even, odd = tl.split(tl.permute(tl.reshape(x, [M, W // 8, 2, 8]), (0, 1, 3, 2)))
    return tl.reshape(even, [M, W]), tl.reshape(odd, [M, W])


@triton.jit
def _nearest(
    X, LOW, HALF, LABELS, heads, length, count, x_b, x_h, x_s,
    D: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """The largest x . c - |c|^2 / 2 of M tokens over all centroids, LOW [slots, count, WIDTH], HALF [slots, count].

    Eight columns stay apart until the end: a thread has the same ones of every tile, so that within the loop threads
    exchange nothing, and it holds no more than the tile's scores.
    """
    slot = tl.program_id(1).to(tl.int64)
    rows, d = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, WIDTH)
    real = rows < length
    x = X + slot // heads * x_b + slot % heads * x_h + rows.to(tl.int64)[:, None] * x_s + d[None, :]
    x = tl.load(x, mask=real[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    columns = tl.arange(0, N)
    low, half = LOW + slot * count * WIDTH, HALF + slot * count
    best, where = tl.full([M, 8], -float("inf"), tl.float32), tl.zeros([M, 8], tl.int32)
    for first in range(0, count, N):
        c = tl.load(low + (first + columns)[:, None] * WIDTH + d[None, :])
        if UPCAST:
            c = c.to(tl.float32)
        score = tl.dot(x, tl.trans(c)) - tl.load(half + first + columns)[None, :]
        which = tl.broadcast_to((columns // 8)[None, :], [M, N])
        for _ in tl.static_range(LEVELS):
            # Neighbours, so that what is left of two stands for the lower columns and wins if they are equal.
            score, other = _pairs(score)
            which, others = _pairs(which)
            later = other > score
            score, which = tl.where(later, other, score), tl.where(later, others, which)
        later = score > best
        best, where = tl.where(later, score, best), tl.where(later, first // 8 + which, where)
    column = where * 8 + tl.arange(0, 8)[None, :]
    column = tl.where(best == tl.max(best, 1)[:, None], column, count)
    tl.store(LABELS + slot * length + rows, tl.min(column, 1), mask=real)


@triton.jit
def _means(
    X, ORDER, STARTS, OLD, NEW, heads, length, count, x_b, x_h, x_s,
    D: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The mean of one cluster's rows of x, or its old centroid if it has none."""
    cluster = tl.program_id(0)
    slot = (cluster // count).to(tl.int64)
    first, end = tl.load(STARTS + cluster), tl.load(STARTS + cluster + 1)
    d = tl.arange(0, WIDTH)
    x = X + slot // heads * x_b + slot % heads * x_h + d[None, :]
    total = tl.zeros([R, WIDTH], tl.float32)
    for row in range(first, end, R):
        rows = row + tl.arange(0, R)
        real = rows < end
        token = tl.load(ORDER + rows, mask=real, other=0)
        total += tl.load(x + token[:, None] * x_s, mask=real[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    at = cluster.to(tl.int64) * D + d
    mean = tl.div_rn(tl.sum(total, 0), tl.maximum(end - first, 1).to(tl.float32))  # rounded as torch does
    tl.store(NEW + at, tl.where(end > first, mean, tl.load(OLD + at, mask=d < D, other=0.0)), mask=d < D)
