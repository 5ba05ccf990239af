"""Lloyd's k-means over many heads at once, in torch; deterministic on every device, and it never waits for one."""

from __future__ import annotations

import torch
from draftbench.kernels.devices import product
from torch import Tensor

MOST = 2**27  # distances at a time


def kmeans(x: Tensor, centroids: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """(Nearest centroid of each token int64 [B, H, S], centroids [B, H, C, D] float32, sizes int64 [B, H, C]).

    x: [B, H, S, D]; centroids: where to begin. Each round assigns tokens to the centroids of the round before and moves
    every centroid to the mean of its tokens, or leaves it if it has none; so labels and sizes are those of the last
    assignment, and the centroids are the means of it.
    """
    batch, heads, length, dim = x.shape
    count = centroids.shape[2]
    x, centroids = x.reshape(-1, length, dim), centroids.flatten(0, 1)
    chunks = x.split(max(1, MOST // (len(x) * count)), 1)
    for _ in range(rounds):
        half = centroids.square().sum(-1)[:, None] / 2
        low = centroids.to(x.dtype)
        totals, sizes, labels = torch.zeros_like(centroids), half.new_zeros(len(x), count), []
        for chunk in chunks:
            nearest = (product(chunk, low.mT) - half).argmax(-1)
            labels.append(nearest)
            members = torch.zeros(*nearest.shape, count, dtype=x.dtype, device=x.device).scatter_(
                2, nearest[..., None], 1
            )
            totals += product(members.mT, chunk)  # a product, since sums by index have no fixed order on a GPU
            sizes += members.sum(1, dtype=torch.float32)
        centroids = torch.where(sizes[..., None] > 0, totals / sizes[..., None].clamp(min=1), centroids)
    shape = (batch, heads)
    return torch.cat(labels, 1).unflatten(0, shape), centroids.unflatten(0, shape), sizes.long().unflatten(0, shape)
