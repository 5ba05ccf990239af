"""Model adapters: one file a family. An adapter generates clips and routes every self-attention call to a session."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..attention import Request, Session


class Model(Protocol):
    """What a benchmark asks of a model.

    name: as in conf/model; weights_hash: SHA-256 of the weights, hexadecimal; device: where it runs; dtype: of its
    attention, as torch names it; grid: the token grid (T, H, W); layers: its self-attentions; heads: of each;
    steps: the sampler's steps if a request names none; switches: the steps from which another of its networks runs, ()
    of one network; fps: frames a second of the videos.
    One whose clips can't be judged says why as `no_quality`; its clips have no frames.
    """

    name: str
    weights_hash: str
    device: torch.device
    dtype: str
    grid: tuple[int, int, int]
    layers: int
    heads: int
    steps: int
    switches: tuple[int, ...]
    fps: int

    def check(self, prompts: list[str]) -> None:
        """Raise ValueError, naming the prompt and what is allowed, for one that the model cannot take."""
        ...

    def check_memory(self) -> None:
        """Raise ValueError, with both numbers, if what surely has to be held is more than this machine has."""
        ...

    def generate(self, request: Request, session: Session, last_step: int | None = None) -> Tensor:
        """Clips uint8 RGB [B, T, 3, h, w] on the CPU, one a prompt and seed of the request.

        Calls `session.start(clips, switches)` once, `session.at_step(index, steps, timestep)` before each step,
        `session(q, k, v, ...)` at each self-attention and `session.finish()` after the last step and before decoding.
        `last_step` stops after that many steps (for timing). The unpatched model is restored always, also after an
        exception.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """Everything but weights, prompts, seeds and steps that shapes the frames, as JSON values."""
        ...
