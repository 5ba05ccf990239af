"""Lloyd's k-means over many heads at once; deterministic on every device, and it never waits for one.

Plain torch is the reference and the way on a CPU; half precision on a GPU goes to the kernels in `clusters.py`, which
keep no distances and gather no rows.
"""

from __future__ import annotations

import torch
from draftbench.kernels.devices import on_device_of, product
from draftbench.kernels.select import fast
from torch import Tensor

MOST = 2**27  # distances at a time


def kmeans(x: Tensor, centroids: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """(Tokens by cluster int64 [B, H, S], centroids [B, H, C, D] float32, sizes int64 [B, H, C]).

    x: [B, H, S, D]; centroids: where to begin; rounds: at least 1. Each round assigns tokens to the nearest of the
    centroids of the round before, the first of equals, and moves every centroid to the mean of its tokens, or leaves it
    if it has none; so the order and the sizes are those of the last assignment, and the centroids are the means of it.
    A cluster's tokens come one after the other, as they lie in x.
    """
    assign, move = nearest, means
    if fast(x) and x.element_size() == 2:  # torch's own products are the better ones for float32
        from draftbench.kernels import clusters

        assign, move = clusters.nearest, clusters.means
    with on_device_of(x):
        for _ in range(rounds):
            order, starts = by_cluster(assign(x, centroids), centroids.shape[2])
            centroids = move(x, order, starts, centroids)
    return order, centroids, starts.diff().view(centroids.shape[:3])


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each token, an integer [B, H, S]; products in the precision of x, added in float32."""
    batch, heads, length, dim = x.shape
    x, centroids = x.reshape(-1, length, dim), centroids.flatten(0, 1)
    half = centroids.square().sum(-1)[:, None] / 2
    low = centroids.to(x.dtype).mT
    chunks = x.split(max(1, MOST // (len(x) * low.shape[-1])), 1)
    return torch.cat([(product(chunk, low) - half).argmax(-1) for chunk in chunks], 1).view(batch, heads, length)


def by_cluster(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(Tokens by cluster int64 [B, H, S], where clusters start in all of them int64 [B * H * count + 1]), by one sort.

    labels: integers [B, H, S] below `count`. Keys of 16 bits where they suffice: a radix sort reads them half as often.
    """
    batch, heads, length = labels.shape
    total, device = batch * heads * count, labels.device
    dtype = torch.int16 if total < 2**15 else torch.int32
    first = torch.arange(0, total, count, dtype=labels.dtype, device=device).view(batch, heads, 1)
    keys, order = (labels + first).to(dtype).flatten().sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(total + 1, dtype=dtype, device=device))
    return order.view(batch, heads, length) % length, starts


def means(x: Tensor, order: Tensor, starts: Tensor, centroids: Tensor) -> Tensor:
    """The mean of each cluster's tokens, as `by_cluster` has them, or its centroid if it has none; [B, H, C, D]."""
    rows = x.gather(2, order[..., None].expand(x.shape)).flatten(0, 2).float()
    sizes = starts.diff()  # not checked, which would wait for the device
    totals = torch.segment_reduce(rows, "sum", lengths=sizes, unsafe=True).view(centroids.shape)
    sizes = sizes.view(*centroids.shape[:3], 1)
    return torch.where(sizes > 0, totals / sizes.clamp(min=1), centroids)
