"""Fidelity of a clip to its dense reference: pure functions of uint8 frames [T, 3, h, w], one file each."""

from __future__ import annotations

import torch
from torch import Tensor


def check_frames(frames: Tensor, reference: Tensor) -> None:
    """Raise TypeError or ValueError unless both are uint8 [T, 3, h, w] of one shape."""
    for name, clip in (("frames", frames), ("reference", reference)):
        if clip.dtype != torch.uint8:
            raise TypeError(f"{name} must be uint8, got {clip.dtype}")
        if clip.ndim != 4 or clip.shape[1] != 3:
            raise ValueError(f"{name} must be [T, 3, h, w], got {list(clip.shape)}")
    if frames.shape != reference.shape:
        raise ValueError(f"frames and reference must have one shape, got {list(frames.shape)}, {list(reference.shape)}")
