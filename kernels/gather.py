"""Tokens in an order of each head's own, as a Triton kernel; `padded.take` chooses between it and torch's gather.

Floor at 33x48x80 tokens and 256 of text, 24 heads of 128, bfloat16: x read and the result written once, 1.6 GB, .36 ms
at 4.3 TB/s. torch's gather takes an index for each channel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TOKENS = 64  # of a program, which copies their channels of one head


def rows(x: Tensor, tokens: Tensor) -> Tensor:
    """As `padded.take`; x [B, S, H, D] with D a power of two, tokens int64 [B or 1, H or 1, P]."""
    batch, _, heads, dim = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    tokens = tokens.expand(batch, heads, -1)
    places = tokens.shape[-1]
    out = x.new_empty(batch, places, heads, dim)
    _rows[(heads * triton.cdiv(places, TOKENS), batch)](
        x, tokens, out, places, heads, *x.stride()[:3], *tokens.stride(), D=dim, TOKENS=TOKENS
    )
    return out


@triton.jit
def _rows(X, WHERE, OUT, places, heads, x_b, x_s, x_h, w_b, w_h, w_p, D: tl.constexpr, TOKENS: tl.constexpr):
    h = (tl.program_id(0) % heads).to(tl.int64)  # the fastest: programs side by side write one token's channels
    b = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) // heads * TOKENS + tl.arange(0, TOKENS)
    real = place < places
    token = tl.load(WHERE + b * w_b + h * w_h + place * w_p, mask=real, other=0).to(tl.int64)
    d = tl.arange(0, D)
    x = tl.load(X + b * x_b + h * x_h + token[:, None] * x_s + d[None, :], mask=real[:, None], other=0.0)
    to = ((b * places + place) * heads + h) * D
    tl.store(OUT + to[:, None] + d[None, :], x, mask=real[:, None])
