"""Executors as PyTorch operators: their contract, CUDA graphs, no waiting for the device, no S x S memory."""

import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from draftbench.kernels import dense, devices, fa4, resolve, run
from draftbench.kernels.operators import NAMES, flatten, unflatten
from draftbench.kernels.select import box_plan, full_plan, plan_from_mask
from draftbench.methods.draft import Draft

from draftbench.attention import DenseParts, Plan, Session
from draftbench.layout import Box, Identity, Index, Layout, even_sizes

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
README = (Path(__file__).parent.parent / "README.md").read_text()
on_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
each_executor = pytest.mark.parametrize("name", ["triton", "gluon", "fa4", "flex"])
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}


def problem(grid, text=0, box=None, batch=1, heads=2, dim=64, kept=0.25, dtype=torch.bfloat16):
    """(q, k, v, plan, layout) of a plan with random lists."""
    layout, box = Layout(grid, text), box or Box(1, 8, 16)
    call = SimpleNamespace(layout=layout, text_lengths=torch.full((batch,), text, device=DEVICE))
    n = int(torch.tensor(box.counts(grid)).prod())
    torch.manual_seed(0)
    mask = torch.rand(batch, heads, n, n, device=DEVICE) < kept
    mask[..., 0] = True
    q, k, v = (torch.randn(batch, layout.length, heads, dim, device=DEVICE, dtype=dtype) for _ in range(3))
    return q, k, v, box_plan(mask, box, call), layout


def runnable(name, q, plan):
    executor = run(name)
    reason = executor.modules[name].refuse(q, plan)
    if reason:
        pytest.skip(reason)
    return executor


@pytest.mark.parametrize(
    "order",
    [Identity(), Box(1, 4, 8), Box(1, 4, 8, stacked=True), Index(torch.arange(128)[None, None])],
    ids=["plain", "box", "stacked", "index"],
)
def test_a_plan_comes_back_from_its_arguments(order):
    *_, plan, layout = problem((2, 8, 8), 5, Box(1, 4, 8))
    plan = dataclasses.replace(plan, q_order=order)
    again, where = unflatten(*flatten(plan, layout))
    assert where == layout
    for field in dataclasses.fields(Plan):
        a, b = getattr(plan, field.name), getattr(again, field.name)
        assert a is b or a == b or (isinstance(a, Index) and a.tokens is b.tokens)


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_the_operator_keeps_its_contract(name):
    q, k, v, plan, layout = problem((1, 8, 12), 5, Box(1, 4, 8), dtype=torch.float32, dim=16)
    executor = runnable(name, q, plan)
    operator = getattr(torch.ops.draftbench, name).default
    arguments = (q, k, v, *flatten(plan, layout))
    torch.library.opcheck(
        operator, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static")
    )
    assert all(torch.equal(a, b) for a, b in zip(operator(*arguments), executor(q, k, v, plan, layout), strict=True))


def test_a_refusal_names_the_executor_and_the_reason():
    q, k, v, plan, layout = problem((1, 8, 8))
    with pytest.raises(ValueError, match=r"executor=fa4 cannot run this plan: "):
        run("fa4")(q.double(), k.double(), v.double(), plan, layout)
    with pytest.raises(ValueError, match=r"executor=triton cannot run this plan: dtype must be"):
        torch.ops.draftbench.triton(q.double(), k.double(), v.double(), *flatten(plan, layout))


def test_names_in_order_until_one_takes_the_plan(monkeypatch):
    q, k, v, plan, layout = problem((1, 8, 8), box=Box(1, 4, 8), dtype=torch.float32)
    executor = run("fa4+reference")
    executor(q, k, v, plan, layout)
    assert executor.ran == {"reference"}


