"""Sparse VideoGen (Xi et al., 2025, arXiv 2502.01776; github.com/svg-project/Sparse-VideoGen).

Each head is spatial (a band over frame-major tokens) or temporal (the same band over patch-major tokens), whichever
loses less on sampled query rows. The profiling bands are the official code's: |i - j| < floor(1.5 * frame / block).
Deviations: those bands for every model, where the official code has bands of 2 frames and the first frame's columns for
Wan; rows are sampled over the whole sequence as the paper says (the code draws from the first 10,000), and the executed
band is the number of block diagonals whose density is nearest to the one asked for. With `first_frame_sink` spatial
heads keep the first frame's keys too, profiled with them and within the sparsity; the official masks for Wan keep as
many first keys in temporal heads too, which there are the first places of every frame.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from draftbench.kernels.devices import product
from torch import Tensor

from ..attention import Call, Method, Plan
from ..hints import Count
from ..kernels.select import plan_from_mask
from ..layout import Index, even_sizes


@dataclass
class SVG(Method):
    """block: tokens; samples: profiled query rows; first_frame_sink: spatial heads keep the first frame's keys too."""

    block: Count = 128
    samples: Count = 64
    first_frame_sink: bool = False

    def plan(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Plan:
        """See `Method.plan`."""
        layout, device = call.layout, q.device
        temporal = self.temporal_heads(q, k, v, call)
        tokens = torch.arange(layout.video, device=device)
        order = Index(torch.where(temporal[..., None], patch_major(layout.grid, device), tokens))
        sizes = even_sizes(layout.video, self.block, device)
        density, sink = round(1 - self.sparsity, 9), layout.frame if self.first_frame_sink else 0
        mask = band_mask(layout.video, self.block, density, device).expand(len(q), q.shape[2], -1, -1)
        if sink:
            spatial = band_mask(layout.video, self.block, density, device, sink)
            mask = torch.where(temporal[..., None, None], mask, spatial)
        return plan_from_mask(mask, order, sizes, self.block, call)

    def temporal_heads(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Which heads are temporal, bool [B, H]: the lower error on sampled rows against their full attention."""
        frames, frame, video = call.layout.grid[0], call.layout.frame, call.layout.video
        verdict = []
        for item in range(len(q)):
            generator = call.generator(item, q.device)
            rows = torch.randint(video, (self.samples,), device=q.device, generator=generator)
            kept = self.bands(rows, video, frame, frames)
            errors = self.errors(q[item, rows], k[item], v[item], kept, call.text_lengths[item])
            verdict.append(errors[1] < errors[0])
        return torch.stack(verdict)

    def bands(self, rows: Tensor, video: int, frame: int, frames: int) -> Tensor:
        """Which video keys the spatial and the temporal profiling band keep of queries `rows`: [2, rows, video]."""
        place = torch.arange(video, device=rows.device)
        patch_place = (place % frame) * frames + place // frame  # where each token lies in patch-major order
        block = torch.stack([place, patch_place]) // self.block
        kept = (block[:, rows, None] - block[:, None]).abs() < max(1, int(1.5 * frame / self.block))
        if self.first_frame_sink:
            kept[0] |= place < frame
        return kept

    @staticmethod
    def errors(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, text: Tensor) -> Tensor:
        """Mean squared error [bands, H] of attention over the video keys that each band keeps [bands, rows, video] and
        all text, against full attention; q [rows, H, D], k, v [S, H, D], `text`: the real text tokens behind the video.

        One softmax for all: a band's weights are the full ones where it keeps them, over their sum. k and v are read
        where they lie, and on a GPU the products are in their precision with sums in float32: at 126,976 tokens, 24
        heads, 64 rows and D = 128 that is .8 GB of k and 2.3 of v, where copies in float32 would be 1.6 GB each, and
        some 8 GB of passes over the scores.
        """
        video = kept.shape[-1]
        scores = product(q.transpose(0, 1), k.permute(1, 2, 0)).mul_(q.shape[-1] ** -0.5)
        padding = torch.arange(len(k) - video, device=k.device) >= text
        scores[..., video:].masked_fill_(padding, -torch.inf)
        weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_().to(v.dtype)
        outputs = []
        for band in (torch.ones_like(kept[0]), *kept):
            part = weights * torch.nn.functional.pad(band, (0, len(k) - video), value=True)
            # A band all of whose weights underflow loses everything: its output is 0.
            total = part.sum(-1, keepdim=True, dtype=torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
            outputs.append(product(part, v.transpose(0, 1)) / total)
        return torch.stack([(out - outputs[0]).square().mean((1, 2)) for out in outputs[1:]])


@functools.lru_cache(maxsize=16)
def patch_major(grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Frame-major index of each place of the order by place in the frame, then frame, int64 [video]."""
    frames, frame = grid[0], grid[1] * grid[2]
    return torch.arange(frames * frame, device=device).view(frames, frame).T.flatten()


@functools.lru_cache(maxsize=64)
def band_mask(video: int, block: int, density: float, device: torch.device, sink: int = 0) -> Tensor:
    """Block diagonals [n, n] beside the columns of the first `sink` tokens, together nearest to a density of token
    pairs; at least the main one."""
    sizes = even_sizes(video, block, torch.device("cpu")).double()
    index = torch.arange(len(sizes))
    distance = (index[:, None] - index).abs()
    distance[:, index * block < sink] = 0
    pairs = torch.zeros(len(sizes), dtype=torch.float64)
    pairs.index_add_(0, distance.flatten(), (sizes[:, None] * sizes).flatten())
    reached = pairs.cumsum(0) / video**2
    reach = int((reached - density).abs().argmin())
    return (distance <= reach).to(device)
