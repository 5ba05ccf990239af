"""Masks of the papers' methods against slow re-derivations; test_official.py compares with their official code."""

import itertools
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from draftbench.kernels import run
from draftbench.kernels.kmeans import kmeans
from draftbench.methods.draft import Draft
from draftbench.methods.efficient_vdit import EfficientVDiT
from draftbench.methods.jenga import Jenga, adjacent, curve
from draftbench.methods.radial import Radial, decay_mask
from draftbench.methods.re_ttention import ReTtention
from draftbench.methods.sparge import Sparge
from draftbench.methods.sta import STA, choose_windows, window_density
from draftbench.methods.sta_searched import STASearched, priced
from draftbench.methods.svg import SVG
from draftbench.methods.svg2 import SVG2
from draftbench.methods.vsa import VSA
from draftbench.methods.xattention import XAttention

from draftbench.attention import Call, DenseParts, Meter
from draftbench.knob import Losses
from draftbench.layout import Box, Layout, permutation

CPU = torch.device("cpu")
GRIDS = {"even": (4, 8, 8), "ragged": (3, 7, 9), "one_frame": (1, 9, 13)}
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def tensors(grid, text=5, heads=2, dim=16):
    torch.manual_seed(3)
    length = math.prod(grid) + text
    return [torch.randn(1, length, heads, dim) for _ in range(3)]


def called(grid, text=5, state=None, step=6):
    state, lengths = {} if state is None else state, torch.tensor([text])
    return Call(Layout(grid, text), step, 10, 1, "cond", lengths, (3,), 0, state, run("cpu"), Meter(), (0, 10))


def kept_tokens(method, grid, text=5, state=None, step=6, inputs=None):
    """Which token pairs a method keeps, bool [H, S, S], in frame-major order: from its lists alone."""
    layout = Layout(grid, text)
    plan = method.plan(*(inputs or tensors(grid, text)), called(grid, text, state, step))
    found = torch.zeros(2, layout.length, layout.length, dtype=torch.bool)
    for h in range(2):
        sides = []
        for starts, order in ((plan.q_offsets, plan.q_order), (plan.kv_offsets, plan.kv_order)):
            where = permutation(order, layout, CPU)
            tokens = torch.arange(layout.length) if where is None else where[0, min(h, where.shape[1] - 1)]
            start = starts[0, min(h, starts.shape[1] - 1)].tolist()
            sides.append([tokens[a:b] for a, b in itertools.pairwise(start)])
        for row, count in enumerate(plan.counts[0, h].tolist()):
            for column in plan.blocks[0, h, row, :count].tolist():
                assert not found[h][sides[0][row][:, None], sides[1][column]].any()  # no pair twice
                found[h][sides[0][row][:, None], sides[1][column]] = True
    return found


def with_text(video, grid, text=5):
    """Token pairs of the video [H, V, V] with text rows and columns that are all kept."""
    return torch.nn.functional.pad(video, (0, text, 0, text), value=True)


def cut(grid, block):
    """Slices of the video's tokens in turn."""
    video = math.prod(grid)
    return [range(a, min(a + block, video)) for a in range(0, video, block)]


def spread(mask, blocks, columns=None):
    """Pairs of tokens of kept pairs of blocks; blocks: lists of tokens."""
    columns = columns or blocks
    n = sum(map(len, blocks))
    out = torch.zeros(n, n, dtype=torch.bool)
    for i, rows in enumerate(blocks):
        for j, cols in enumerate(columns):
            if mask[i][j]:
                out[torch.tensor(list(rows))[:, None], torch.tensor(list(cols))] = True
    return out