def test_what_an_executor_needs_is_said_before_a_run(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(fa4, "installed", lambda: False)
    assert resolve("auto", cuda) == "gluon+triton" and resolve("auto", torch.device("cpu")) == "cpu"
    with pytest.raises(RuntimeError, match=r"executor=fa4 .* pip install 'draftbench\[hopper\]'"):
        resolve("fa4", cuda)
    monkeypatch.setattr(fa4, "installed", lambda: True)
    assert resolve("auto", cuda) == "gluon+fa4+triton" and resolve("fa4", cuda) == "fa4"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert resolve("auto", cuda) == "triton"
    for name in ("fa4", "gluon"):
        with pytest.raises(RuntimeError, match=rf"executor={name} .* Hopper GPU .* got 8\.0"):
            resolve(name, cuda)
    with pytest.raises(RuntimeError, match=r"executor=fa4 .* needs a CUDA device"):
        resolve("fa4", torch.device("cpu"))


def rows():
    """The README's table of executors: {name: {column: text}}."""
    table = README.split("## Executors")[1].split("\n\n| ")[1].split("\n\n")[0]
    header, _, *lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    return {line[0].strip("`"): dict(zip(header, line, strict=True)) for line in lines}


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_tells_what_an_executor_takes(name, monkeypatch):
    """Its column of dtypes, head dims and blocks against `refuse` itself."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(fa4, "installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    row, refuse = rows()[name], run(name).modules[name].refuse
    device = torch.device("cpu" if row["device"] == "CPU" else "cuda")

    def takes(dtype=torch.bfloat16, dim=64, block=128):
        q = SimpleNamespace(device=device, dtype=dtype, shape=(1, 256, 2, dim), is_cuda=device.type == "cuda")
        starts = torch.zeros(1, 1, 3)
        plan = Plan(starts, starts, starts, starts, block, block, regular=True)
        return refuse(q, plan) is None

    said = set(re.findall(r"\w+\d+", row["dtypes"])) or set(DTYPES)
    assert {key for key, dtype in DTYPES.items() if takes(dtype)} == said
    dims = {int(x) for x in re.findall(r"\d+", row["head dims"])}
    assert {dim for dim in (16, 32, 64, 80, 128, 256) if takes(dim=dim)} == (dims or {16, 32, 64, 80, 128, 256})
    step, sizes = int((re.findall(r"\d+", row["blocks"]) or [1])[0]), (48, 64, 128, 256)
    whole = row["blocks"] == "any" or row["blocks"].startswith("multiples of ")
    assert [takes(block=size) for size in sizes] == [size % step == 0 if whole else size == step for size in sizes]


SHAPES = {"even": ((4, 16, 32), 0), "ragged": ((3, 20, 40), 77)}


@on_gpu
@pytest.mark.gpu
@each_executor
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_waits_for_the_device(name, shape, no_waiting):
    q, k, v, plan, layout = problem(*SHAPES[shape])
    executor = runnable(name, q, plan)
    executor(q, k, v, plan, layout)  # compiles
    with no_waiting():
        executor(q, k, v, plan, layout)


def captured(function):
    """Run once to compile, then capture; returns (graph, the result that a replay fills)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@on_gpu
@pytest.mark.gpu
@each_executor
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cuda_graph_replays_it(name, shape):
    q, k, v, plan, layout = problem(*SHAPES[shape])
    executor = runnable(name, q, plan)
    graph, (out, lse) = captured(lambda: executor(q, k, v, plan, layout))
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    expected, expected_lse = executor(q, k, v, plan, layout)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["dense", "sparse"])
@each_executor
def test_a_cuda_graph_of_each_phase(name, phase):
    """A session's whole call, selection included: the dense steps as one graph, the sparse ones as another."""
    q, k, v, plan, layout = problem((4, 16, 32), 128, dim=128)
    executor = runnable(name, q, plan)
    session = Session(Draft(0.5), executor, dense.run, DenseParts(0.5), counting=False)
    session.start(1)
    session.at_step(0 if phase == "dense" else 9, 10, 0.0)
    where = dict(layout=layout, text_lengths=torch.tensor([128], device=DEVICE), layer=0, branch="cond", seeds=(0,))
    session.on_host(where["text_lengths"])  # reads the lengths once, before capture
    graph, out = captured(lambda: session(q, k, v, **where))
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, session(q, k, v, **where), atol=0, rtol=0)
    assert (session.meter.sparse_calls > 0) == (phase == "sparse")


@on_gpu
@pytest.mark.gpu
@each_executor
@pytest.mark.parametrize("shape, text", [((32, 32, 32), 0), ((32, 33, 32), 77)], ids=["even", "ragged"])
def test_memory_is_linear_in_tokens(name, shape, text):
    """Copies of q, k, v and the output, and lists; the scores of one head alone would be two GB and more."""
    q, k, v, plan, layout = problem(shape, text)
    executor = runnable(name, q, plan)
    executor(q, k, v, plan, layout)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    executor(q, k, v, plan, layout)
    bound = 12 * q.numel() * q.element_size() + 40 * plan.blocks.numel() * plan.blocks.element_size()
    assert torch.cuda.max_memory_allocated() - before < bound < layout.length**2 * 2


