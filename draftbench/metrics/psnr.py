"""Peak signal-to-noise ratio."""

from __future__ import annotations

from torch import Tensor

from . import check_frames

CAP_DB = 100.0


def psnr_db(frames: Tensor, reference: Tensor) -> float:
    """Mean over frames of each frame's PSNR in dB, range 255, at most 100 dB (identical frames have no finite one).

    frames, reference: uint8 [T, 3, h, w]. Higher is nearer. Pooling squared errors over all frames instead, as some
    libraries do by default, gives another number.
    """
    check_frames(frames, reference)
    error = (frames.double() - reference.double()).square().flatten(1).mean(1)
    return float((10 * (255.0**2 / error).log10()).clamp(max=CAP_DB).mean())
