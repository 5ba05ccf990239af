"""Timing on a clock that the test sets: what counts as a step, as attention, as a part."""

import types

import numpy as np
import pytest
import torch
from draftbench.kernels import dense, run
from draftbench.methods.draft import Draft

from draftbench import latency, parts
from draftbench.attention import DenseParts, Session
from draftbench.latency import Timer, Timing, in_turn, quantiles
from draftbench.layout import Layout

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which pass only when the test says so."""
    now = types.SimpleNamespace(s=100.0)
    fake = types.SimpleNamespace(perf_counter=lambda: now.s)
    monkeypatch.setattr(latency, "time", fake)
    monkeypatch.setattr(parts, "time", fake)

    def wait(ms):
        now.s += ms / 1000

    return wait


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0, 2.0, 8.5], list(np.random.rand(40))], ids=len)
def test_quantiles_are_numpys(values):
    expected = np.quantile(values, [0.2, 0.5, 0.8])
    found = quantiles(values)
    assert found["n"] == len(values)
    assert [found["p20"], found["p50"], found["p80"]] == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_timer_tells_steps_from_attention_and_from_what_comes_after(clock):
    timer = Timer(CPU)
    clock(1000)  # before the first step: loading, noise
    for step, other in enumerate((10, 20, 30)):
        timer.step(step)
        for ms in (1, 2):
            clock(other)
            with timer.attention():
                clock(ms)
    timer.finish()
    clock(1000)  # decoding
    timing = timer.timing()
    assert timing.step_ms == pytest.approx([23, 43, 63]) and timing.attention_ms == pytest.approx([3, 3, 3])
    assert timing.generate_s == pytest.approx([0.129])
    later = timing.only({1, 2})
    assert later.step_ms == pytest.approx([43, 63]) and len(later.attention_ms) == 2
    assert later.generate_s == timing.generate_s
    assert timing.only(set()) == timing
    twice = Timing([1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]).only({1})
    assert twice == Timing([1.0, 2.0], [2.0, 4.0], [6.0, 8.0])


def test_a_session_times_every_attention_call():
    timer = Timer(CPU)
    layout, lengths = Layout((2, 4, 4), 2), torch.tensor([2])
    session = Session(Draft(0.5, (2, 2)), run("cpu"), dense.run, DenseParts(0.5), timer)
    session.start(1)
    for step in range(2):
        session.at_step(step, 2, 0.0)
        for layer in range(3):
            q = torch.randn(1, layout.length, 1, 16)
            session(q, q, q, layout=layout, text_lengths=lengths, layer=layer, branch="cond", seeds=(0,))
    session.finish()
    assert [len(calls) for calls in timer.calls] == [3, 3]
    timing = timer.timing()
    assert all(0 < a <= s for a, s in zip(timing.attention_ms, timing.step_ms, strict=True))
    assert sum(timing.step_ms) == pytest.approx(1000 * timing.generate_s[0])


def test_runs_take_turns():
    order = []

    def runner(name, seconds):
        return lambda: order.append(name) or Timing([seconds], [1.0, 3.0], [0.5])

    timings = in_turn({"dense": runner("dense", 2.0), "draft": runner("draft", 1.0)}, 3)
    assert order == ["dense", "draft", "draft", "dense", "dense", "draft"]
    assert timings["dense"].generate_s == [2.0] * 3 and timings["draft"].step_ms == [1.0, 3.0] * 3


def test_a_summary_has_n_and_quantiles_of_every_field():
    timing = Timing([1.0, 2.0, 9.0], [4.0], [0.5, 1.5])
    assert timing.median("generate_s") == 2 and timing.median("attention_ms") == 1
    assert timing.summary() == {
        "generate_s": {"n": 3, "p20": 1.4, "p50": 2.0, "p80": 6.2},
        "step_ms": {"n": 1, "p20": 4.0, "p50": 4.0, "p80": 4.0},
        "attention_ms": {"n": 2, "p20": 0.7, "p50": 1.0, "p80": 1.3},
    }


def test_an_inner_part_is_taken_from_the_outer(clock):
    with parts.collect(CPU) as found:
        clock(50)  # in no part
        with parts.part("estimate"):
            clock(1)
            with parts.part("order"):
                clock(10)
                with parts.part("restore"):
                    clock(100)
            clock(2)
            with parts.part("kernel"):
                clock(30)
        with parts.part("kernel"):
            clock(5)
    expected = {"estimate": 3, "order": 10, "restore": 100, "kernel": 35}
    assert found == pytest.approx(dict.fromkeys(parts.PARTS, 0) | expected)


def test_parts_are_free_and_do_not_last_unless_collected(clock, monkeypatch):
    with parts.collect(CPU) as found:
        pass

    def never():
        raise AssertionError("the clock was read")

    monkeypatch.setattr(parts._Clock, "now", never)
    with parts.part("kernel"):
        clock(10)
    assert found == dict.fromkeys(parts.PARTS, 0)
    with pytest.raises(RuntimeError), parts.collect(CPU):
        raise RuntimeError
    with parts.part("kernel"):  # an exception leaves nothing behind
        pass
