"""XAttention's map of blocks by antidiagonals as Triton kernels that keep no scores.

`methods/xattention.py` is the reference and chooses between the two. A group is `stride` tokens, queries in reverse and
keys in turn; the product of two groups, over stride * D, is a score. Nothing synchronises with the host and no float is
added atomically: results are the same from run to run.

- `_sums` is a plain matrix product whose tiles end in powers instead of scores: of each query group the log of the sum
  over each key block. Logs need no maximum of the whole row, so that no tile waits for another.
- `_mean` turns a row of logs into weights that sum to one, and takes the mean over the groups of a query block.

The copy engine takes tiles from where q and k lie, as [B, H, stride, groups, D]: a step of the product reads one token
of each group, counted from the end for queries, and what lies beyond the last group comes as zeros.

Floors at 126,720 tokens, 24 heads of 128, stride 8, blocks of 128, bfloat16, at 600 TFLOP/s and 3 TB/s: products, 2 g^2
stride D for g = 15,840 groups, are 12 TFLOP, 20 ms; powers, 6 G at 16 a clock and SM and 1.75 GHz on 132 SMs, 1.6 ms,
beside which no product runs unless another program's does; logs, 1.5 GB written once and read once, 1 ms. Tiles of 128
x 256 groups read 12 TFLOP / 170 a byte = 70 GB from L2. Measured on one H200, the choice of blocks in it:
25.4 ms (results/tables/methods.md); in torch, which wrote the scores, it was 113 on one H100.
"""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl
from draftbench.kernels.devices import side_by_side
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WORKSPACE = 2**29  # bytes of logs; heads that do not fit wait their turn
AMPLE = 200 * 1024  # bytes of shared memory that a program of "half" may take
# Launch parameters: a tile of M x N groups, C channels at a time, BAND tiles of queries that share keys in L2.
LAUNCH = {
    "half": {"M": 128, "N": 256, "C": 64, "BAND": 8, "num_warps": 8, "num_stages": 4},
    "narrow": {"M": 128, "N": 128, "C": 32, "BAND": 8, "num_warps": 8, "num_stages": 3},
    "single": {"M": 64, "N": 64, "C": 16, "BAND": 8, "num_warps": 8, "num_stages": 2},
}


def launch(x: Tensor) -> dict[str, int]:
    """The launch parameters for x: by its precision, and by the shared memory of its GPU."""
    if x.element_size() > 2:
        return LAUNCH["single"]
    if x.is_cuda and triton.runtime.driver.active.utils.get_device_properties(x.device.index)["max_shared_mem"] < AMPLE:
        return LAUNCH["narrow"]
    return LAUNCH["half"]


def takes(x: Tensor, each: int) -> bool:
    """Whether tiles of x are made of whole key blocks of `each` groups."""
    return launch(x)["N"] % each == 0


