"""Sparse VideoGen 2 (Yang et al., 2025, arXiv 2505.18875; github.com/svg-project/Sparse-VideoGen).

Queries and keys are clustered per head by k-means (random tokens to begin with and 50 rounds at the first call of a
layer, then 2 rounds from the centroids of its last one), and lie cluster by cluster. For each query cluster, key
clusters are kept by the weights |K_j| exp(q . k_j / sqrt(D)) of their centroids until their sum passes top_p, a tenth
of them at least. Text stays dense.
A record's `parts_ms` are those of a first step, with its 50 rounds.
Deviations: a cluster of more than `block` tokens is cut into blocks of that size, which are kept together, for the
executors' sake; a batch clusters all its items; rounds do not stop early where the centroids have come to rest (that
would wait for the device); dense steps cluster nothing, where the scripts for HunyuanVideo begin with them.

The official scripts take 1000 clusters of keys at every size, from 32,760 tokens to 118,800, so null is 1000 and never
fewer than 32 tokens, or a smaller block, to each; and 200 of queries at 32,760 and 44,550, 300 at 75,600, 400 at
118,800: null is 1.1 times the root of the tokens, 199, 232, 302 and 379 there.

Its knob is top_p, .9 in the paper; `sparsity` means one calibrated top_p, and then one cluster is the floor, since a
tenth would forbid 90%.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attention import Call, Plan
from ..hints import Count, CountOrNull, Share
from ..kernels.kmeans import kmeans
from ..kernels.select import Cut, cut_plan, keep_share
from ..knob import Knobbed
from ..layout import Index
from ..parts import part


@dataclass
class SVG2(Knobbed):
    """top_p: the original's knob; floor: share of the key clusters kept at least beside a given top_p.

    q_clusters, k_clusters: their numbers, null as the official scripts scale them; first, next: rounds of k-means.
    """

    top_p: float | None = None
    floor: Share = 0.1
    q_clusters: CountOrNull = None
    k_clusters: CountOrNull = None
    first: Count = 50
    next: Count = 2
    block: Count = 128
    knob: ClassVar[str] = "top_p"

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """See `Method.plan`; the centroids are kept in the call's state."""
        order, centroids, sizes = zip(*(self.cluster(x, name, call) for x, name in ((q, "q"), (k, "k"))), strict=True)
        with part("score"):
            scores = centroids[0] @ centroids[1].mT * q.shape[-1] ** -0.5 + sizes[1][:, :, None].log()
            weights = scores.softmax(-1)  # of an empty cluster 0
        least = 1 if self.asked else max(1, int(self.floor * weights.shape[-1]))
        mask = keep_share(weights, self.value, least)
        with part("list"):
            queries, q_owner = self.cut(order[0], sizes[0])
            keys, k_owner = self.cut(order[1], sizes[1])
            n, m = q_owner.shape[-1], k_owner.shape[-1]
            kept = mask.gather(2, q_owner[..., None].expand(-1, -1, -1, mask.shape[-1]))
            kept = kept.gather(3, k_owner[:, :, None].expand(-1, -1, n, m))
            kept &= (queries.sizes > 0)[..., None] & (keys.sizes > 0)[:, :, None]
        return cut_plan(kept, queries, keys, call)

    def cluster(self, x: Tensor, name: str, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """(Video tokens by cluster [B, H, video], centroids [B, H, C, D], sizes [B, H, C]) of x [B, S, H, D]."""
        video = call.layout.video
        x = x[:, :video].transpose(1, 2)
        count = min(video, self.clusters(video)[name])
        centroids = call.state.get(name)
        rounds = self.next if centroids is not None else self.first
        if centroids is None:
            draws = [self.draw(x[item], count, call.generator(item, x.device)) for item in range(len(x))]
            centroids = torch.stack(draws)
        with part("pool"):
            order, centroids, sizes = kmeans(x, centroids, rounds)
        call.state[name] = centroids
        return order, centroids, sizes

    def clusters(self, video: int) -> dict[str, int]:
        """How many clusters of queries ("q") and of keys ("k") so many tokens are to have."""
        return {
            "q": self.q_clusters or max(1, round(1.1 * video**0.5)),
            "k": self.k_clusters or max(1, min(1000, video // min(32, self.block))),
        }

    @staticmethod
    def draw(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Tokens drawn at random, float32 [H, count, D], of x [H, S, D]."""
        where = torch.randint(x.shape[1], (x.shape[0], count), device=x.device, generator=generator)
        return x.gather(1, where[..., None].expand(-1, -1, x.shape[-1])).float()

    def cut(self, order: Tensor, sizes: Tensor) -> tuple[Cut, Tensor]:
        """`kmeans`' order in blocks of at most `block` tokens of one cluster, and the cluster of each [B, H, blocks].

        As many blocks as there can ever be, so that nothing waits for the device; the last are empty.
        """
        number = sizes.shape[-1] + order.shape[-1] // self.block
        pieces = (sizes + self.block - 1) // self.block
        ends = pieces.cumsum(-1)
        place = torch.arange(number, device=sizes.device).expand(*sizes.shape[:2], -1).contiguous()
        owner = torch.searchsorted(ends, place, right=True).clamp(max=sizes.shape[-1] - 1)
        rank = place - (ends - pieces).gather(2, owner)
        left = sizes.gather(2, owner) - rank * self.block
        return Cut(Index(order), left.clamp(0, self.block), self.block), owner
