"""Plans against the methods' official code, on random q and k: `pytest -m official --official=FOLDER`.

FOLDER holds clones of the repositories, under their own names; a clone that is not there skips its tests. Last
compared with svg-project/Sparse-VideoGen 5ce7b01, hao-ai-lab/FastVideo 2f3d407, shawnricecake/draft-attention f3c81d5,
mit-han-lab/radial-attention 72788d4, mit-han-lab/x-attention e379887, thu-ml/SpargeAttn bfd980b,
dvlab-research/Jenga 6905150 and cccrrrccc/Re-ttention bbec1f5. FastVideo holds no search of windows any more.

Ragged grids wherever the official code takes them; text is dense in all of them and left out here.
"""

import __future__

import ast
import itertools
import math
import sys
import time
from collections import Counter
from importlib import util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch
from draftbench.kernels import run
from draftbench.methods.draft import Draft
from draftbench.methods.jenga import Jenga, adjacent, curve
from draftbench.methods.radial import Radial
from draftbench.methods.re_ttention import ReTtention
from draftbench.methods.sparge import Sparge
from draftbench.methods.sta import window_plan
from draftbench.methods.svg import SVG, band_mask, patch_major
from draftbench.methods.svg2 import SVG2
from draftbench.methods.xattention import XAttention

from draftbench.attention import Call, Meter
from draftbench.layout import Box, Layout, box_order

pytestmark = pytest.mark.official
CPU = torch.device("cpu")


def find(request, path):
    """An official file."""
    folder = request.config.getoption("--official")
    if not folder:
        pytest.skip("--official=FOLDER is not given")
    if not Path(folder).is_dir():
        pytest.fail(f"--official={folder} is no folder")
    clone = Path(folder) / Path(path).parts[0]
    if not clone.is_dir():
        pytest.skip(f"{clone} is not there")
    return Path(folder) / path


def official(request, path, *names, **given):
    """Functions and methods of an official file, taken out of it since its imports need kernels and a GPU.

    given: what they use of other files. Their tensors stay on the CPU.
    """
    text = find(request, path).read_text().replace('"cuda"', '"cpu"').replace(".cuda()", ".cpu()")
    body = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef) and node.name in names]
    for node in body:
        node.decorator_list = []
    space = {"torch": torch, "F": torch.nn.functional, "math": math, "floor": math.floor, "time": time, "np": numpy}
    space |= given
    exec(compile(ast.Module(body, []), path, "exec", flags=__future__.annotations.compiler_flag), space)
    return SimpleNamespace(**{name: space[name] for name in names})


def tensors(grid, heads=2, dim=16):
    torch.manual_seed(3)
    return torch.randn(3, 1, math.prod(grid), heads, dim)


def called(grid, step=6, state=None):
    state = {} if state is None else state
    return Call(Layout(grid), step, 30, 1, "cond", torch.tensor([0]), (3,), 0, state, run("cpu"), Meter(), (6, 30))


def kept(plan):
    """Kept blocks [H, n, m] of a plan."""
    width = plan.kv_offsets.shape[-1] - 1
    mask = torch.zeros(*plan.counts.shape, width + 1, dtype=torch.bool)
    return mask.scatter_(-1, torch.where(plan.live, plan.blocks, width).long(), True)[0, ..., :-1]


DRAFT = "draft-attention/draft_attention.py"


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("grid", [(3, 16, 32), (1, 24, 40)])
def test_draft_is_the_official_mask(request, grid, sparsity):
    """But for one block a head: the official mask keeps the one at its threshold too, which is the last it drops."""
    code = official(
        request, DRAFT, "sample_qk_attention_2d", "attention_percentile_mask_headwise", "generate_reorg_indices"
    )
    q, k, v = tensors(grid)
    method, call = Draft(sparsity, region=(4, 8)), called(grid)
    scores = code.sample_qk_attention_2d(None, q[0], k[0], *grid[1:], 4, 8)
    torch.testing.assert_close(method.scores(q, k, call)[0], scores)
    theirs = code.attention_percentile_mask_headwise(None, scores, 1 - sparsity)
    for mask, head in zip(theirs, scores, strict=True):
        mask &= head > head[mask].min()
        for row in (~mask.any(1)).nonzero()[:, 0]:  # where theirs keeps nothing ours keeps the best
            mask[row, head[row].argmax()] = True
    plan = method.plan(q, k, v, call)
    assert torch.equal(kept(plan), theirs)
    order = code.generate_reorg_indices(None, math.prod(grid), 4 * grid[2], grid[2], 8)
    assert box_order(plan.q_order, grid, CPU).tolist() == order


