"""The Triton kernels of k-means find the clusters of the torch reference, and compile for a Hopper GPU without one."""

import pytest
import torch
from draftbench.kernels import clusters, kmeans

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
TILES = [(16, 16), (32, 64), (clusters.LAUNCH["nearest"]["M"], clusters.LAUNCH["nearest"]["N"])]


@pytest.fixture(autouse=True)
def on_reference(monkeypatch):
    """`kmeans` is the reference here, also on a GPU; a test that wants the kernels undoes this."""
    monkeypatch.setattr(kmeans, "fast", lambda x: False)


@pytest.fixture
def tiles(monkeypatch):
    def take(m, n):
        monkeypatch.setitem(clusters.LAUNCH, "nearest", clusters.LAUNCH["nearest"] | {"M": m, "N": n})

    return take


def whole(batch, heads, length, dim, dtype=torch.bfloat16):
    """Tokens of small whole numbers, whose products and sums are exact, [B, H, S, D] as a model lays them out.

    What lies behind them is NaN, as padding may be.
    """
    x = torch.randint(-2, 3, (batch, length + 5, heads, dim), device=DEVICE).to(dtype)
    x[:, length:] = torch.nan
    return x[:, :length].transpose(1, 2)


@pytest.mark.pairs(
    shape=[(1, 1, 1), (2, 3, 37), (1, 2, 300)], dim=[16, 24, 64], count=[1, 16, 21, 70],
    dtype=[torch.bfloat16, torch.float16], tile=TILES,
)  # fmt: skip
def test_the_nearest_is_the_references_also_among_equals(shape, dim, count, dtype, tile, tiles):
    tiles(*tile)
    torch.manual_seed(0)
    x = whole(*shape, dim, dtype)
    centroids = torch.randint(-1, 2, (*shape[:2], count, dim), device=DEVICE).float()
    centroids[..., dim // 8 :] = 0  # many are the same, and many are as near as others
    found = clusters.nearest(x, centroids)
    assert found.dtype == torch.int32 and torch.equal(found.long(), kmeans.nearest(x, centroids))


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("dim", [24, 64])
def test_means_are_of_the_clusters_tokens(rows, dim, monkeypatch):
    monkeypatch.setitem(clusters.LAUNCH, "means", clusters.LAUNCH["means"] | {"R": rows})
    torch.manual_seed(0)
    x = whole(2, 3, 150, dim)
    labels = torch.randint(0, 4, (2, 3, 150), device=DEVICE) * 2
    labels[0, 0] = 4
    before = torch.randn(2, 3, 8, dim, device=DEVICE)
    order, starts = kmeans.by_cluster(labels, 8)
    moved = clusters.means(x, order, starts, before)
    assert torch.equal(moved, kmeans.means(x, order, starts, before))
    for b, h, c in [(0, 0, 4), (1, 2, 0), (1, 0, 6)]:
        torch.testing.assert_close(moved[b, h, c], x[b, h, labels[b, h] == c].double().mean(0).float())
    assert torch.equal(moved[:, :, 1::2], before[:, :, 1::2]) and torch.equal(moved[0, 0, 0], before[0, 0, 0])


@pytest.mark.parametrize("count", [7, 2**14])
def test_tokens_lie_by_cluster_as_they_come(count):
    """Also where a number for each cluster of each head takes more than 16 bits."""
    torch.manual_seed(0)
    labels = torch.randint(0, 7, (2, 1, 50), dtype=torch.int32, device=DEVICE) * (count // 7)
    order, starts = kmeans.by_cluster(labels, count)
    assert order.dtype == starts.dtype == torch.int64 and starts.shape == (2 * count + 1,)
    for item in range(2):
        one = labels[item, 0].tolist()
        assert order[item, 0].tolist() == sorted(range(50), key=one.__getitem__)
        sizes = starts.diff().view(2, count)[item]
        assert sizes.sum() == 50 and all(sizes[c] == one.count(c) for c in set(one))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_rounds_together(dtype, monkeypatch, tiles):
    torch.manual_seed(0)
    middle = 4 * torch.randn(2, 2, 9, 32, device=DEVICE)
    x = middle.repeat_interleave(torch.tensor([30, 1, 2, 60, 5, 7, 20, 9, 10], device=DEVICE), 2)
    x = (x + torch.randn_like(x) / 8).to(dtype)[:, :, torch.randperm(x.shape[2])]
    start = torch.cat([middle + torch.randn_like(middle), torch.full((2, 2, 1, 32), 50.0, device=DEVICE)], 2)
    expected = kmeans.kmeans(x, start, 3)
    monkeypatch.setattr(kmeans, "fast", lambda x: True)
    for tile in TILES:
        tiles(*tile)
        order, centroids, sizes = kmeans.kmeans(x, start, 3)
        assert torch.equal(order, expected[0]) and torch.equal(sizes, expected[2])
        torch.testing.assert_close(centroids, expected[1])
    single = kmeans.kmeans(x.float(), start, 3)  # stays with torch
    torch.testing.assert_close(single[1], expected[1], atol=0.02, rtol=0.02)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dim, count", [(64, 391), (128, 1000)])
def test_no_synchronisation_and_a_graph(dim, count, monkeypatch, no_waiting):
    torch.manual_seed(0)
    x = torch.randn(1, 9001, 24, dim, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
    start = x[:, :, :count].float()
    same = kmeans.nearest(x, start) == clusters.nearest(x, start)
    assert same.float().mean() > 0.999  # of random tokens the two nearest can be as near up to rounding
    monkeypatch.undo()
    order, centroids, sizes = kmeans.kmeans(x, start, 2)  # compiles
    with no_waiting():
        kmeans.kmeans(x, start, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kmeans.kmeans(x, start, 2)
    for _ in range(2):
        graph.replay()
        for one, other in zip(found, (order, centroids, sizes), strict=True):
            assert torch.equal(one, other)


COMPILE = """
from draftbench.kernels import clusters

dtype, dim = CASE
x = {"X": dtype, "ORDER": "*i64", "STARTS": "*i64", "OLD": "*fp32", "NEW": "*fp32"}
steps = ("x_b", "x_h", "x_s")
compiled(clusters._means, clusters.LAUNCH["means"] | {"D": dim, "WIDTH": dim}, steps, **x)
launch = clusters.LAUNCH["nearest"]
warps, levels = launch["num_warps"], (launch["N"] // 8).bit_length() - 1
made, registers = compiled(
    clusters._nearest, launch | {"D": dim, "WIDTH": dim, "UPCAST": False, "LEVELS": levels}, (*steps, "count"),
    X=dtype, LOW=dtype, HALF="*fp32", LABELS="*i32",
)
assert made.asm["ptx"].count("wgmma.mma_async") > 0
# Two programs fit a multiprocessor: 228 KB of shared memory, 1 KB of it each program's, and 65536 registers.
assert 2 * (made.metadata.shared + 1024) <= 228 * 1024, made.metadata.shared
assert 2 * warps * 32 * -(-registers // 8) * 8 <= 65536, registers
print("compiled", made.metadata.shared, registers)
"""


@pytest.mark.parametrize("case", [("*bf16", 128), ("*bf16", 64), ("*fp16", 128)], ids=["bf16-128", "bf16-64", "fp16"])
def test_they_compile(case, compiled_alone):
    compiled_alone(COMPILE.replace("CASE", repr(case)))
