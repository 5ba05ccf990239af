"""Flow-matching Euler sampler with classifier-free guidance for an x-predicting model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .prompts import LENGTH


def noise_levels(steps: int, shift: float) -> list[float]:
    """`steps` + 1 noise levels from 1 to 0; shift > 1 spends more steps at high noise."""
    line = [1 - i / steps for i in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in line]


def initial_noise(seeds: list[int], shape: tuple[int, int, int, int]) -> Tensor:
    """Noise [len(seeds), T, 3, h, w], each clip from its own CPU generator, so a batch never changes a clip."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: Tensor,
    tokens: Tensor,
    steps: int,
    shift: float,
    guidance: float,
    on_step: Callable[[int, float], None] = lambda step, level: None,
    last_step: int | None = None,
) -> Tensor:
    """Generate clips uint8 [B, T, 3, h, w] from noise of that shape and prompt ids [B, LENGTH].

    Both guidance branches run as one batch, conditional first. `on_step(index, noise level)` is called before each
    step; `last_step` stops early (for timing), after that many steps.
    """
    levels = noise_levels(steps, shift)
    x, batch = noise, len(noise)
    both = torch.cat([tokens, torch.zeros(batch, LENGTH, dtype=tokens.dtype, device=tokens.device)])
    for i in range(steps if last_step is None else min(steps, last_step)):
        on_step(i, levels[i])
        t = torch.full((2 * batch,), levels[i], device=x.device)
        cond, free = model(torch.cat([x, x]), t, both).float().chunk(2)
        clean = free + guidance * (cond - free)
        x = x + (x - clean) / levels[i] * (levels[i + 1] - levels[i])
    if not x.isfinite().all():
        raise RuntimeError("the generated frames are not finite")
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