@pytest.mark.parametrize("grid", [(3, 15, 26), (1, 9, 13)])
def test_drafts_ragged_map_is_the_official_one(request, grid):
    """The map alone: the official order needs whole regions, and its mask counts them as if they were."""
    code = official(request, DRAFT, "sample_qk_attention_2d")
    q, k, _ = tensors(grid)
    scores = code.sample_qk_attention_2d(None, q[0], k[0], *grid[1:], 4, 8)
    torch.testing.assert_close(Draft(0.5, region=(4, 8), stacked=False).scores(q, k, called(grid))[0], scores)


def test_sta_is_the_official_window(request):
    """Every window in 7 x 4 x 3 whole tiles, which the official code asks for.

    An even number of tiles, of more than there are, is theirs and one more there.
    """
    code = official(request, "FastVideo/fastvideo-kernel/tests/support_flex_sta.py", "generate_sta_mask")
    box, grid, counts = Box(2, 4, 4), (14, 16, 12), (7, 4, 3)
    windows = list(itertools.product(*(range(1, n + 1) for n in counts)))
    odd = [tuple(min(w // 2 * 2 + 1, n) for w, n in zip(window, counts, strict=True)) for window in windows]
    plan = window_plan(box, odd, torch.zeros(1, math.prod(grid), len(odd), 1), called(grid))
    first = torch.arange(84) * 32  # tokens of each tile
    for window, ours in zip(windows, kept(plan), strict=True):
        theirs = code.generate_sta_mask(grid, window, (2, 4, 4), 0)
        for offset in (0, 31):
            assert torch.equal(ours, theirs(0, 0, first[:, None] + offset, first)), window


SVG_CODE = "Sparse-VideoGen/svg/models/hyvideo"
SVG_GRIDS = [(4, 16, 24), (5, 15, 26), (1, 17, 27)]


@pytest.mark.parametrize("grid", SVG_GRIDS)
def test_svg_judges_heads_as_officially(request, grid):
    """The profiling bands, their losses and so the verdict, on the same rows; HunyuanVideo's, with text behind."""
    code = official(request, f"{SVG_CODE}/utils.py", "get_attention_mask")
    judge = official(request, f"{SVG_CODE}/attention.py", "sample_mse").sample_mse
    frames, frame, video, text = grid[0], grid[1] * grid[2], math.prod(grid), 7
    masks = [code.get_attention_mask(name, video, text, frames, frame, "cpu") for name in ("spatial", "temporal")]
    method = SVG(0.5)
    rows = torch.arange(video)
    assert torch.equal(method.bands(rows, video, frame, frames), torch.stack(masks)[:, :, :video].bool())
    torch.manual_seed(3)
    q, k, v = torch.randn(3, video + text, 4, 16)
    settings = SimpleNamespace(attention_masks=masks, num_sampled_rows=32, sample_mse_max_row=video)
    torch.manual_seed(5)
    theirs = judge(settings, *(x.transpose(0, 1)[None] for x in (q, k, v)))[:, 0]
    torch.manual_seed(5)
    rows = torch.randint(low=0, high=video, size=(32,))
    ours = method.errors(q[rows], k, v, method.bands(rows, video, frame, frames), torch.tensor(text))
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(ours.argmin(0), theirs.argmin(0))


@pytest.mark.parametrize("grid", SVG_GRIDS[:2])  # theirs moves in place, which torch forbids of one frame
def test_svgs_temporal_order_is_the_official_one(request, grid):
    code = official(request, f"{SVG_CODE}/placement.py", "hunyuan_token_reorder_to_token_major")
    frames, frame, video = grid[0], grid[1] * grid[2], math.prod(grid)
    tokens = torch.arange(video + 7)[None, None, :, None]
    theirs = code.hunyuan_token_reorder_to_token_major(tokens, 7, video, frames, frame)
    assert torch.equal(patch_major(grid, CPU), theirs[0, 0, :video, 0])


@pytest.mark.parametrize("density", [0.2, 0.25, 0.4, 0.5, 0.7])
@pytest.mark.parametrize("grid", [(4, 16, 24), (9, 15, 26)])
def test_svgs_band_is_the_official_one_in_whole_blocks(request, grid, density):
    """The blocks of 128 that their band of tokens touches; HunyuanVideo's, and of a width that is no tie."""
    code = official(request, f"{SVG_CODE}/utils.py", "generate_temporal_head_mask_mod", "sparsity_to_width")
    frame, video = grid[1] * grid[2], math.prod(grid)
    width = code.sparsity_to_width(density, 0, grid[0], frame)
    place = torch.arange(video)
    band = code.generate_temporal_head_mask_mod(0, 0, grid[0], frame, width)(0, 0, place[:, None], place)
    spare = -video % 128
    band = torch.nn.functional.pad(band, (0, spare, 0, spare)).unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    ours, touched = band_mask(video, 128, density, CPU), band.any(3).any(1)
    assert torch.equal(ours, touched)


@pytest.mark.parametrize("frames, grid", [(6, (16, 24)), (9, (16, 32))])
@pytest.mark.parametrize("decay", [0.2, 0.95])
def test_radial_is_the_official_mask(request, frames, grid, decay):
    """Frames of whole blocks; of others the official code loses pieces."""
    names = ("shrinkMaskStrict", "get_diagonal_split_mask", "get_window_width", "gen_log_mask_shrinked")
    code = official(request, "radial-attention/radial_attn/attn_mask.py", *names)
    video = frames * math.prod(grid)
    theirs = code.gen_log_mask_shrinked(torch.zeros(1), video, video, frames, 128, "radial", decay, "hunyuan")
    q = torch.zeros(1, video, 1, 1)
    assert torch.equal(kept(Radial(decay=decay).plan(q, q, q, called((frames, *grid))))[0], theirs)


@pytest.mark.parametrize("top_p, floor", [(0.6, 0.1), (0.9, 0.3)])
@pytest.mark.parametrize("grid", [(4, 8, 8), (3, 7, 9)])
def test_svg2_is_the_official_map(request, grid, top_p, floor):
    """Of the centroids that our k-means found: the official one is a kernel."""
    code = official(request, "Sparse-VideoGen/svg/kmeans_utils.py", "weighted_softmax", "identify_dynamic_map")
    state, method = {}, SVG2(top_p=top_p, floor=floor, q_clusters=20, k_clusters=30, block=1024)  # one block a cluster
    plan = method.plan(*tensors(grid), called(grid, state=state))
    sizes = plan.kv_offsets.diff()
    theirs = code.identify_dynamic_map(state["q"], state["k"], None, sizes, top_p, floor)
    assert torch.equal(kept(plan), (theirs & (sizes > 0)[:, :, None])[0])


@pytest.mark.parametrize("tau", [0.5, 0.9])
@pytest.mark.parametrize("grid", [(4, 8, 16), (3, 7, 32)])
def test_xattention_is_the_official_selection(request, grid, tau):
    """Whole blocks: the zeros that fill up the last one take part in their softmax. Their mask is written in a way that
    keeps the first block in every row."""
    blocks = official(request, "x-attention/xattn/src/utils.py", "find_blocks_chunked")
    code = official(request, "x-attention/xattn/src/Xattention.py", "xattn_estimate", **vars(blocks))
    q, k, v = tensors(grid)
    settings = {"threshold": tau, "chunk_size": math.prod(grid), "use_triton": False, "causal": False}
    _, theirs = code.xattn_estimate(q.transpose(1, 2), k.transpose(1, 2), 32, 8, **settings)
    ours = kept(XAttention(tau=tau, block=32).plan(q, k, v, called(grid)))
    assert not ours[..., 0].all()
    ours[..., 0] = True
    assert torch.equal(ours, theirs[0])


@pytest.mark.parametrize("cdf, similarity", [(0.5, -0.1), (0.6, 0.03), (0.9, 0.025)])
@pytest.mark.parametrize("grid", [(4, 8, 8), (3, 8, 12)])
def test_sparge_is_the_official_map(request, monkeypatch, grid, cdf, similarity):
    """Whole blocks: beyond the last token their kernel reads what it does not define. Their entry points take the
    keys' mean from them first."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unused = ModuleType("einops")
    unused.rearrange = unused.repeat = None
    monkeypatch.setitem(sys.modules, "einops", unused)
    # Triton reads a kernel's source, so this file is imported whole.
    spec = util.spec_from_file_location("official_sparge", find(request, "SpargeAttn/spas_sage_attn/utils.py"))
    code = util.module_from_spec(spec)
    spec.loader.exec_module(code)
    q, k, v = tensors(grid)
    k = k + 2
    theirs = code.get_block_map_meansim(
        *(x.transpose(1, 2).to(device) for x in (q, k - k.mean(1, keepdim=True))),
        BLKQ=32,
        BLKK=16,
        simthreshd1=similarity,
        cdfthreshd=cdf,
    )
    ours = kept(Sparge(cdf=cdf, similarity=similarity, block=32).plan(q, k, v, called(grid)))
    assert torch.equal(ours, theirs[0].bool().cpu())


def gilbert(request, *names):
    return official(request, "Jenga/gilbert.py", "gilbert_xyz2d", "gilbert_xyz2d_r", "sgn", "in_bounds", *names)


@pytest.mark.parametrize("grid", [(4, 8, 8), (3, 7, 9), (8, 16, 24), (5, 15, 26)])
def test_jenga_is_the_official_curve(request, grid):
    code = gilbert(request)
    t, h, w = grid
    order = [0] * math.prod(grid)
    for i in range(len(order)):
        z, y, x = i // (h * w), i // w % h, i % w
        order[code.gilbert_xyz2d(x, y, z, w, h, t)] = i
    assert Counter(order) == Counter(range(len(order)))
    assert curve(grid, CPU).tolist() == order


@pytest.mark.parametrize("grid", [(4, 8, 8), (3, 7, 9)])
def test_jengas_neighbours_are_the_official_ones(request, grid):
    code = gilbert(request, "gilbert_block_neighbor_mapping")
    assert torch.equal(adjacent(grid, 16, CPU), code.gilbert_block_neighbor_mapping(*grid, 16))


@pytest.mark.parametrize("p, drop", [(0.3, 0.75), (0.6, 0.9)])
@pytest.mark.parametrize("grid", [(4, 8, 8), (3, 7, 16)])
def test_jenga_is_the_official_selection(request, grid, p, drop):
    """Whole blocks of the curve, which the official code asks for."""
    path = "Jenga/hyvideo/modules/attention_block_triton_diffres.py"
    code = official(request, path, "_build_block_index_with_importance_optimized")
    q, k, v = tensors(grid)
    n = math.prod(grid) // 16
    low = (x[:, curve(grid, CPU)].transpose(1, 2) for x in (q, k))
    theirs = code._build_block_index_with_importance_optimized(
        *low, int((1 - drop) * n), 16, 16, n, n, p, 0, adjacent(grid, 16, CPU)
    )
    assert torch.equal(kept(Jenga(p=p, drop=drop, block=16).plan(q, k, v, called(grid))), theirs[0])


@pytest.mark.parametrize("grid", [(4, 4, 8), (3, 5, 7)])
def test_re_ttention_is_the_official_window_and_correction(request, grid):
    """With blocks of one place in every frame, six steps: a full one, four that reuse it, a full one."""
    names = ("get_attention_scores_and_ratio", "get_attention_scores_with_denominator_ratio", "full_attention_cache")
    names += ("window_attention", "convert_binary_mask_to_additive", "generate_sliding_window_attention_mask")
    code = official(request, "Re-ttention/module/Cog_processor.py", *names)
    frames, video = grid[0], math.prod(grid)
    method, state = ReTtention(window_sparsity=0.6, block=frames), {}
    plan = method.plan(*tensors(grid), called(grid))
    place = torch.empty(video, dtype=torch.int64)
    place[plan.q_order.tokens[0, 0]] = torch.arange(video) // frames
    window = 2 * int(plan.counts[0, 0, 0]) - 1
    mask = code.generate_sliding_window_attention_mask(video, 0, frames, window, torch.float32)
    assert torch.equal(kept(plan)[0][place][:, place], mask.bool())
    layer = SimpleNamespace(use_ratio=True, batch_to_head_dim=lambda x: x, to_out=[lambda x: x] * 2)
    torch.manual_seed(0)
    for step in range(6, 12):
        q, k, v = torch.randn(3, 1, video, 2, 16)
        inputs = (layer, *(x[0].transpose(0, 1) for x in (q, k, v)), mask, 0)
        if step in (6, 11):
            theirs = code.full_attention_cache(*inputs)[1]
            residual = theirs - code.window_attention(*inputs)[1]
        else:
            theirs = code.window_attention(*inputs)[1] + residual
            layer.cached_ratio += 0.04
        ours = method.attend(q, k, v, called(grid, step, state))
        torch.testing.assert_close(ours[0].transpose(0, 1), theirs, atol=1e-5, rtol=1e-4)
