"""The dense kernel of the reference video, of a method's dense steps and layers, and of every baseline timing."""

from __future__ import annotations

import functools
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


def name(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """The kernel of calls in a dtype on a device: fa4 (FlashAttention-4) or cudnn in half precision, else torch's sdpa.

    Measured on an H200 (results/tables/attention_h200.md): FlashAttention-4 before cuDNN. Our own, gluon on a list of
    all blocks, is 1.5% faster than it in a compiled step (steps_h200.md) and not told from it alone; that one is for
    the benchmarks to name, since a dense baseline that is not ours is the better witness.
    """
    if dtype == torch.float32 or device.type != "cuda" or torch.version.hip:
        return "sdpa"
    if torch.cuda.get_device_capability(device) < (8, 0):  # which cuDNN's attention needs
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
    return _every_pair(*q.shape[:3], q.device)


@functools.lru_cache(maxsize=1)  # a list of all blocks is 94 MB at 992 of them and 24 heads
def _every_pair(batch: int, length: int, heads: int, device: torch.device) -> tuple[Plan, Layout]:
    layout = Layout((1, 1, length))
    return every_pair(layout, torch.zeros(batch, dtype=torch.int64, device=device), heads), layout


def _attend(q: Tensor, k: Tensor, v: Tensor, kernel: str | None) -> Tensor:
    if kernel is None or q.dtype == torch.float32:
        kernel = name(q.device, q.dtype)
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
