"""Every executor gives the reference's output and LSE for any plan, and density is what its lists execute."""

import itertools
import math
import shutil
import subprocess
import sys
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from draftbench.kernels import fa4, reference, run, unavailable

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
    blocks = (~mask).to(torch.int8).argsort(dim=-1, stable=True).int()
    blocks[torch.arange(kv_blocks) >= counts[..., None]] = 2**30  # never read
    return counts.to(DEVICE), blocks.to(DEVICE)


def box_plan(layout, text, box, heads, density=0.3):
    """Of boxes, or, for `Identity`, of 128 tokens as they come."""
    if isinstance(box, Box):
        sizes, block = box_sizes(box, layout.grid, DEVICE), box.t * box.h * box.w
    else:
        sizes, block = even_sizes(layout.video, 128, DEVICE), 128
    starts = offsets(sizes, layout, text, block)
    n = starts.shape[-1] - 1
    return Plan(starts, starts, *lists(n, n, len(text), heads, density, 1), block, block, box, box, regular=True)


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


def loose_plan(layout, text, heads, density=0.4):
    """SVG2's clusters as it cuts them: blocks of 0 to 128 tokens, of queries and of keys in orders of their own."""
    generator = torch.Generator().manual_seed(6)
    shape = len(text), heads

    def side():
        order = torch.rand(*shape, layout.video, generator=generator).argsort(-1)
        more = torch.randint(-64, 65, (*shape, layout.video // 128, 1), generator=generator)
        more[..., ::3, :] = 64  # whole blocks beside empty ones
        sizes = torch.cat([64 + more, 64 - more], -1).flatten(2)
        sizes = torch.nn.functional.pad(sizes, (0, 1), value=layout.video % 128)
        return Index(order.to(DEVICE)), offsets(sizes.to(DEVICE), layout, text, 128)

    (q_order, q_starts), (kv_order, kv_starts) = side(), side()
    kept = lists(q_starts.shape[-1] - 1, kv_starts.shape[-1] - 1, *shape, density, 7)
    return Plan(q_starts, kv_starts, *kept, 128, 128, q_order, kv_order)


def uneven_plan(layout, text, heads):
    """SpargeAttn's shape: query blocks of 128, key blocks of 64, no reordering."""
    starts = [offsets(even_sizes(layout.video, n, DEVICE), layout, text, n) for n in (128, 64)]
    kept = lists(starts[0].shape[-1] - 1, starts[1].shape[-1] - 1, len(text), heads, 0.4, 4)
    return Plan(*starts, *kept, 128, 64, Identity(), Identity())


def head_plan(layout, text, heads):
    """SVG's shape: blocks of 128 of an order for each head."""
    order = Index(torch.stack([torch.randperm(layout.video, device=DEVICE) for _ in range(heads)])[None])
    starts = offsets(even_sizes(layout.video, 128, DEVICE), layout, text, 128)
    n = starts.shape[-1] - 1
    return Plan(starts, starts, *lists(n, n, len(text), heads, 0.4, 5), 128, 128, order, order)


CASES = {
    "even": ((2, 8, 16), 0, lambda l, t, h: box_plan(l, t, Box(1, 4, 8), h)),
    "ragged_h": ((2, 9, 16), 5, lambda l, t, h: box_plan(l, t, Box(1, 4, 8), h)),
    "ragged_all": ((3, 9, 13), 40, lambda l, t, h: box_plan(l, t, Box(2, 4, 8), h)),
    "stacked": ((3, 9, 13), 5, lambda l, t, h: box_plan(l, t, Box(1, 4, 8, stacked=True), h)),
    "one_block": ((1, 4, 8), 1, lambda l, t, h: box_plan(l, t, Box(1, 4, 8), h)),
    "clusters": ((2, 8, 10), 17, cluster_plan),
    "uneven": ((2, 9, 16), 17, uneven_plan),
    "loose": ((3, 9, 16), 17, loose_plan),
}


def inputs(grid, text, case, dtype, dim=32, heads=2):
    layout = Layout(grid, text)
    lengths = torch.tensor([text, max(text - 3, 0)], device=DEVICE)
    torch.manual_seed(0)
    q, k, v = tensors(layout, lengths, heads, dim, dtype)
    plan = case(layout, lengths, heads)
    plan.counts[:, 1, 0] = 0  # a row that keeps nothing
    return layout, lengths, q, k, v, plan


def tensors(layout, lengths, heads, dim, dtype):
    """q, k, v as views of one projection, NaN where text is padding, which nobody may read."""
    q, k, v = torch.randn(len(lengths), layout.length, 3, heads, dim, device=DEVICE).to(dtype).unbind(2)
    for x in (q, k, v):
        for item, length in enumerate(lengths.tolist()):
            x[item, layout.video + length :] = torch.nan
    return q, k, v


BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def check(executor, layout, q, k, v, plan, has_lse=True):
    """Output against float64 arithmetic, as a whole and in the worst row; every LSE; text padding exactly."""
    bound = BOUNDS[q.dtype]
    expected, expected_lse = reference.run(q.double(), k.double(), v.double(), plan, layout)
    out, lse = executor(q, k, v, plan, layout)
    difference = (out.double() - expected).flatten(2).norm(dim=-1)
    norm = expected.flatten(2).norm(dim=-1)
    assert (difference <= bound * norm).all()  # an empty row is zero exactly
    assert difference.norm() <= bound * expected.norm()
    if has_lse:
        finite = expected_lse.isfinite()
        assert (lse.isfinite() == finite).all() and not lse.isnan().any()
        error = (lse.double() - expected_lse)[finite].abs()
        assert (error <= (1e-4 if q.dtype == torch.float32 else 1e-2)).all()


@pytest.mark.parametrize("executor", ["triton"] if GPU else ["cpu", "triton"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_agrees_with_reference(executor, name, dtype):
    layout, _, q, k, v, plan = inputs(*CASES[name], dtype)
    check(run(executor), layout, q, k, v, plan)


def skip_without(executor):
    if reason := unavailable(executor, DEVICE):
        pytest.skip(reason)


def flags(executor, layout, q, k, v, plan):
    """Which query blocks are computed again, with a running maximum [B, H, q_blocks], and whether any is."""
    made, zeros = [], torch.zeros
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *size, **options: made.append(zeros(*size, **options)) or made[-1])
        run(executor)(q, k, v, plan, layout)
    lists = plan.counts.numel() + 1
    (found,) = (x[-lists:] for x in made if x.shape in ((lists,), (8 + lists,)))  # gluon's counters come before
    return found[:-1].view(plan.counts.shape) != 0, bool(found[-1])


def far_above(executor, block, dim, box, heads=2):
    """Keys of the second frame have logits of hundreds of nats, those of the first, which come first, of a few."""
    layout, _, q, k, v, plan = inputs((2, 8, 16), 5, lambda l, t, h: box_plan(l, t, box, h), torch.bfloat16, dim, heads)
    k[:, layout.video // 2 : layout.video] *= 100
    assert plan.q_block == block
    expected, expected_lse = reference.run(q.double(), k.double(), v.double(), plan, layout)
    out, lse = run(executor)(q, k, v, plan, layout)
    finite = expected_lse.isfinite()
    assert (lse.isfinite() == finite).all() and (lse - expected_lse)[finite].abs().max() <= 1e-2
    # Of one row more than elsewhere: a few keys have all the weight, and rounded weights do not average out.
    assert (out - expected).norm() <= BOUNDS[q.dtype] * expected.norm()
    again, any_again = flags(executor, layout, q, k, v, plan)
    assert any_again and again[:, 0, 0].all()  # these lists have all blocks
    assert not again[:, 1, 0].any() and not again[:, :, -1].any()  # and these none, or one of the first frame


def never_again(executor, dim, grid, text, box):
    """Ordinary logits, and places without a token, at a grid's edge and behind the text."""
    layout, _, q, k, v, plan = inputs(grid, text, lambda l, t, h: box_plan(l, t, box, h), torch.bfloat16, dim)
    again, any_again = flags(executor, layout, q, k, v, plan)
    assert not again.any() and not any_again


def test_logits_that_pass_the_range_of_powers_over_the_first_blocks_maximum():
    far_above("triton", 32, 32, Box(1, 4, 8))


def test_ordinary_logits_are_computed_once():
    never_again("triton", 32, (3, 9, 13), 40, Box(2, 4, 8))


@pytest.mark.parametrize(("powers", "again"), [(58, False), (70, True)])
def test_a_sum_over_the_limit_is_computed_again_before_it_overflows(powers, again):
    layout, _, q, k, v, plan = inputs((2, 8, 16), 0, CASES["even"][2], torch.float32)
    q.zero_()[..., 0] = 1
    k.zero_()[:, layout.video // 2, :, 0] = powers * math.log(2) * q.shape[-1] ** 0.5
    found, any_again = flags("triton", layout, q, k, v, plan)
    assert any_again == again and (found[:, 0, 0] == again).all()  # lists of all blocks
    check(run("triton"), layout, q, k, v, plan)


@pytest.mark.parametrize("executor", ["reference", "triton", "gluon"] if GPU else ["reference", "cpu", "triton"])
def test_what_is_no_number_stays_so(executor):
    skip_without(executor)
    case = (2, 8, 16), 0, lambda l, t, h: box_plan(l, t, Box(1, 8, 16), h)
    layout, _, q, k, v, plan = inputs(*case, torch.bfloat16, 64)
    q[0, 0, 0] = torch.nan
    out, lse = run(executor)(q, k, v, plan, layout)
    assert out[0, 0, 0].isnan().all() and lse[0, 0, 0].isnan()
    assert out.isnan().sum() == out.shape[-1] and lse.isnan().sum() == 1


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("executor", ["triton", "gluon"])
def test_more_lists_than_programs(executor, dtype):
    """Of 0 to all blocks, so that what one list leaves behind meets every other."""
    skip_without(executor)
    layout, lengths, heads = Layout((4, 16, 32), 77), torch.tensor([77, 7], device=DEVICE), 32
    plan = box_plan(layout, lengths, Box(1, 8, 16), heads, density=2.0)
    plan.counts = torch.minimum(plan.counts, torch.randint_like(plan.counts, plan.blocks.shape[-1] + 1))
    check(run(executor), layout, *tensors(layout, lengths, heads, 128, dtype), plan)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("executor", ["triton", "gluon"])
def test_what_is_computed_again_on_a_gpu(executor):
    skip_without(executor)
    far_above(executor, 128, 64, Box(1, 8, 16))
    far_above(executor, 128, 64, Box(1, 8, 16), heads=64)  # more lists than programs
    never_again(executor, 64, (3, 9, 20), 77, Box(1, 8, 16))


@pytest.mark.parametrize("names", ["start", "start and size"])
def test_lists_name_blocks_by_their_tokens(names):
    """Whole blocks first, then the smaller ones, empty ones in neither part."""
    from draftbench.kernels.triton import schedule

    layout, _, _, _, _, plan = inputs(*CASES["loose"], torch.float32)
    rows, counts, whole, blocks = schedule(plan, layout, 2, names)
    assert (rows.sort(-1).values == torch.arange(plan.counts.shape[2], device=DEVICE)).all()
    assert (counts.flatten(0, 1).gather(1, rows.long()).diff(dim=-1) <= 0).all()
    seen = set()
    for b, h, row in itertools.product(*map(range, plan.counts.shape)):
        starts = plan.kv_offsets[b, h].tolist()
        sizes = [end - start for start, end in itertools.pairwise(starts)]
        kept = [block for block in plan.blocks[b, h, row].tolist()[: plan.counts[b, h, row]] if sizes[block]]
        kept.sort(key=lambda block: sizes[block] < 128)
        seen |= {sizes[block] == 128 for block in kept}
        named = [(starts[x] * 256 + sizes[x]) if "size" in names else x if sizes[x] < 128 else starts[x] for x in kept]
        assert counts[b, h, row] == len(kept) and whole[b, h, row] == sum(sizes[x] == 128 for x in kept)
        assert blocks[b, h, row, : len(kept)].tolist() == named
    assert seen == {True, False}


@pytest.mark.skipif(GPU or not shutil.which("g++"), reason="on a CPU, with a compiler")
@pytest.mark.parametrize("name", ["even", "clusters"])
def test_flex_on_a_cpu(name):
    layout, _, q, k, v, plan = inputs(*CASES[name], torch.float32)
    check(run("flex"), layout, q, k, v, plan, has_lse=False)


@pytest.mark.parametrize("name", CASES)
def test_lists_for_flex_lie_as_its_kernel_reads_them(name, monkeypatch):
    """One that inductor had to lay out had rows of another length on a GPU, and the kernel read beyond its end."""
    seen = []

    def attend(q, k, v, *, block_mask, **options):
        seen.extend([block_mask.kv_indices, block_mask.full_kv_indices])
        return (q, q[..., 0].float()) if GPU else q

    monkeypatch.setattr("draftbench.kernels.flex._attend", attend)
    layout, _, q, k, v, plan = inputs(*CASES[name], torch.float32)
    run("flex")(q, k, v, plan, layout)
    first, second = seen
    assert first.is_contiguous() and second.is_contiguous() and first.shape == second.shape
    assert first.data_ptr() != second.data_ptr()


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
    plan.blocks[:] = torch.arange(plan.blocks.shape[-1], device=DEVICE)
    from draftbench.kernels import dense

    expected = dense.run(q, k, v, layout, lengths)
    torch.testing.assert_close(run("cpu" if not GPU else "triton")(q, k, v, plan, layout)[0], expected)


@pytest.mark.parametrize("length", [256, 300], ids=["even", "ragged"])
def test_dense_by_gluon_is_dense(length):
    """On a CPU by the executor there, on the plan that Gluon is given."""
    from draftbench.kernels import dense

    q, k, v = (torch.randn(2, length, 3, 64, device=DEVICE) for _ in range(3))
    if GPU:
        skip_without("gluon")
        q, k, v = (x.bfloat16() for x in (q, k, v))
        out = dense.run(q, k, v, Layout((1, 1, length)), [0, 0], "gluon")
    else:
        out = run("cpu")(q, k, v, *dense.everything(q))[0]
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2).float() for x in (q, k, v)))
    torch.testing.assert_close(out.float(), expected.transpose(1, 2), atol=2e-2 if GPU else 1e-5, rtol=2e-2)


def kernel_of_fa4(q, k, v, *, block_sparse_tensors, return_lse, mask_mod=None, aux_tensors=None):
    """What `_flash_attn_fwd` computes, in plain torch, and what it asks of its arguments."""
    lists, (q_size, size) = block_sparse_tensors, block_sparse_tensors.block_size
    batch, q_length, heads, dim = q.shape
    length = k.shape[1]
    assert length % size == 0 and q_length % q_size == 0 and size == 128 and return_lse
    assert lists.full_block_cnt.shape == lists.mask_block_cnt.shape == (batch, heads, q_length // q_size)
    kept = torch.zeros(batch, heads, q_length // q_size, length, dtype=torch.bool)
    for kind in ("mask", "full"):
        count, index = getattr(lists, f"{kind}_block_cnt"), getattr(lists, f"{kind}_block_idx")
        assert count.dtype == index.dtype == torch.int32 and index.is_contiguous()
        assert index.shape[:3] == count.shape and index.shape[3] <= length // size
        for b, h, row in itertools.product(*map(range, count.shape)):
            for block in index[b, h, row, : count[b, h, row]].tolist():
                real = size if kind == "full" else int(aux_tensors[0][b, h, block])
                assert real > 0 and (kind == "full" or real < size)
                kept[b, h, row, block * size : block * size + real] = True
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / dim**0.5
    scores = scores.masked_fill(~kept.repeat_interleave(q_size, 2), -torch.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(), v)
    return out, scores.logsumexp(-1), None, None, None


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple


@pytest.mark.skipif(GPU, reason="stands in for the kernel where it cannot run")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("text", [0, 128, 130])
@pytest.mark.parametrize(
    "box", [Box(1, 8, 16), Box(2, 8, 8), Box(4, 8, 8), None], ids=["draft", "cube", "double", "svg"]
)
@pytest.mark.parametrize("grid", [(4, 16, 32), (3, 9, 20), (1, 8, 16)], ids=["even", "ragged", "small"])
def test_what_fa4_is_given(monkeypatch, grid, box, text, batch):
    """The order, the filled-up blocks and both lists, run by plain torch in the kernel's place."""
    interface, sparsity = ModuleType("flash_attn.cute.interface"), ModuleType("flash_attn.cute.block_sparsity")
    interface._flash_attn_fwd, sparsity.BlockSparseTensorsTorch = kernel_of_fa4, BlockSparseTensorsTorch
    names = {"flash_attn": ModuleType("flash_attn"), "flash_attn.cute": ModuleType("flash_attn.cute")}
    for module in (interface, sparsity):
        names[module.__name__] = module
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fa4, "_mask", lambda: "mask")
    layout = Layout(grid, text)
    lengths = torch.tensor([text, max(0, text - 3)][:batch])
    plan = box_plan(layout, lengths, box, 2) if box else head_plan(layout, lengths, 2)
    q, k, v = (torch.randn(batch, layout.length, 2, 16) for _ in range(3))
    v[:, layout.video :][torch.arange(text) >= lengths[:, None]] = torch.nan  # padding is never read
    check(fa4.run, layout, q, k, v, plan)


# On a GPU: pairs of these; all of them as `on_gpu` says.
AXES = {
    "block": ["loose", 64, 128],
    "dim": [64, 128],
    "dtype": [torch.bfloat16, torch.float16, torch.float32],
    "grid": ["even", "ragged_t", "ragged_h", "ragged_w", "one_frame", "one_block"],
    "text": [0, 1, 77, 128, 300],
    "kept": ["full", "one", "fallback", "empty", "unequal"],
    "batch": [1, 2],
}
GRIDS = {
    "even": (4, 16, 32), "ragged_t": (5, 16, 32), "ragged_h": (4, 17, 32), "ragged_w": (4, 16, 37),
    "one_frame": (1, 16, 32), "one_block": (2, 4, 8),
}  # fmt: skip
BOXES = {
    64: Box(2, 4, 8),
    128: Box(2, 8, 8),
    "8x16": Box(1, 8, 16),
    "stacked": Box(1, 8, 16, stacked=True),
    256: Box(4, 8, 8),
    "plain": Identity(),
}


HOPPER = AXES | {"block": [128, "8x16", "stacked", "plain", "loose"], "dtype": [torch.bfloat16, torch.float16]}
FLEX = {name: values[-1:] if name in ("block", "batch", "text") else values[:2] for name, values in AXES.items()}


def poison():
    """Fill the memory that the next allocations get, large and small, with NaN."""
    for size, count in ((2**26, 1), (2**17, 64)):
        blocks = [torch.full((size,), torch.nan, device=DEVICE) for _ in range(count)]
        del blocks


def gpu_case(executor, block, dim, dtype, grid, text, kept, batch):
    layout, heads = Layout(GRIDS[grid], text), 2
    lengths = torch.tensor([text, max(0, text - 70)][:batch], device=DEVICE)
    density = {"full": 2.0, "unequal": 0.5}.get(kept, 0.3)
    plan = loose_plan(layout, lengths, heads, density) if block == "loose" else None
    plan = plan or box_plan(layout, lengths, BOXES[block], heads, density)
    if kept == "one":
        plan.counts.clamp_(max=1)
    if kept == "unequal":
        plan.counts[:, 0] = plan.counts[:, 0].clamp(max=2)
    if kept == "empty":
        plan.counts[:, :, 0] = 0
    if kept == "fallback":
        plan.counts[:, :, 0] = 1
    q, k, v = tensors(layout, lengths, heads, dim, dtype)
    reason = executor.modules[executor.name].refuse(q, plan)
    if reason:
        pytest.skip(reason)
    poison()
    check(executor, layout, q, k, v, plan)


def on_gpu(**axes):
    """Pairs of values by default, all of them with `-m "gpu and (full or not full)"`.

    With `-n 16 --dist loadgroup` few processes compile the same kernel.
    """
    skip = pytest.mark.skipif(not GPU, reason="needs a CUDA device")

    def mark(test):
        together = pytest.mark.together("block", "dim", "dtype")
        return pytest.mark.gpu(skip(together(pytest.mark.pairs(**axes)(test))))

    return mark


@on_gpu(**AXES)
def test_triton_on_a_gpu(block, dim, dtype, grid, text, kept, batch):
    gpu_case(run("triton"), block, dim, dtype, grid, text, kept, batch)


@on_gpu(**HOPPER)
def test_gluon_on_a_gpu(block, dim, dtype, grid, text, kept, batch):
    gpu_case(run("gluon"), block, dim, dtype, grid, text, kept, batch)


@on_gpu(**HOPPER | {"block": [128, "8x16", 256, "plain", "loose"]})
def test_fa4_on_a_gpu(block, dim, dtype, grid, text, kept, batch):
    gpu_case(run("fa4"), block, dim, dtype, grid, text, kept, batch)


@on_gpu(**FLEX)
def test_flex_on_a_gpu(block, dim, dtype, grid, text, kept, batch):
    """Few: it compiles for seconds at each shape."""
    gpu_case(run("flex"), block, dim, dtype, grid, text, kept, batch)


@pytest.mark.gpu
@pytest.mark.full
@pytest.mark.skipif(not (GPU and shutil.which("compute-sanitizer")), reason="needs a CUDA device, compute-sanitizer")
@pytest.mark.parametrize(
    "case",
    [f"{name}_on_a_gpu[8x16-128-bfloat16-ragged_h-77-unequal-2]" for name in ("gluon", "fa4")]
    + ["triton_on_a_gpu[64-64-bfloat16-ragged_h-77-unequal-2]", "flex_on_a_gpu[128-64-bfloat16-ragged_t-300-one-2]"],
)
def test_memcheck_finds_nothing(case):
    """API errors are left out: CUDA's Python bindings look up functions that an older driver lacks."""
    pytest_ = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu and (full or not full)"]
    check = ["compute-sanitizer", "--tool=memcheck", "--report-api-errors=no", "--error-exitcode=1", *pytest_]
    done = subprocess.run([*check, f"{__file__}::test_{case}"], capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout and "0 errors" in done.stdout, done.stdout
