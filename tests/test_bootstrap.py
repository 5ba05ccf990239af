"""Intervals and p-values against textbooks, against brute force and against what must hold whatever the numbers."""

import itertools

import numpy as np
import pytest

from draftbench import bootstrap
from draftbench.bootstrap import _resampled, estimate, holm


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
    sizes = (3, 2, 1)
    counts = np.concatenate(list(_resampled(sizes, 1001, 0)))
    assert len(counts) == 1001
    bounds = np.cumsum((0, *sizes))
    by_prompt = np.stack([counts[:, a:b].sum(1) for a, b in itertools.pairwise(bounds)], 1)
    times = by_prompt / sizes
    assert (times == times.astype(int)).all() and (times.sum(1) == len(sizes)).all()
    assert times.mean(0) == pytest.approx([1, 1, 1], abs=0.1)
    assert counts.mean(0) == pytest.approx(np.ones(6), abs=0.15)


def test_which_prompt_lacks_a_clip_changes_no_draw():
    assert interval({"a": [1.0], "b": [2.0, 3.0], "c": [5.0, 4.0]}) == interval(
        {"b": [2.0, 3.0], "c": [5.0, 4.0], "d": [1.0]}
    )


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.6, 2.0])
def test_p_is_that_of_all_ways_to_turn_prompts(shift):
    values = np.array([-1.0, 0.5, 1.0, 2.5]) + shift
    sums = [abs(np.dot(signs, values)) for signs in itertools.product((1, -1), repeat=4)]
    made = estimate({str(i): [x / 2, x / 2] for i, x in enumerate(values)}, 2000, 0)
    assert made.p == np.mean(np.array(sums) >= abs(values.sum()) - 1e-9) and not made.bound


def test_p_is_symmetric_never_zero_and_one_for_no_difference():
    few, many = ({str(i): [1.0 + i] for i in range(n)} for n in (8, 30))
    for clips, least, bound in ((few, 2**-7, False), (many, 1 / 2001, True)):
        turned = {prompt: [-x for x in values] for prompt, values in clips.items()}
        for made in (estimate(clips, 2000, 0), estimate(turned, 2000, 0)):
            assert (made.p, made.bound) == (pytest.approx(least), bound)
    assert estimate({"a": [0.0, 0.0]}, 2000, 0).p == 1 == estimate({"a": [1.0, 3.0]}, 2000, 0).p


@pytest.mark.parametrize("prompts", [4, 8, 16, 40])
def test_p_of_pure_noise_promises_no_more_than_it_says(prompts):
    """Also where seeds of a prompt say much the same."""
    rng = np.random.default_rng(0)
    p = []
    for _ in range(400):
        centres = rng.normal(size=prompts)
        clips = {str(i): list(centre + 0.2 * rng.normal(size=2)) for i, centre in enumerate(centres)}
        p.append(estimate(clips, 1000, 0).p)
    for level in (0.05, 0.005):
        assert np.mean(np.array(p) < level) < level + 2.5 * (level / 400) ** 0.5
    assert np.mean(p) == pytest.approx(0.5, abs=0.08)


def test_what_is_too_much_to_keep_is_drawn_alike(monkeypatch):
    clips = {str(i): [0.1 * i - 1, 0.2] for i in range(30)}
    kept = estimate(clips, 1000, 0)
    monkeypatch.setattr(bootstrap, "_KEPT", 0)
    assert estimate(clips, 1000, 0) == kept


def test_holm_is_the_textbooks():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0] and holm([]) == [] and holm([0.2]) == [0.2]
