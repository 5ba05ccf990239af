"""The Triton kernels of XAttention's map agree with the torch reference, and compile for a Hopper GPU without one."""

import pytest
import torch
from draftbench.kernels import antidiagonals
from draftbench.methods import xattention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")  # the log of a block that is nothing beside others
TILES = [(16, 32), (32, 64), (64, 32)]


@pytest.fixture(autouse=True)
def on_reference(monkeypatch):
    """`xattention` is the reference here, also on a GPU; a test that wants the kernels undoes this."""
    monkeypatch.setattr(xattention, "fast", lambda x: False)


@pytest.fixture
def tiles(monkeypatch):
    def take(m, n):
        for name in antidiagonals.LAUNCH:
            monkeypatch.setitem(antidiagonals.LAUNCH, name, antidiagonals.LAUNCH[name] | {"M": m, "N": n, "BAND": 2})

    return take


def tensors(video, dim, dtype, batch=1, heads=2, text=0):
    """q and k, peaked in places; the text behind the video is NaN, as padding may be."""
    torch.manual_seed(0)
    q, k = (2 * torch.randn(batch, video + text, heads, dim, device=DEVICE).to(dtype) for _ in range(2))
    q[:, video:], k[:, video:] = torch.nan, torch.nan
    return q, k


def reference(q, k, *rest):
    """Float32 throughout: the reference rounds scores to the precision of its inputs."""
    return xattention.antidiagonal_map(q.float(), k.float(), *rest)


@pytest.mark.pairs(
    stride=[4, 8], block=[64, 128], dim=[32, 64, 128], dtype=[torch.float16, torch.float32], batch=[1, 2],
    video=[512, 640, 531, 50], text=[0, 5, 16], tile=TILES,
)  # fmt: skip
def test_the_map_is_the_references(stride, block, dim, dtype, batch, video, text, tile, tiles):
    tiles(*tile)
    q, k = tensors(video, dim, dtype, batch=batch, text=text)
    found = antidiagonals.block_map(q, k, video, block, stride)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference(q, k, video, block, stride), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))


def test_any_strides(tiles):
    """As [B, H, S, D] lies, as a slice of q, k and v together, with channels apart, and with odd ones."""
    tiles(16, 32)
    q, k = tensors(130, 32, torch.float32, batch=2)
    expected = reference(q, k, 130, 16, 4)
    layouts = [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat([x, x, x], -1)[..., 32:64],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    for layout in layouts:
        for length in (130, 128):  # filled up, and as it lies
            found = antidiagonals.block_map(layout(q), layout(k), length, 16, 4)
            torch.testing.assert_close(found, expected if length == 130 else reference(q, k, 128, 16, 4))
    q, k = q[..., :27], k[..., :27]
    torch.testing.assert_close(antidiagonals.block_map(q, k, 130, 16, 4), reference(q, k, 130, 16, 4))


def test_heads_that_wait_their_turn_and_steep_rows(tiles, monkeypatch):
    tiles(16, 32)
    q, k = tensors(300, 32, torch.float32, batch=2, heads=3)
    expected = reference(q, 40 * k, 300, 32, 4)
    monkeypatch.setattr(antidiagonals, "WORKSPACE", 4 * 75 * 10 * 4)
    torch.testing.assert_close(antidiagonals.block_map(q, 40 * k, 300, 32, 4), expected, atol=1e-5, rtol=1e-4)


def test_the_method_asks_for_them_where_blocks_fit_tiles(monkeypatch, tiles):
    tiles(16, 32)
    monkeypatch.setattr(xattention, "fast", lambda x: True)
    monkeypatch.setattr(antidiagonals, "block_map", lambda *rest: "kernels")
    q, k = tensors(96, 32, torch.float32)
    assert xattention.antidiagonal_map(q, k, 96, 32, 4) == "kernels"
    assert xattention.antidiagonal_map(q, k, 96, 48, 4).shape == (1, 2, 2, 2)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("video, stride, dim", [(20_000, 8, 128), (20_003, 4, 64)])
def test_no_synchronisation_and_a_graph(video, stride, dim, monkeypatch, no_waiting):
    q, k = tensors(video, dim, torch.bfloat16, heads=4, text=256)
    expected = reference(q, k, video, 128, stride)
    rounded = xattention.antidiagonal_map(q, k, video, 128, stride)
    monkeypatch.undo()
    found = xattention.antidiagonal_map(q, k, video, 128, stride)  # compiles
    off = (found - expected).abs().max()
    assert off <= 1e-5 and off <= (rounded - expected).abs().max()
    graph = torch.cuda.CUDAGraph()
    with no_waiting(), torch.cuda.graph(graph):
        made = xattention.antidiagonal_map(q, k, video, 128, stride)
    for _ in range(2):
        graph.replay()
        assert torch.equal(made, found)


COMPILE = """
from draftbench.kernels import antidiagonals

kind, dtype, each = CASE
launch = dict(antidiagonals.LAUNCH[kind])
shapes = {name: f"tensordesc<{dtype}[1, 1, 1, {launch[side]}, {launch['C']}]>" for name, side in zip("QK", "MN")}
logs = {"LOGS": "*fp32"}
compiled(antidiagonals._mean, {"EACH": each, "WIDTH": 1024, "num_warps": 4}, WEIGHTS="*fp32", **logs)
made, registers = compiled(
    antidiagonals._sums, launch | {"STRIDE": 8, "CHUNKS": 128 // launch["C"], "EACH": each, "UPCAST": False},
    scale="fp32", **shapes, **logs,
)
ptx = made.asm["ptx"]
assert ptx.count("cp.async.bulk.tensor.5d") > 0
assert (ptx.count("wgmma.mma_async") > 0) == (kind != "single")
assert made.metadata.shared <= {"half": 227, "narrow": 99, "single": 99}[kind] * 1024, made.metadata.shared
print("compiled", kind, dtype, made.metadata.shared, registers, ptx.count("wgmma.mma_async"))
"""


@pytest.mark.parametrize(
    "case", [("half", "bf16", 16), ("half", "fp16", 32), ("narrow", "bf16", 16), ("single", "fp32", 16)], ids=str
)
def test_they_compile(case, compiled_alone):
    compiled_alone(COMPILE.replace("CASE", repr(case)))
