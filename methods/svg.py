"""Sparse VideoGen (Xi et al., 2025, arXiv 2502.01776; github.com/svg-project/Sparse-VideoGen).

Each head is spatial (a band over frame-major tokens) or temporal (the same band over patch-major tokens), whichever
loses less on sampled query rows. The profiling bands are the official code's: |i - j| < floor(1.5 * frame / block).
Deviations: rows are sampled over the whole sequence as the paper says (the code draws from the first 10,000), and the
executed band is the number of block diagonals whose density is nearest to the one asked for.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import Call, Method, Plan
from ..kernels.select import plan_from_mask
from ..layout import Index, even_sizes


@dataclass
class SVG(Method):
    """block: tokens; samples: profiled query rows; first_frame_sink keeps the first frame's columns too."""

    block: int = 128
    samples: int = 64
    first_frame_sink: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("block", "samples"):
            if getattr(self, key) < 1:
                raise ValueError(f"method.{key} must be at least 1, got {getattr(self, key)}")

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """See `Method.plan`."""
        layout, device = call.layout, q.device
        temporal = self.temporal_heads(q, k, v, call)
        frames, frame = layout.grid[0], layout.frame
        tokens = torch.arange(layout.video, device=device)
        patch_major = tokens.view(frames, frame).T.flatten()
        order = Index(torch.where(temporal[..., None], patch_major, tokens))
        sizes = even_sizes(layout.video, self.block, device)
        band = band_mask(layout.video, self.block, round(1 - self.sparsity, 9), device)
        mask = band.expand(len(q), q.shape[2], -1, -1)
        if self.first_frame_sink:
            mask = mask | (~temporal[..., None, None] & (torch.arange(len(sizes), device=device) * self.block < frame))
        return plan_from_mask(mask, order, sizes, self.block, call)

    def temporal_heads(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Which heads are temporal, bool [B, H]: the lower error on sampled rows against their full attention."""
        layout, device = call.layout, q.device
        frames, frame, video = layout.grid[0], layout.frame, layout.video
        place = torch.arange(video, device=device)
        # Where each token lies in patch-major order.
        patch_place = (place % frame) * frames + place // frame
        reach = max(1, int(1.5 * frame / self.block))
        verdict = []
        for item in range(len(q)):
            generator = call.generator(item, device)
            rows = torch.randint(video, (self.samples,), device=device, generator=generator)
            real = video + call.text_lengths[item]
            live = torch.arange(q.shape[1], device=device) < real
            scores = torch.einsum("rhd,shd->hrs", q[item, rows].float(), k[item].float()) / q.shape[-1] ** 0.5
            scores = scores.masked_fill(~live, -torch.inf)
            values = v[item].float()
            full = torch.einsum("hrs,shd->hrd", scores.softmax(-1), values)
            errors = []
            for where in (place, patch_place):
                near = (where[rows] // self.block)[:, None] - where // self.block
                kept = torch.ones_like(scores[0], dtype=torch.bool)
                kept[:, :video] = near.abs() < reach
                part = torch.einsum("hrs,shd->hrd", scores.masked_fill(~kept, -torch.inf).softmax(-1), values)
                errors.append((part - full).square().mean((1, 2)))
            verdict.append(errors[1] < errors[0])
        return torch.stack(verdict)


@functools.lru_cache(maxsize=64)
def band_mask(video: int, block: int, density: float, device: torch.device) -> Tensor:
    """Block diagonals [n, n] nearest to a density of token pairs; at least the main one."""
    sizes = even_sizes(video, block, torch.device("cpu")).double()
    index = torch.arange(len(sizes))
    distance = (index[:, None] - index).abs()
    pairs = torch.zeros(len(sizes), dtype=torch.float64)
    pairs.index_add_(0, distance.flatten(), (sizes[:, None] * sizes).flatten())
    reached = pairs.cumsum(0) / video**2
    reach = int((reached - density).abs().argmin())
    return (distance <= reach).to(device)
