"""Every executor gives the reference's output and LSE for any plan, and density is what its lists execute."""

import os

os.environ.setdefault("TRITON_INTERPRET", "0" if __import__("torch").cuda.is_available() else "1")

import pytest
import torch
from draftbench.kernels import run

from draftbench.attention import Plan, count_pairs
from draftbench.layout import Box, Identity, Index, Layout, box_sizes, even_sizes, offsets

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def lists(q_blocks, kv_blocks, batch, heads, density, seed):
    """Random kept lists; the first row is full, the second has one block."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, heads, q_blocks, kv_blocks, generator=generator) < density
    mask[..., 0, :] = True
    mask[..., -1, :] = False
    mask[..., -1, 0] = True
    counts = mask.sum(-1, dtype=torch.int32)
    return counts.to(DEVICE), (~mask).to(torch.int8).argsort(dim=-1, stable=True).int().to(DEVICE)


def box_plan(layout, text, box, heads, density=0.3):
    sizes = box_sizes(box, layout.grid, DEVICE)
    block = box.t * box.h * box.w
    starts = offsets(sizes, layout, text, block)
    n = starts.shape[-1] - 1
    return Plan(starts, starts, *lists(n, n, len(text), heads, density, 1), block, block, box, box)


def cluster_plan(layout, text, heads):
    """SVG2's shape: q and kv ordered differently in each head, blocks of random sizes, some of them empty."""
    generator = torch.Generator().manual_seed(2)
    batch, video = len(text), layout.video

    def side(n):
        order = torch.rand(batch, heads, video, generator=generator).argsort(-1)
        sizes = torch.rand(batch, heads, n, video, generator=generator).argmax(2)
        sizes = torch.nn.functional.one_hot(sizes, n).sum(2)
        sizes[..., 0] += sizes[..., 1]
        sizes[..., 1] = 0
        return Index(order.to(DEVICE)), offsets(sizes.to(DEVICE), layout, text, 32), int(sizes.max())

    (q_order, q_starts, q_block), (kv_order, kv_starts, kv_block) = side(5), side(9)
    kept = lists(q_starts.shape[-1] - 1, kv_starts.shape[-1] - 1, batch, heads, 0.4, 3)
    return Plan(q_starts, kv_starts, *kept, max(q_block, 32), max(kv_block, 32), q_order, kv_order)


def uneven_plan(layout, text, heads):
    """SpargeAttn's shape: query blocks of 128, key blocks of 64, no reordering."""
    starts = [offsets(even_sizes(layout.video, n, DEVICE), layout, text, n) for n in (128, 64)]
    kept = lists(starts[0].shape[-1] - 1, starts[1].shape[-1] - 1, len(text), heads, 0.4, 4)
    return Plan(*starts, *kept, 128, 64, Identity(), Identity())


CASES = {
    "even": ((2, 8, 16), 0, lambda l, t, h: box_plan(l, t, Box(1, 4, 8), h)),
    "ragged_h": ((2, 9, 16), 5, lambda l, t, h: box_plan(l, t, Box(1, 4, 8), h)),
    "ragged_all": ((3, 9, 13), 40, lambda l, t, h: box_plan(l, t, Box(2, 4, 8), h)),
    "one_block": ((1, 4, 8), 1, lambda l, t, h: box_plan(l, t, Box(1, 4, 8), h)),
    "clusters": ((2, 8, 10), 17, cluster_plan),
    "uneven": ((2, 9, 16), 17, uneven_plan),
}


def inputs(grid, text, case, dtype, dim=32, heads=2):
    layout = Layout(grid, text)
    lengths = torch.tensor([text, max(text - 3, 0)], device=DEVICE)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, layout.length, heads, dim, device=DEVICE).to(dtype) for _ in range(3))
    return layout, lengths, q, k, v, case(layout, lengths, heads)


@pytest.mark.parametrize("executor", ["triton"] if GPU else ["cpu", "triton"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=["fp32", "bf16"])
def test_agrees_with_reference(executor, name, dtype, bound):
    layout, _, q, k, v, plan = inputs(*CASES[name], dtype)
    expected, expected_lse = run("reference")(q.double(), k.double(), v.double(), plan, layout)
    out, lse = run(executor)(q, k, v, plan, layout)
    difference = (out.double() - expected).flatten(2).norm(dim=-1)
    norm = expected.flatten(2).norm(dim=-1)
    assert (difference[norm == 0] == 0).all()
    assert (difference / norm)[norm > 0].max() <= bound
    assert difference.norm() / expected.norm() <= bound
    finite = expected_lse.isfinite()
    assert (lse.isfinite() == finite).all()
    torch.testing.assert_close(lse.double()[finite], expected_lse[finite], atol=1e-2 if bound > 1e-4 else 1e-4, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_pairs_are_those_of_the_lists(name):
    layout, _lengths, _, _, _, plan = inputs(*CASES[name], torch.float32)
    kept = video = 0
    for b in range(2):
        for h in range(2):
            q_start = plan.q_offsets[b, min(h, plan.q_offsets.shape[1] - 1)].tolist()
            kv_start = plan.kv_offsets[b, min(h, plan.kv_offsets.shape[1] - 1)].tolist()
            for row, count in enumerate(plan.counts[b, h].tolist()):
                for block in plan.blocks[b, h, row, :count].tolist():
                    pairs = (q_start[row + 1] - q_start[row]) * (kv_start[block + 1] - kv_start[block])
                    kept += pairs
                    video += pairs * (q_start[row] < layout.video and kv_start[block] < layout.video)
    assert [float(x.sum()) for x in count_pairs(plan, layout)] == [kept, video]


def test_full_lists_are_dense():
    layout, lengths, q, k, v, plan = inputs(*CASES["ragged_all"], torch.float32)
    plan = box_plan(layout, lengths, Box(2, 4, 8), 2, density=2.0)
    plan.counts[:] = plan.blocks.shape[-1]
    from draftbench.kernels import dense

    expected = dense.run(q, k, v, layout, lengths)
    torch.testing.assert_close(run("cpu" if not GPU else "triton")(q, k, v, plan, layout)[0], expected)
