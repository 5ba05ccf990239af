"""The dense kernel of the reference video, of a method's dense steps and layers, and of every baseline timing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from draftbench.kernels import fa4
from draftbench.kernels import run as executor
from draftbench.kernels import unavailable as executor_unavailable
from draftbench.kernels.select import every_pair
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import Plan
from ..layout import Layout

KERNELS = ("gluon", "fa4", "cudnn", "sdpa")


def name(device: torch.device) -> str:
    """The kernel of half-precision calls on a device, the fastest that is there: fa4 (FlashAttention-4), cudnn or sdpa.

    Measured on an H200 (results/tables/attention_h200.md): FlashAttention-4 before cuDNN. Our own, gluon on a list of
    all blocks, cannot be told from FlashAttention-4 there; it is for the benchmarks to name.
    """
    if device.type != "cuda":
        return "sdpa"
    return "cudnn" if fa4.unavailable(device) else "fa4"


def unavailable(kernel: str, device: torch.device) -> str | None:
    """Why one of `KERNELS` cannot run on a device, or None."""
    if kernel in ("gluon", "fa4"):
        return executor_unavailable(kernel, device)
    return f"it needs a CUDA device, got device={device.type}" if kernel == "cudnn" and device.type != "cuda" else None


def run(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, text_lengths: Sequence[int] | Tensor, kernel: str | None = None
) -> Tensor:
    """Dense attention [B, S, H, D] over the real tokens of each item; rows of text padding come out as zero.

    kernel: one of `KERNELS`, None the choice of `name`, and cuDNN for head dims that FlashAttention-4 does not take;
    torch's own in float32. Items of different real text lengths run one by one with their padding cropped, since a mask
    would keep the call off the fast kernels.
    """
    text = text_lengths.tolist() if isinstance(text_lengths, Tensor) else text_lengths
    lengths = [layout.video + n for n in text] if layout.text else [layout.video] * len(q)
    if all(length == q.shape[1] for length in lengths):
        return _attend(q, k, v, kernel)
    out = torch.zeros_like(q)
    for item, length in enumerate(lengths):
        rows = slice(item, item + 1)
        out[rows, :length] = _attend(q[rows, :length], k[rows, :length], v[rows, :length], kernel)
    return out


def everything(q: Tensor) -> tuple[Plan, Layout]:
    """Dense attention of q [B, S, H, D] as a plan for an executor, tokens as they come."""
    layout = Layout((1, 1, q.shape[1]))
    return every_pair(layout, torch.zeros(len(q), dtype=torch.int64, device=q.device), q.shape[2]), layout


def _attend(q: Tensor, k: Tensor, v: Tensor, kernel: str | None) -> Tensor:
    if q.dtype == torch.float32:
        kernel = "sdpa"
    elif kernel is None:
        kernel = name(q.device)
        if kernel == "fa4" and q.shape[-1] not in fa4.HEAD_DIMS:
            kernel = "cudnn"
    if kernel == "fa4":
        from flash_attn.cute.interface import _flash_attn_fwd

        out: Tensor = _flash_attn_fwd(q, k, v)[0]
        return out
    if kernel == "gluon":
        return executor("gluon")(q, k, v, *everything(q))[0]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
