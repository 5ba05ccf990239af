"""Pocket's own quality checks: is the motion and the scene asked for the one seen, and is the clip sharp?

A small convolutional classifier, fitted on real clips only, sees neighbouring frames (so it tells turning from
strafing by parallax). Its weights are shipped beside pocket's; its score on held-out real clips is in MODEL_CARD.md.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .prompts import MOTIONS, SCENES

SIZE = (64, 96)  # the classifier's input, whatever the clip's size


class Judge(nn.Module):
    """Clips uint8 [B, T, 3, h, w] to motion logits [B, 6] and scene logits [B, 6]."""

    def __init__(self, width: int = 32):
        super().__init__()
        sizes = (9, width, 2 * width, 2 * width, 3 * width)
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
        pairs = torch.cat([x[:, :-1], x[:, 1:], 4 * (x[:, 1:] - x[:, :-1])], 2).flatten(0, 1)
        features = self.trunk(pairs.to(self.motion.weight.dtype)).flatten(1).view(batch, frames - 1, -1).mean(1)
        return self.motion(features).float(), self.scene(features).float()


def sharpness(clips: Tensor) -> Tensor:
    """Mean gradient energy of each clip: squared differences of neighbouring pixels in [0, 1], [B] from uint8 clips."""
    x = clips.float() / 255
    dy, dx = x.diff(dim=-2).square(), x.diff(dim=-1).square()
    return dy.flatten(1).mean(1) + dx.flatten(1).mean(1)


def fit(clips: Tensor, motions: Tensor, scenes: Tensor, steps: int, seed: int) -> Judge:
    """Fit a judge on real clips uint8 [N, T, 3, h, w] with labels [N], on the clips' device."""
    torch.manual_seed(seed)
    judge = Judge().to(clips.device)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(0, len(clips), (64,), generator=draw)
        frames = 8 if torch.rand((), generator=draw) < 0.5 else clips.shape[1]
        batch = clips[rows.to(clips.device), :frames].float()
        batch = batch + 12 * torch.rand((), generator=draw) * torch.randn_like(batch)
        with torch.autocast(clips.device.type, torch.bfloat16):
            motion, scene = judge(batch)
        rows = rows.to(motions.device)
        loss = F.cross_entropy(motion, motions[rows]) + F.cross_entropy(scene, scenes[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def score(judge: Judge, clips: Tensor, motions: Tensor, scenes: Tensor) -> dict[str, float]:
    """Share of clips whose motion and scene are the ones asked for, and mean sharpness."""
    right_motion, right_scene = [], []
    for start in range(0, len(clips), 50):
        rows = slice(start, start + 50)
        motion, scene = judge(clips[rows])
        right_motion.append(motion.argmax(1) == motions[rows])
        right_scene.append(scene.argmax(1) == scenes[rows])
    return {
        "motion": torch.cat(right_motion).float().mean().item(),
        "scene": torch.cat(right_scene).float().mean().item(),
        "sharpness": sharpness(clips).mean().item(),
    }
