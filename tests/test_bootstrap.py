"""Intervals and p-values against textbooks, against brute force and against what must hold whatever the numbers."""

import itertools

import numpy as np
import pytest

from draftbench.bootstrap import _counts, estimate, holm


def interval(by_prompt, draws=2000, seed=0):
    made = estimate(by_prompt, draws, seed)
    return made.mean, made.low, made.high


def test_an_interval_of_constants_has_no_width():
    assert interval({"a": [2.5, 2.5], "b": [2.5]}) == (2.5, 2.5, 2.5)


def test_an_interval_is_about_the_mean_of_all_clips():
    mean, low, high = interval({"a": [1.0, 2.0, 3.0], "b": [10.0]})
    assert mean == 4 and low < mean < high


def test_an_interval_of_two_clips_reaches_both_and_one_clip_has_none():
    assert interval({"a": [0.0, 1.0]}) == (0.5, 0, 1)  # means 0, .5, 1 with chances 1/4, 1/2, 1/4
    assert interval({"a": [0.0], "b": [1.0]}) == (0.5, 0, 1)
    one = estimate({"a": [3.0]}, 2000, 0)
    assert one.mean == 3 and one.low is one.high is one.p is None


def test_an_interval_of_many_clips_is_the_textbooks():
    values = np.random.default_rng(3).normal(5, 2, 100)
    mean, low, high = interval({str(i): [x] for i, x in enumerate(values)})
    half = 1.96 * values.std() / 10
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)


def test_seeds_of_one_prompt_are_no_new_evidence_about_prompts():
    few = interval({str(i): [float(i)] for i in range(4)})
    many = interval({str(i): [float(i)] * 25 for i in range(4)})
    assert few == pytest.approx(many, abs=0.3)
    assert interval({"a": [1.0, 2.0]}, seed=1) == interval({"a": [1.0, 2.0]}, seed=1)


def test_every_draw_takes_whole_prompts_with_as_many_clips_as_they_have():
    sizes = (3, 1, 2)
    counts, drawn = _counts(sizes, 1001, 0)
    assert (drawn == counts.sum(1)).all()
    bounds = np.cumsum((0, *sizes))
    by_prompt = np.stack([counts[:, a:b].sum(1) for a, b in itertools.pairwise(bounds)], 1)
    times = by_prompt / sizes
    assert (times == times.astype(int)).all() and (times.sum(1) == len(sizes)).all()
    assert times.mean(0) == pytest.approx([1, 1, 1], abs=0.1)
    assert counts.mean(0) == pytest.approx(np.ones(6), abs=0.15)


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.6])
def test_p_is_that_of_all_resamples(shift):
    """With four prompts all 4^4 resamples can be listed."""
    values = np.array([-1.0, 0.5, 1.0, 2.5]) + shift
    means = np.array([np.mean(drawn) for drawn in itertools.product(values, repeat=4)])
    exact = min(1, 2 * min((means <= 0).mean(), (means >= 0).mean()))
    made = estimate({str(i): [x] for i, x in enumerate(values)}, 20000, 0)
    assert made.p == pytest.approx(exact, abs=0.01)


def test_p_is_symmetric_never_zero_and_one_for_no_difference():
    up, down = (estimate({str(i): [sign * (1.0 + i)] for i in range(8)}, 2000, 0).p for sign in (1, -1))
    assert up == down == pytest.approx(2 / 2001)
    assert estimate({"a": [0.0, 0.0]}, 2000, 0).p == 1


def test_p_of_pure_noise_is_uniform():
    rng = np.random.default_rng(0)
    p = [estimate({str(i): [x] for i, x in enumerate(rng.normal(size=40))}, 1000, 0).p for _ in range(300)]
    assert np.mean(np.array(p) < 0.05) < 0.1 and np.mean(p) == pytest.approx(0.5, abs=0.06)


def test_holm_is_the_textbooks():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0] and holm([]) == [] and holm([0.2]) == [0.2]
