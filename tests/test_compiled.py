"""A compiled block holds its whole attention as one node and compiles once for all steps, layers and methods."""

import pytest
import torch
from draftbench.kernels import dense, run
from draftbench.methods.dense import Dense
from draftbench.methods.draft import Draft
from draftbench.methods.random import Random
from torch._dynamo.utils import counters

from draftbench.attention import DenseParts, Request, Session
from draftbench.compiled import handles
from draftbench.models.pocket.adapter import Pocket

REQUEST = Request(("turn left", "walk forward in the lamp hall"), (0, 1), 4)
METHODS = {"dense": Dense(), "draft": Draft(0.5, region=(4, 4)), "random": Random(0.5, region=(4, 4))}


class Backend:
    """Runs graphs as they are and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward


def clips(model, method):
    session = Session(method, run("cpu"), dense.run, DenseParts(0.25, layers=1))
    frames = model.generate(REQUEST, session)
    return frames, session.meter


def pocket(weights, compiled=False):
    return Pocket(weights=str(weights), frames=5, height=32, width=48, device="cpu", compile=compiled)


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_one_graph_for_all_steps_layers_and_methods(tiny, one_thread, fresh):
    backend, plain, model = Backend(), pocket(tiny()), pocket(tiny(), compiled=True)
    model.network.compile_blocks(backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        made = {name: clips(model, method) for name, method in METHODS.items()}
    assert len(backend.graphs) == counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    nodes = [node.target for node in backend.graphs[0].graph.nodes if "draftbench" in str(node.target)]
    assert nodes == [torch.ops.draftbench.attend]
    for name, method in METHODS.items():
        frames, meter = clips(plain, method)
        assert torch.equal(frames, made[name][0])
        assert (meter.density(), meter.calls) == (made[name][1].density(), made[name][1].calls)
        assert meter.calls == REQUEST.steps * len(plain.network.blocks)


def test_survives_tracing_to_aten(tiny, one_thread, fresh):
    model = pocket(tiny(), compiled=True)
    model.network.compile_blocks("aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        frames, _ = clips(model, METHODS["draft"])
    assert (frames.int() - clips(pocket(tiny()), METHODS["draft"])[0].int()).abs().max() <= 1


def test_handles_end_with_their_block():
    q = torch.randn(1, 6, 2, 4)
    with handles(lambda q, k, v, layer: q + layer, 3) as found:
        assert torch.equal(torch.ops.draftbench.attend(q, q, q, found[2]), q + 2)
        torch.library.opcheck(torch.ops.draftbench.attend.default, (q, q, q, found[1]))
        torch.library.opcheck(torch.ops.draftbench.attend_joint.default, (q, q, q, found[1], 2))
    with pytest.raises(KeyError):
        torch.ops.draftbench.attend(q, q, q, found[2])


@pytest.mark.parametrize("real", [4, 5, 6])
def test_joint_attention_fills_up_the_text(real):
    q = torch.randn(2, 6, 2, 4)
    with handles(lambda q, k, v, layer: (q + k + v)[:, :real], 1) as (handle,):
        video, text = torch.ops.draftbench.attend_joint(q, q, q, handle, 2)
    assert torch.equal(video, 3 * q[:, :4]) and video.is_contiguous() and text.shape == (2, 2, 2, 4)
    assert torch.equal(text[:, : real - 4], 3 * q[:, 4:real]) and not text[:, real - 4 :].any()