@grids
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_draft_is_the_papers_rule(grid, stacked, sparsity):
    """One threshold a head over the map of means; where regions are cut, it is set by pairs of tokens."""
    q, k, _ = tensors(grid)
    found = kept_tokens(Draft(sparsity, region=(4, 4), stacked=stacked), grid)
    regions, video = {}, math.prod(grid)
    for i in range(video):
        t, rest = divmod(i, grid[1] * grid[2])
        y = t * grid[1] + rest // grid[2] if stacked else rest // grid[2]
        regions.setdefault((0 if stacked else t, y // 4, rest % grid[2] // 4), []).append(i)
    pieces = [regions[key] for key in sorted(regions)]
    n, whole = len(pieces), all(len(piece) == 16 for piece in pieces)
    budget = (n * n - int(sparsity * n * n)) * 16**2 if whole else (1 - sparsity) * video**2
    for h in range(2):
        scores = {}
        for i, rows in enumerate(pieces):
            row = [math.exp(float(q[0, rows, h].mean(0) @ k[0, cols, h].mean(0)) / 4) for cols in pieces]
            scores |= {(i, j): value / sum(row) for j, value in enumerate(row)}
        mask, pairs = torch.zeros(n, n, dtype=torch.bool), 0
        for i, j in sorted(scores, key=lambda place: -scores[place]):
            pairs += len(pieces[i]) * len(pieces[j])
            if pairs > budget:
                break
            mask[i, j] = True
        for i in range(n):
            if not mask[i].any():
                mask[i, max(range(n), key=lambda j: scores[i, j])] = True
        assert torch.equal(found[h], with_text(spread(mask, pieces), grid))


def radial_blocks(grid, block, decay):
    """The paper's rule token by token, then the rule on columns of a block."""
    frame, video = grid[1] * grid[2], math.prod(grid)
    token = torch.zeros(video, video)
    for i in range(video):
        for j in range(video):
            d = abs(i // frame - j // frame)
            apart = abs(i % frame - j % frame)
            if d <= 1:
                token[i, j] = 1
                continue
            length = 2 ** frame.bit_length() / 2 ** d.bit_length()
            thin = length < block and d % int(block / length)
            token[i, j] = not thin and apart <= max(length * decay, block)
    pieces = cut(grid, block)
    kept = []
    for rows in pieces:
        kept.append([])
        for cols in pieces:
            share = token[rows.start : rows.stop, cols.start : cols.stop].mean(0)
            some = int((share > 0).sum())
            kept[-1].append(some > 0 and int((share > 1 / 3).sum()) / some > 0.6)
    return torch.tensor(kept), pieces


@grids
@pytest.mark.parametrize("decay", [0.0, 0.2, 0.95])
def test_radial_is_the_papers_rule(grid, decay):
    mask, pieces = radial_blocks(grid, 8, decay)
    expected = with_text(spread(mask, pieces), grid)
    assert torch.equal(kept_tokens(Radial(decay=decay, block=8), grid), expected.expand(2, -1, -1))


@pytest.mark.parametrize("grid", [(6, 8, 8), (7, 5, 9)])
def test_radial_at_a_sparsity_lies_between_two_decays(grid):
    frames, frame = grid[0], grid[1] * grid[2]
    video = frames * frame
    for decay in (0.3, 0.6, 0.95):
        mask = decay_mask(frames, frame, 8, decay, False, CPU)
        pieces = cut(grid, 8)
        kept = float(spread(mask, pieces).sum()) / video**2
        same = kept_tokens(Radial(1 - kept, block=8), grid, 0)[0]
        # What enters up to this decay is all kept, and nothing else; of ragged frames, nearly.
        assert (same != spread(mask, pieces)).float().mean() <= (0.01 if frame % 8 else 0)
        fewer = kept_tokens(Radial(min(0.99, 1.1 - kept), block=8), grid, 0)[0]
        assert not (fewer & ~same).any()


def test_radial_keeps_the_sink_and_refuses_a_negative_decay():
    kept = kept_tokens(Radial(decay=0.2, block=8, first_frame_sink=True), (6, 4, 8))
    assert kept[:, :, :32].all()
    assert kept_tokens(Radial(0.7, block=8, first_frame_sink=True), (6, 4, 8))[:, :, :32].all()
    with pytest.raises(ValueError, match=r"method.decay must be null or a number of at least 0, got -1"):
        Radial(decay=-1)


def lloyd(x, centroids, rounds):
    """K-means of x [S, D], one token and one cluster at a time."""
    labels = []
    for _ in range(rounds):
        labels = [int(((token - centroids) ** 2).sum(1).argmin()) for token in x]
        moved = []
        for c, old in enumerate(centroids):
            mine = [x[i] for i, label in enumerate(labels) if label == c]
            moved.append(torch.stack(mine).mean(0) if mine else old)
        centroids = torch.stack(moved)
    return labels, centroids


def test_kmeans_is_lloyds():
    torch.manual_seed(0)
    x = torch.randn(2, 2, 40, 6)
    start = torch.cat([x[:, :, :7], torch.full((2, 2, 1, 6), 50.0)], 2)  # the last gets no token and stays
    order, centroids, sizes = kmeans(x, start, 3)
    for b in range(2):
        for h in range(2):
            expected, moved = lloyd(x[b, h], start[b, h], 3)
            assert order[b, h].tolist() == sorted(range(40), key=expected.__getitem__)
            torch.testing.assert_close(centroids[b, h], moved)
            assert sizes[b, h].tolist() == [expected.count(c) for c in range(8)]


@grids
@pytest.mark.parametrize("top_p, floor", [(0.9, 0.1), (0.3, 0.5), (0.0, 0.0)])
def test_svg2_is_the_papers_rule(monkeypatch, grid, top_p, floor):
    method = SVG2(top_p=top_p, floor=floor, q_clusters=4, k_clusters=6, first=3, next=2, block=16)
    q, k, _ = tensors(grid)
    video, state, drawn, draw = math.prod(grid), {}, [], SVG2.draw
    monkeypatch.setattr(SVG2, "draw", staticmethod(lambda *given: drawn.append(draw(*given)) or drawn[-1]))
    for rounds in (3, 2):  # the second call starts from the centroids of the first
        before = {name: x[0] for name, x in state.items()}
        found = kept_tokens(method, grid, state=state)
        before = before or dict(zip(("q", "k"), drawn, strict=True))
        for h in range(2):
            sides = []
            for x, name, count in ((q, "q", 4), (k, "k", 6)):
                labels, centroids = lloyd(x[0, :video, h], before[name][h], rounds)
                torch.testing.assert_close(state[name][0, h], centroids, atol=1e-5, rtol=1e-4)
                sides.append((torch.tensor(labels), centroids, [labels.count(c) for c in range(count)]))
            (q_labels, q_mean, _), (k_labels, k_mean, k_size) = sides
            expected = torch.zeros(video, video, dtype=torch.bool)
            for i in range(4):
                weight = [s * math.exp(float(q_mean[i] @ k_mean[j]) / 4) for j, s in enumerate(k_size)]
                ranked = sorted(range(6), key=lambda j: -weight[j])
                total = 0.0
                for rank, j in enumerate(ranked):
                    if rank and total > top_p * sum(weight) and rank >= int(floor * 6):
                        break
                    total += weight[j]
                    expected[(q_labels == i)[:, None] & (k_labels == j)] = True
            assert torch.equal(found[h], with_text(expected, grid))


def test_svg2_has_about_as_many_clusters_as_the_official_scripts():
    official = {32_760: (200, 1000), 44_550: (200, 1000), 75_600: (300, 1000), 118_800: (400, 1000)}
    for video, (queries, keys) in official.items():
        found = SVG2().clusters(video)
        assert abs(found["q"] / queries - 1) < 0.17 and found["k"] == keys
    assert SVG2().clusters(24_576) == {"q": 172, "k": 768}
    assert SVG2(q_clusters=7, k_clusters=9).clusters(24_576) == {"q": 7, "k": 9}
    assert SVG2().clusters(20) == {"q": 5, "k": 1}


def test_svg2_begins_with_tokens_and_cuts_clusters_into_blocks():
    grid = (3, 7, 9)
    q, _, _ = tensors(grid)
    x = q[:, :189].transpose(1, 2)
    drawn = SVG2.draw(x[0], 5, torch.Generator().manual_seed(1))
    assert all(any(torch.equal(token, other) for other in x[0, 1]) for token in drawn[1])
    labels = torch.zeros(1, 2, 189, dtype=torch.int64)
    labels[:, :, ::3] = 2
    sizes = torch.tensor([[126, 0, 63]]).expand(1, 2, -1)
    made, owner = SVG2(block=50).cut(labels.argsort(dim=-1, stable=True), sizes)
    assert made.sizes[0, 0].tolist() == [50, 50, 26, 50, 13, 0]
    assert owner[0, 0, :5].tolist() == [0, 0, 0, 2, 2]
    assert made.order.tokens[0, 0, 126:].tolist() == list(range(0, 189, 3))


@grids
def test_sta_is_a_window_of_tiles(grid):
    box, method = Box(2, 4, 4), STA(0.6, tile=(2, 4, 4))
    windows = choose_windows(box, grid, 2, 0.4)
    found = kept_tokens(method, grid)
    coordinates = [(t, y, x) for t in range(grid[0]) for y in range(grid[1]) for x in range(grid[2])]
    for h, window in enumerate(windows):
        expected = torch.zeros(len(coordinates), len(coordinates), dtype=torch.bool)
        for i, a in enumerate(coordinates):
            for j, b in enumerate(coordinates):
                expected[i, j] = in_window(a, b, grid, window)
        assert torch.equal(found[h], with_text(expected, grid))


@grids
@pytest.mark.parametrize("density", [0.1, 0.4, 0.7])
def test_no_mix_of_two_windows_comes_much_nearer(grid, density):
    """Among all windows: within 2 points, since less lopsided ones are preferred to a slightly nearer mix."""
    box, heads = Box(2, 4, 4), 3
    sizes = list(itertools.product(*(range(1, n + 1) for n in box.counts(grid))))
    coordinates = list(itertools.product(*map(range, grid)))
    share = {
        size: sum(in_window(a, b, grid, size) for a in coordinates for b in coordinates) / len(coordinates) ** 2
        for size in [*sizes[:: max(1, len(sizes) // 8)], sizes[-1]]
    }
    chosen = choose_windows(box, grid, heads, density)
    for size, expected in share.items():
        assert window_density(box, grid, size) == pytest.approx(expected)
    shares = [window_density(box, grid, size) for size in sizes]
    best = min(
        abs((mix * a + (heads - mix) * b) / heads - density)
        for a, b in itertools.product(shares, shares)
        for mix in range(heads + 1)
    )
    assert abs(sum(window_density(box, grid, size) for size in chosen) / heads - density) <= best + 0.02


def test_stas_own_window_is_that_of_every_head():
    grid = (5, 11, 13)
    found = kept_tokens(STA(tile=(2, 4, 4), window=(1, 2, 9)), grid)  # of 4 tiles across there are not nine
    coordinates = list(itertools.product(*map(range, grid)))
    expected = torch.tensor([[in_window(a, b, grid, (1, 2, 4)) for b in coordinates] for a in coordinates])
    assert torch.equal(found[0], with_text(expected, grid)) and torch.equal(found[1], found[0])
    with pytest.raises(ValueError, match=r"method\.window must be null or three numbers of tiles, 1 or more, got"):
        STA(window=(1, 0, 2))
    with pytest.raises(ValueError, match=r"sparsity=0.5 and method\.window="):
        STA(0.5, window=(1, 1, 1))


def in_window(a, b, grid, window):
    """Whether token b is in the window, in tiles of 2x4x4, of token a's tile."""
    for x, y, side, n, width in zip(a, b, (2, 4, 4), grid, window, strict=True):
        tiles = -(-n // side)
        first = min(max(x // side - width // 2, 0), tiles - width)
        if not first <= y // side < first + width:
            return False
    return True


@grids
def test_sta_searched_runs_what_was_picked(grid):
    """The window of the step and layer, or of the nearest that was searched; the heads in turn."""
    windows = [[1, 1, 1], [1, 2, 2], [-(-grid[0] // 2), 1, 2]]
    found = {"steps": [5, 6], "layers": [1, 2], "windows": windows, "picks": ["00 00", "12 01"]}
    coordinates = list(itertools.product(*map(range, grid)))
    for step, picked in ((6, (1, 2)), (9, (1, 2)), (2, (0, 0))):
        kept = kept_tokens(STASearched(0.6, tile=(2, 4, 4)).at(found), grid, step=step)
        for h, option in enumerate(picked):
            expected = [[in_window(a, b, grid, windows[option]) for b in coordinates] for a in coordinates]
            assert torch.equal(kept[h], with_text(torch.tensor(expected), grid))


def test_records_tell_uniform_windows_from_searched_ones():
    assert asdict(STA(0.6))["windows"] == "uniform" and asdict(STASearched(0.6))["windows"] == "searched"


def test_the_priced_picks_are_the_best_of_their_density():
    torch.manual_seed(0)
    density = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    for _ in range(20):
        loss = torch.rand(3, 5, dtype=torch.float64).sort(0, descending=True).values
        for budget in (0.1, 0.15, 0.23, 0.4):
            picks, mean = priced(loss, density, budget)
            assert abs(float(density[picks].mean()) - mean) < 1e-12 and abs(mean - budget) <= 0.3 / 5 / 2 + 1e-9
            mine = float(loss.gather(0, picks[None]).sum())
            for other in itertools.product(range(3), repeat=5):
                if float(density[list(other)].mean()) <= mean + 1e-12:
                    assert mine <= float(loss.gather(0, torch.tensor([other])).sum()) + 1e-9


@grids
@pytest.mark.parametrize("k", [0, 1, 2, 9])
def test_efficient_vdit_is_a_diagonal_of_frames_and_global_ones(grid, k):
    frames, frame = grid[0], grid[1] * grid[2]
    k = min(k, frames)
    chosen = {i * frames // k for i in range(k)}
    pairs = [[i == j or i in chosen or j in chosen for j in range(frames)] for i in range(frames)]
    assert sum(map(sum, pairs)) == k * frames + (frames - k) * (k + 1)
    expected = with_text(spread(pairs, [range(i * frame, (i + 1) * frame) for i in range(frames)]), grid)
    assert torch.equal(kept_tokens(EfficientVDiT(globals=k, block=8), grid), expected.expand(2, -1, -1))


def test_efficient_vdit_takes_the_sparsest_mask_within_one_bound_for_all_layers():
    grid, method = (4, 2, 2), EfficientVDiT(0.5)
    density = method.options(grid, 0.5)
    assert density == {k: (4 * k + (4 - k) * (k + 1)) / 16 for k in range(4)}
    rows = {0: [0.9, 0.5, 0.3], 1: [0.6, 0.4, 0.1], 2: [0.3, 0.35, 0.05], 3: [0.0, 0.0, 0.0]}  # by layer
    of = {k: torch.tensor(row, dtype=torch.float64)[None, :, None].expand(2, -1, 3) for k, row in rows.items()}
    losses = Losses([3, 4], [1, 2, 5], of)
    found, kept = method.pick(losses, grid, 0.5)
    choices = [
        [min(k for k in rows if rows[k][i] <= bound or k == 3) for i in range(3)]
        for row in rows.values()
        for bound in row
    ]
    best = min(
        choices,
        key=lambda ks: abs(sum(density[k] for k in ks) / 3 - 0.5),
    )
    assert found == {"layers": [1, 2, 5], "globals": best} and abs(kept - sum(density[k] for k in best) / 3) < 1e-12
    with pytest.raises(ValueError, match=r"method.globals must be null or an integer of at least 0, got -1"):
        EfficientVDiT(globals=-1)


def svg_losses(q, k, v, rows, grid, text):
    """What the profiling bands lose of float64 attention, row by row, [2, heads]; text: real tokens behind."""
    frame, video = grid[1] * grid[2], math.prod(grid)
    patch_major = [t * frame + p for p in range(frame) for t in range(grid[0])]
    orders = [list(range(video)), [patch_major.index(i) for i in range(video)]]
    reach = max(1, int(1.5 * frame / 8))
    losses = torch.zeros(2, 2, dtype=torch.float64)
    for h in range(2):
        for row in rows.tolist():
            weight = (k[0, : video + text, h].double() @ q[0, row, h].double() / 4).exp()
            values = v[0, : video + text, h].double()
            for i, place in enumerate(orders):
                near = [abs(place[row] // 8 - place[j] // 8) < reach for j in range(video)]
                near = torch.tensor(near + [True] * text)
                gap = (weight * near) @ values / (weight * near).sum() - weight @ values / weight.sum()
                losses[i, h] += (gap**2).mean() / len(rows)
    return losses


@grids
def test_svg_is_the_papers_rule(grid):
    """The band nearest to the density, in the order that loses less on the sampled rows."""
    found = kept_tokens(SVG(0.6, block=8), grid)
    frame, video = grid[1] * grid[2], math.prod(grid)
    rows = torch.randint(video, (64,), generator=called(grid).generator(0, CPU))
    losses = svg_losses(*tensors(grid), rows, grid, 5)
    for h in range(2):
        tokens = list(range(video))
        if losses[1, h] < losses[0, h]:
            tokens = [t * frame + p for p in range(frame) for t in range(grid[0])]
        pieces, bands = [[tokens[i] for i in piece] for piece in cut(grid, 8)], []
        for reach in range(len(pieces)):
            near = [[abs(i - j) <= reach for j in range(len(pieces))] for i in range(len(pieces))]
            bands.append(spread(near, pieces))
        best = min(bands, key=lambda band: abs(float(band.float().mean()) - 0.4))
        assert torch.equal(found[h], with_text(best, grid))


@grids
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_svg_judges_heads_by_what_its_bands_lose(grid, dtype):
    """With padding behind the real text."""
    frame, video, text = grid[1] * grid[2], math.prod(grid), 3
    q, k, v = ((3 * x).to(dtype) for x in tensors(grid))
    rows = torch.randint(video, (6,))
    method, expected = SVG(0.5, block=8), svg_losses(q, k, v, rows, grid, text)
    kept = method.bands(rows, video, frame, grid[0])
    found = method.errors(q[0, rows], k[0], v[0], kept, torch.tensor(text))
    close = {"atol": 1e-6, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 1e-3, "rtol": 0.02}
    torch.testing.assert_close(found.double(), expected, **close)


def test_svg_takes_a_band_that_underflows_as_lost():
    q, k = torch.zeros(1, 1, 16), torch.zeros(8, 1, 16)
    q[..., 0], k[0, :, 0] = 40.0, 40.0  # the first key has all, and the second band drops it
    kept = torch.ones(2, 1, 8, dtype=torch.bool)
    kept[1, :, 0] = False
    errors = SVG.errors(q, k, torch.ones(8, 1, 16), kept, torch.tensor(0))
    assert errors.tolist() == [[0.0], [1.0]]


@grids
def test_vsa_is_top_k_of_pooled_tiles(grid):
    q, k, _ = tensors(grid)
    found = kept_tokens(VSA(0.7, cube=(2, 4, 4)), grid)
    tiles = {}
    for i in range(math.prod(grid)):
        t, rest = divmod(i, grid[1] * grid[2])
        tiles.setdefault((t // 2, rest // grid[2] // 4, rest % grid[2] // 4), []).append(i)
    pieces = [tiles[key] for key in sorted(tiles)]
    top = max(1, math.ceil(round(0.3 * len(pieces), 6)))
    for h in range(2):
        mask = torch.zeros(len(pieces), len(pieces), dtype=torch.bool)
        for i, rows in enumerate(pieces):
            scores = [float(q[0, rows, h].mean(0) @ k[0, cols, h].mean(0)) for cols in pieces]
            for j in sorted(range(len(pieces)), key=lambda j: -scores[j])[:top]:
                mask[i, j] = True
        assert torch.equal(found[h], with_text(spread(mask, pieces), grid))


@pytest.mark.parametrize("grid", [(4, 8, 8), (3, 7, 9), (1, 9, 13), (8, 16, 24), (5, 1, 6)])
def test_the_curve_visits_every_token_and_goes_step_by_step(grid):
    order = curve(grid, CPU)
    assert sorted(order.tolist()) == list(range(math.prod(grid)))
    t, y, x = order // (grid[1] * grid[2]), order // grid[2] % grid[1], order % grid[2]
    steps = torch.stack([t, y, x]).diff(dim=1).abs()
    assert steps.max() == 1  # odd sides force a diagonal step here and there
    if all(n % 2 == 0 for n in grid):
        assert (steps.sum(0) == 1).all()


@grids
def test_jenga_is_the_papers_rule(grid):
    q, k, _ = tensors(grid)
    found = kept_tokens(Jenga(p=0.4, drop=0.7, block=16), grid)
    order = curve(grid, CPU).tolist()
    pieces = [[order[i] for i in piece] for piece in cut(grid, 16)]
    owner = {token: i for i, piece in enumerate(pieces) for token in piece}
    near = {(a, a) for a in range(len(pieces))}
    for token, a in owner.items():
        t, y, x = token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2]
        for other, b in owner.items():
            s, v, u = other // (grid[1] * grid[2]), other // grid[2] % grid[1], other % grid[2]
            if max(abs(t - s), abs(y - v), abs(x - u)) <= 1:
                near.add((a, b))
    assert {tuple(pair) for pair in adjacent(grid, 16, CPU).nonzero().tolist()} == near
    for h in range(2):
        mask = torch.zeros(len(pieces), len(pieces), dtype=torch.bool)
        for i, rows in enumerate(pieces):
            scores = torch.stack([q[0, rows, h].mean(0) @ k[0, cols, h].mean(0) for cols in pieces]) / 4
            weights, ranked = scores.softmax(0).sort(descending=True)
            n = max(int(0.3 * len(pieces)), int((weights.cumsum(0) <= 0.4).sum()) + 1)
            mask[i, ranked[:n]] = True
            for j in range(len(pieces)):
                mask[i, j] |= (i, j) in near
        assert torch.equal(found[h], with_text(spread(mask, pieces), grid))


@grids
@pytest.mark.parametrize("tau", [0.5, 0.9])
def test_xattention_is_the_papers_rule(grid, tau):
    q, k, _ = tensors(grid)
    found = kept_tokens(XAttention(tau=tau, stride=4, block=16), grid)
    pieces, video = cut(grid, 16), math.prod(grid)
    for h in range(2):
        rows, columns = range(0, video, 4), range(0, video, 4)
        scores = torch.zeros(len(rows), len(columns))
        for i, a in enumerate(rows):
            for j, b in enumerate(columns):
                for s in range(4):
                    if a + 3 - s < video and b + s < video:
                        scores[i, j] += q[0, a + 3 - s, h] @ k[0, b + s, h] / (4 * 4)
        weights = scores.softmax(1)
        mask = torch.zeros(len(pieces), len(pieces), dtype=torch.bool)
        for i in range(len(pieces)):
            mass = [float(weights[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].sum()) for j in range(len(pieces))]
            total = 0.0
            for j in sorted(range(len(pieces)), key=lambda j: -mass[j]):
                if total > tau * sum(mass):
                    break
                total += mass[j]
                mask[i, j] = True
        assert torch.equal(found[h], with_text(spread(mask, pieces), grid))


@grids
@pytest.mark.parametrize("cdf, similarity", [(0.5, -0.1), (0.6, 0.055), (0.98, 0.6)])
def test_sparge_is_the_papers_rule(grid, cdf, similarity):
    q, k, v = tensors(grid)
    k = k + 2  # what all keys share makes none alike
    found = kept_tokens(Sparge(cdf=cdf, similarity=similarity, block=16), grid, inputs=(q, k, v))
    rows, columns = cut(grid, 16), cut(grid, 8)
    smooth = k - k[:, : math.prod(grid)].mean(1, keepdim=True)

    def alike(x):
        unit = x / x.norm(dim=1, keepdim=True)
        return float((unit @ unit.T).mean()) > similarity

    for h in range(2):
        q_alike, k_alike = ([alike(x[0, list(piece), h]) for piece in s] for x, s in ((q, rows), (smooth, columns)))
        mask = torch.zeros(len(rows), len(columns), dtype=torch.bool)
        for i, a in enumerate(rows):
            scores = torch.stack([q[0, list(a), h].mean(0) @ k[0, list(b), h].mean(0) for b in columns]) / 4
            weights = torch.tensor([math.exp(s) * w for s, w in zip(scores, k_alike, strict=True)])
            ranked, where = (weights / weights.sum()).sort(descending=True)
            n = max(1, int((ranked.cumsum(0) <= cdf).sum()))
            for j in range(len(columns)):
                mask[i, j] = not q_alike[i] or not k_alike[j] or (any(k_alike) and j in where[:n].tolist())
        assert torch.equal(found[h], with_text(spread(mask, rows, columns), grid))


@grids
@pytest.mark.parametrize("window", [0.5, 0.9])
def test_re_ttention_is_the_papers_rule(grid, window):
    """Token by token: a full step, three steps that reuse it, a full one again, and one more."""
    layout, method = Layout(grid, 5), ReTtention(window_sparsity=window, period=4, growth=0.3, block=8)
    kept = kept_tokens(method, grid)[0]
    state, meter, length = {}, Meter(), layout.length
    torch.manual_seed(0)
    for step in range(6, 12):
        q, k, v = torch.randn(3, 1, length, 2, 16)
        call = Call(layout, step, 12, 1, "cond", torch.tensor([5]), (3,), 0, state, run("cpu"), meter, (6, 12))
        before = float(meter.kept[0]) if step > 6 else 0.0
        out = method.attend(q, k, v, call)[0]
        weight = (torch.einsum("qhd,khd->hqk", q[0], k[0]) / 4).exp()
        windowed = torch.einsum("hqk,khd->qhd", weight * kept / (weight * kept).sum(-1, keepdim=True), v[0])
        if step in (6, 10):
            full = torch.einsum("hqk,khd->qhd", weight / weight.sum(-1, keepdim=True), v[0])
            rho = ((weight * kept).sum(-1) / weight.sum(-1)).T[..., None]
            residual, expected = full - rho * windowed, full
            executed = 2 * length**2  # every pair once, of two heads
        else:
            expected = rho * windowed + residual
            rho = (rho + 0.3).clamp(max=1)
            executed = 2 * int(kept.sum())
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
        assert float(meter.kept[0]) - before == executed
    assert meter.calls == meter.sparse_calls == 6 and float(meter.all[0]) == 6 * 2 * length**2


@grids
def test_re_ttentions_window_is_a_band_of_places_in_every_frame(grid):
    found = kept_tokens(ReTtention(window_sparsity=0.6, block=8), grid)
    frames, frame = grid[0], grid[1] * grid[2]
    tokens = [t * frame + p for p in range(frame) for t in range(frames)]
    pieces = [[tokens[i] for i in piece] for piece in cut(grid, 8)]
    bands = []
    for reach in range(len(pieces)):
        near = [[abs(i - j) <= reach for j in range(len(pieces))] for i in range(len(pieces))]
        bands.append(spread(near, pieces))
    best = min(bands, key=lambda band: abs(float(band.float().mean()) - 0.4))
    assert torch.equal(found, with_text(best, grid).expand(2, -1, -1))


def test_re_ttention_counts_its_full_steps_and_refuses_what_they_leave_no_room_for():
    assert ReTtention(0.5).schedule((0, 15)) == (5, (0.5 * 15 - 3) / 12)
    assert ReTtention(0.75).schedule((5, 20)) == (5, (0.25 * 15 - 3) / 12)
    period, density = ReTtention(0.9).schedule((0, 15))
    assert period == 15 and abs(density - 0.5 / 14) < 1e-9
    assert ReTtention(0.75).schedule((10, 26, 40)) == (6, (0.25 * 30 - 6) / 24)  # three full ones in each
    assert ReTtention(0.9).schedule((10, 26, 40)) == (16, pytest.approx((0.1 * 30 - 2) / 28))
    for sparsity, active in ((0.95, 15), (0.5, 1), (0.9, 10)):
        with pytest.raises(ValueError, match=rf"sparsity={sparsity} is out of re_ttention's reach in {active} active"):
            ReTtention(sparsity).schedule((0, active))
    ReTtention(0.9).meet(SimpleNamespace(steps=20, switches=()), DenseParts(0.25))
    with pytest.raises(ValueError, match="in 10 active steps, 1 of which is full"):
        ReTtention(0.9).meet(SimpleNamespace(steps=20, switches=()), DenseParts(0.5))
    with pytest.raises(ValueError, match="in 15 active steps, 2 of which are full"):
        ReTtention(0.9).meet(SimpleNamespace(steps=20, switches=(10,)), DenseParts(0.25))
    with pytest.raises(ValueError, match=r"method.window_sparsity must be null or a number in \[0, 1\), got 1.2"):
        ReTtention(window_sparsity=1.2)
    with pytest.raises(ValueError, match=r"method.period must be an integer of at least 1, got 0"):
        ReTtention(period=0)
