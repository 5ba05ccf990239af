"""Pocket's own quality checks: is the motion and the scene asked for the one seen, and is the clip sharp?

A small convolutional classifier, fitted on real clips only, sees frames 0, 2 and 4 of every five (so it tells turning
from strafing by parallax). Its weights are shipped beside pocket's; its score on held-out real clips is in
MODEL_CARD.md.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .prompts import MOTIONS, SCENES

SIZE = (64, 96)  # the classifier's input, whatever the clip's size
STRIDE = 2  # frames between the three that it compares


class Judge(nn.Module):
    """Clips uint8 [B, T, 3, h, w], at least five frames, to motion logits [B, 6] and scene logits [B, 6]."""

    def __init__(self, width: int = 32):
        super().__init__()
        sizes = (15, width, 2 * width, 2 * width, 3 * width)
        self.trunk = nn.Sequential(
            *(
                layer
                for a, b in itertools.pairwise(sizes)
                for layer in (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU())
            )
        )
        self.motion = nn.Linear(sizes[-1] * 24, len(MOTIONS))
        self.scene = nn.Linear(sizes[-1] * 24, len(SCENES))

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        batch, frames = clips.shape[:2]
        x = F.interpolate(clips.flatten(0, 1).float(), size=SIZE, mode="area") / 127.5 - 1
        x = x.view(batch, frames, 3, *SIZE)
        n = frames - 2 * STRIDE
        a, b, c = (x[:, i * STRIDE : i * STRIDE + n] for i in range(3))
        triples = torch.cat([a, b, c, 4 * (b - a), 4 * (c - b)], 2).flatten(0, 1)
        features = self.trunk(triples.to(self.motion.weight.dtype)).flatten(1).view(batch, n, -1).mean(1)
        return self.motion(features).float(), self.scene(features).float()


def sharpness(clips: Tensor) -> Tensor:
    """Mean gradient energy of each clip: squared differences of neighbouring pixels in [0, 1], [B] from uint8 clips."""
    x = clips.float() / 255
    dy, dx = x.diff(dim=-2).square(), x.diff(dim=-1).square()
    return dy.flatten(1).mean(1) + dx.flatten(1).mean(1)


def fit(clips: Tensor, motions: Tensor, scenes: Tensor, steps: int, seed: int) -> Judge:
    """Fit a judge on real clips uint8 [N, T, 3, h, w] with labels [N], on the clips' device.

    Noise and blur of random strength teach it to look at motion rather than at the renderer's crispness.
    """
    torch.manual_seed(seed)
    judge = Judge().to(clips.device)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(0, len(clips), (64,), device=clips.device)
        frames = clips.shape[1] // 2 if torch.rand(()) < 0.5 else clips.shape[1]  # the small grid has every other frame
        batch = clips[rows, :: clips.shape[1] // frames].flatten(0, 1).float()
        if torch.rand(()) < 0.5:
            batch = F.interpolate(F.avg_pool2d(batch, 4), scale_factor=4, mode="bilinear")
        batch = batch.unflatten(0, (64, frames))
        batch = batch + 16 * torch.rand(()) * torch.randn_like(batch)
        with torch.autocast(clips.device.type, torch.bfloat16):
            motion, scene = judge(batch)
        loss = F.cross_entropy(motion, motions[rows]) + F.cross_entropy(scene, scenes[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return judge.eval()


def load(path: Path) -> Judge:
    """The judge in a weights file, in evaluation mode, on the CPU."""
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def verdicts(judge: Judge, clips: Tensor) -> tuple[Tensor, Tensor]:
    """The motion and the scene [N] that the judge sees in clips uint8 [N, T, 3, h, w]."""
    seen = [judge(part) for part in clips.split(50)]
    return torch.cat([m for m, _ in seen]).argmax(1), torch.cat([s for _, s in seen]).argmax(1)