@on_gpu
@pytest.mark.gpu
@each_executor
def test_a_full_plan_is_dense_attention(name):
    layout = Layout((4, 16, 32), 128)
    call = SimpleNamespace(layout=layout, text_lengths=torch.tensor([128], device=DEVICE))
    plan = full_plan(call, 2)
    q, k, v = (torch.randn(1, layout.length, 2, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    out = runnable(name, q, plan)(q, k, v, plan, layout)[0]
    torch.testing.assert_close(out, dense.run(q, k, v, layout, [128]), atol=2e-2, rtol=2e-2)


@on_gpu
@pytest.mark.gpu
@each_executor
def test_an_order_for_each_head(name):
    """SVG's plans: blocks of 128 of an order for each head, the last one ragged."""
    layout = Layout((4, 15, 32), 77)
    call = SimpleNamespace(layout=layout, text_lengths=torch.tensor([77, 50], device=DEVICE))
    sizes = even_sizes(layout.video, 128, DEVICE)
    mask = torch.rand(2, 3, len(sizes), len(sizes), device=DEVICE) < 0.5
    order = Index(torch.rand(2, 3, layout.video, device=DEVICE).argsort(-1))
    plan = plan_from_mask(mask, order, sizes, 128, call)
    q, k, v = (torch.randn(2, layout.length, 3, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    out, lse = runnable(name, q, plan)(q, k, v, plan, layout)
    expected, expected_lse = run("reference")(q.float(), k.float(), v.float(), plan, layout)
    assert (out.float() - expected).norm() / expected.norm() < 5e-3
    torch.testing.assert_close(lse, expected_lse, atol=1e-2, rtol=0)


def test_tensors_that_do_not_go_together_are_refused():
    q, k, v, plan, layout = problem((2, 8, 16), 5)
    for changed, message in (
        ((q, k[:, :, :1], v), r"must have one shape .* got \[1, 261"),
        ((q, k, v.half()), "must have one dtype on one device, got torch.bfloat16 on .*torch.float16"),
        ((q[:, :-1], k[:, :-1], v[:, :-1]), "must have the layout's 261 tokens, got 260"),
        ((q[:, :, :1], k[:, :, :1], v[:, :, :1]), "lists must be for 1 items and 1 heads"),
    ):
        with pytest.raises(ValueError, match=f"executor=reference cannot run this plan: .*{message}"):
            run("reference")(*changed, plan, layout)


def test_auto_needs_triton_on_a_gpu(monkeypatch):
    monkeypatch.setattr(devices, "triton_version", lambda: None)
    with pytest.raises(RuntimeError, match=r"executor=auto cannot run here: .* pip install 'draftbench\[triton\]'"):
        resolve("auto", torch.device("cuda"))


def test_dense_takes_the_fastest_kernel_that_is_there(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(fa4, "installed", lambda: True)
    assert dense.name(cuda) == "fa4" and dense.name(torch.device("cpu")) == "sdpa"
    monkeypatch.setattr(fa4, "installed", lambda: False)
    assert dense.name(cuda) == "cudnn"
    monkeypatch.setattr(fa4, "installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert dense.name(cuda) == "cudnn"


def test_dense_by_flash_attention_4(monkeypatch):
    q, k, v, _, layout = problem((2, 8, 16), 5, batch=2)
    expected = dense.run(q, k, v, layout, [5, 3])
    interface = ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd = lambda q, k, v: (
        dense.F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2),
        None,
    )
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    monkeypatch.setattr(dense, "name", lambda *_: "fa4")
    assert torch.equal(dense.run(q, k, v, layout, [5, 3]), expected)


def test_the_dense_kernel_is_what_the_device_and_dtype_have(monkeypatch):
    card, capability = torch.device("cuda"), [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(dense.fa4, "unavailable", lambda device: None)
    assert dense.name(card) == "fa4" and dense.name(card, torch.float32) == "sdpa"
    monkeypatch.setattr(dense.fa4, "unavailable", lambda device: "it is not installed")
    assert dense.name(card) == "cudnn" and dense.name(torch.device("cpu")) == "sdpa"
    capability[0] = (7, 5)
    assert dense.name(card) == "sdpa"
    capability[0] = (9, 4)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert dense.name(card) == "sdpa"
