"""Structural similarity (Wang et al., 2004)."""

from __future__ import annotations

from torch import Tensor

from . import check_frames


def ssim(frames: Tensor, reference: Tensor) -> float:
    """Mean SSIM over frames, at most 1: an 11x11 Gaussian window of sigma 1.5, range 255, the mean of the channels.

    Windows that lie within the frame only, as in the paper and scikit-image.

    frames, reference: uint8 [T, 3, h, w], at least 11 pixels a side.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    check_frames(frames, reference)
    if min(frames.shape[2:]) < 11:
        raise ValueError(f"SSIM needs frames of at least 11x11 pixels, got {frames.shape[2]}x{frames.shape[3]}")
    _, full = structural_similarity_index_measure(
        frames.float(), reference.float(), gaussian_kernel=True, sigma=1.5, kernel_size=11, data_range=255.0,
        return_full_image=True,
    )  # fmt: skip
    return float(full[..., 5:-5, 5:-5].mean())  # torchmetrics also averages over windows that hang over the border
