"""The dense kernel of the reference video, of a method's dense steps and layers, and of every baseline timing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from draftbench.kernels import fa4
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..layout import Layout


def name(device: torch.device) -> str:
    """The kernel of half-precision calls on a device, the fastest that is there: fa4 (FlashAttention-4), cudnn or sdpa.

    Measured on an H200 (results/tables/attention_h200.md): FlashAttention-4 before cuDNN.
    """
    if device.type != "cuda":
        return "sdpa"
    return "cudnn" if fa4.unavailable(device) else "fa4"


def run(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, text_lengths: Sequence[int] | Tensor, kernel: str | None = None
) -> Tensor:
    """Dense attention [B, S, H, D] over the real tokens of each item; rows of text padding come out as zero.

    kernel: one of `name`'s, null its choice; torch's own in float32, cuDNN for head dims that FlashAttention-4 does not
    take. Items of
    different real text lengths run one by one with their padding cropped, since a mask would keep the call off the
    fast kernels.
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


def _attend(q: Tensor, k: Tensor, v: Tensor, kernel: str | None) -> Tensor:
    kernel = "sdpa" if q.dtype == torch.float32 else kernel or name(q.device)
    if kernel == "fa4" and q.shape[-1] in fa4.HEAD_DIMS:
        from flash_attn.cute.interface import _flash_attn_fwd

        out: Tensor = _flash_attn_fwd(q, k, v)[0]
        return out
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