def block_map(q: Tensor, k: Tensor, video: int, block: int, stride: int) -> Tensor:
    """As `xattention.antidiagonal_map`, of what `takes` allows; scores are float32 here, whatever q and k are."""
    batch, _, heads, dim = q.shape
    groups, n, each, constants = -(-video // stride), -(-video // block), block // stride, launch(q)
    m, side, c = constants["M"], constants["N"], min(constants["C"], max(16, triton.next_power_of_2(dim)))
    low_q, low_k = _grouped(q, video, stride, [m, c]), _grouped(k, video, stride, [side, c])
    tiles, width = -(-groups // m) * -(-groups // side), triton.next_power_of_2(n)
    at_once = min(batch * heads, max(1, WORKSPACE // (4 * groups * n)))
    logs = torch.empty(at_once, groups, n, dtype=torch.float32, device=q.device)
    weights = torch.empty(batch * heads, n, n, dtype=torch.float32, device=q.device)
    for first in range(0, batch * heads, at_once):
        some = weights[first : first + at_once]
        _sums[(tiles, len(some))](
            low_q, low_k, logs, math.log2(math.e) * dim**-0.5 / stride, first, heads, groups, n,
            STRIDE=stride, CHUNKS=-(-dim // c), EACH=each, UPCAST=INTERPRETED and q.element_size() == 2,
            **constants | {"C": c},
        )  # fmt: skip
        _mean[(n, len(some))](logs, some, groups, n, EACH=each, WIDTH=width, num_warps=min(16, max(1, width // 256)))
    return weights.unflatten(0, (batch, heads))


def _grouped(x: Tensor, video: int, stride: int, tile: list[int]) -> TensorDescriptor:
    """The video of x [B, S, H, D] as [B, H, stride, groups, D], in tiles of [groups, channels] of one token each."""
    if video % stride or not side_by_side(x):  # a copy, whose last group zeros fill, with steps of 16 bytes
        fill = (0, -x.shape[-1] % (16 // x.element_size()), 0, 0, 0, -video % stride)
        x = torch.nn.functional.pad(x[:, :video], fill).contiguous()
        video = x.shape[1]
    return TensorDescriptor.from_tensor(
        x[:, :video].unflatten(1, (-1, stride)).permute(0, 3, 2, 1, 4), [1, 1, 1, *tile]
    )


@triton.jit
def _sums(
    Q, K, LOGS, scale, first, heads, groups, blocks,
    STRIDE: tl.constexpr, CHUNKS: tl.constexpr, EACH: tl.constexpr, UPCAST: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Log2 of the sums of M query groups' powers over N // EACH key blocks, into LOGS [slots, groups, blocks]."""
    slot = tl.program_id(1)
    b, h = (first + slot) // heads, (first + slot) % heads
    # Programs in turn go down a band of BAND tiles of queries, and along it.
    tiles = BAND * tl.cdiv(groups, N)
    band, place = tl.program_id(0) // tiles * BAND, tl.program_id(0) % tiles
    deep = tl.minimum(tl.cdiv(groups, M) - band, BAND)
    row, column = (band + place % deep) * M, place // deep * N
    scores = tl.zeros([M, N], tl.float32)
    for step in range(STRIDE * CHUNKS):
        token, channel = step // CHUNKS, step % CHUNKS * C
        q = tl.reshape(Q.load([b, h, STRIDE - 1 - token, row, channel]), [M, C])
        k = tl.reshape(K.load([b, h, token, column, channel]), [N, C])
        if UPCAST:
            q, k = q.to(tl.float32), k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
    scores = tl.where((column + tl.arange(0, N) < groups)[None, :], scores * scale, -float("inf"))
    # One maximum for all blocks of the tile: what is too small beside it is nothing beside the row's sum.
    top = tl.max(scores, 1)[:, None]
    powers = tl.reshape(tl.math.exp2(scores - top), [M, N // EACH, EACH])
    logs = top + tl.math.log2(tl.sum(powers, 2))
    rows, at = row + tl.arange(0, M)[:, None], column // EACH + tl.arange(0, N // EACH)[None, :]
    out = LOGS + (slot.to(tl.int64) * groups + rows) * blocks + at
    tl.store(out, logs, mask=(rows < groups) & (at < blocks))


@triton.jit
def _mean(LOGS, WEIGHTS, groups, blocks, EACH: tl.constexpr, WIDTH: tl.constexpr):
    """The mean over one query block's groups of the softmax of their logs."""
    block, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, WIDTH)
    first, end = block * EACH, tl.minimum(block * EACH + EACH, groups)
    weights = tl.zeros([WIDTH], tl.float32)
    for row in range(first, end):
        logs = tl.load(LOGS + (slot * groups + row) * blocks + at, mask=at < blocks, other=-float("inf"))
        powers = tl.math.exp2(logs - tl.max(logs, 0))
        weights += powers / tl.sum(powers, 0)
    tl.store(WEIGHTS + (slot * blocks + block) * blocks + at, weights / (end - first), mask=at < blocks)
