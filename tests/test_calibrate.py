"""One global value of a knob for each sparsity: how it is found, written, read and recorded."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from draftbench.kernels import dense
from draftbench.methods.efficient_vdit import EfficientVDiT
from draftbench.methods.xattention import XAttention

from draftbench import calibrate, kernels, run, schema
from draftbench.attention import DenseParts
from draftbench.knob import FARTHEST, OutOfReach, read
from draftbench.layout import Layout

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "conf" / "calibration").glob("*.yaml"))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("power", [0.2, 1, 6])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (5.0, -1.0)])
def test_solve_finds_the_value(sparsity, power, ends):
    asked = []

    def measure(value):
        asked.append(value)
        return 0.98 * abs((ends[1] - value) / (ends[1] - ends[0])) ** power

    value, found = calibrate.solve(measure, sparsity, ends, {})
    assert abs(found - sparsity) <= calibrate.TOLERANCE and found == measure(value)
    assert len(asked) <= calibrate.ROUNDS


def test_solve_measures_nothing_twice_and_refuses_what_is_out_of_reach():
    asked, known = [], {}

    def measure(value):
        asked.append(value)
        return 0.8 * (1 - value)

    for sparsity in (0.2, 0.5, 0.7):
        calibrate.solve(measure, sparsity, (0.0, 1.0), known)
    assert len(set(asked)) == len(asked)
    with pytest.raises(OutOfReach, match=r"sparsity=0.9 is out of reach: the knob at 0 gives 0.800"):
        calibrate.solve(measure, 0.9, (0.0, 1.0), known)
    with pytest.raises(OutOfReach, match=r"the nearest is 0.8"):  # nothing lies between all and .8
        calibrate.solve(lambda value: 0.8 * (value < 1), 0.5, (0.0, 1.0), {})


@pytest.mark.parametrize(
    ("name", "knob", "value"),
    [
        ("svg2", "top_p", 0.9), ("xattention", "tau", 0.9), ("jenga", "p", 0.3), ("sparge", "cdf", 0.98),
        ("efficient_vdit", "globals", 1), ("radial", "decay", 0.2), ("re_ttention", "window_sparsity", 0.9),
    ],
)  # fmt: skip
def test_a_knob_beside_a_sparsity_is_refused(configured, name, knob, value):
    given = [f"method={name}", f"method.{knob}={value}"]
    with pytest.raises(ValueError, match=rf"^sparsity=0.75 and method.{knob}={value} both say how much is kept: give"):
        configured(*given)
    assert schema.method(configured(*given, "sparsity=0")).target == 0


def test_a_given_knob_asks_for_no_sparsity_and_must_lie_between_its_ends():
    method = XAttention(tau=0.9)
    assert (method.sparsity, method.target, method.value) == (0, 0, 0.9)
    assert XAttention(sparsity=0.0).value == 1
    with pytest.raises(ValueError, match=r"method.tau must be in \[0, 1\], got 1.5"):
        XAttention(tau=1.5)


@pytest.fixture
def knobbed(configured, tmp_path):
    return lambda *more: configured(
        "method=xattention", f"method.calibration={tmp_path}/found.yaml", "method.stride=4", "sparsity=0.5", *more
    )


def test_a_run_reads_what_was_calibrated_and_its_record_says_so(knobbed, tmp_path):
    where = ["prompts=[walk forward in the lamp hall]", "seeds=[7,8]"]
    with pytest.raises(ValueError, match=r"python -m draftbench.calibrate method=xattention sparsity=0.5"):
        run.job(knobbed(), tmp_path / "before")
    path = calibrate.calibrate(knobbed(*where), [0.5])
    calibrate.calibrate(knobbed(*where), [0.7])
    (entry,) = read(path)
    assert [row["sparsity"] for row in entry["rows"]] == [0.5, 0.7]
    (record,) = run.job(knobbed(), tmp_path / "after")
    found = record["method_settings"]["calibrated"]
    assert found["prompts"] == ["walk forward in the lamp hall"] and found["seeds"] == [7, 8]
    assert found["value"] == entry["rows"][0]["value"] and record["method_settings"]["calibration"] is None
    assert abs(record["sparsity_achieved"] - 0.5) < 0.05  # a tiny random model, another prompt
    with pytest.raises(ValueError, match=r"has no calibrated method.tau for pocket at 5x8x12, 2 steps"):
        schema.method(other := knobbed("method.stride=8")).meet(schema.check_job(other), schema.parts(other))
    calibrate.calibrate(knobbed("prompts=[turn left]", "seeds=[9]"), [0.5])
    (entry,) = read(path)
    assert entry["seeds"] == [9] and len(entry["rows"]) == 1  # what others found is gone


@pytest.mark.parametrize("name, sparsity", [("sta_searched", 0.7), ("efficient_vdit", 0.64)])
def test_a_search_tries_every_mask_on_the_dense_trajectory(configured, tmp_path, name, sparsity, capsys):
    path = tmp_path / "found.yaml"
    where = [f"method={name}", f"method.calibration={path}", "model.steps=4", f"sparsity={sparsity}"]
    with pytest.raises(ValueError, match=rf"first run python -m draftbench.calibrate method={name} sparsity=0"):
        run.job(configured(*where), tmp_path / "before")
    config = configured(*where, "prompts=[walk forward in the lamp hall,turn left]", "seeds=[7]", "batch=1")
    with pytest.raises(OutOfReach, match=f"^sparsity=0.99 is out of reach of {name} at 5x8x12, where its masks drop 0"):
        calibrate.calibrate(config, [sparsity, 0.99])
    said = capsys.readouterr().err
    assert said.index("left out: sparsity=0.99 is out of reach") < said.index("masks at every call")
    ((row,),) = ([*entry["rows"]] for entry in read(path))
    assert abs(row["achieved"] - sparsity) <= FARTHEST
    assert row["value"]["layers"] == [0, 1]
    if name == "sta_searched":
        assert row["value"]["steps"] == [1, 2, 3] and all(len(picks.split()) == 2 for picks in row["value"]["picks"])
    (record,) = run.job(configured(*where), tmp_path / "after")
    assert abs(record["sparsity_achieved"] - row["achieved"]) < 1e-4  # on any clip: the masks depend on no tokens
    assert record["method_settings"]["calibrated"]["value"] == row["value"]
    changed = path.stat().st_mtime_ns
    calibrate.calibrate(config, [sparsity])  # it is there
    assert path.stat().st_mtime_ns == changed


@pytest.mark.parametrize(  # the diagonal of 5 frames keeps a fifth
    ("name", "why"),
    [
        ("sta_searched", "masks drop 0"),
        ("efficient_vdit", "masks drop 0.000 to 0.800"),
        ("jenga", r"neighbours alone keep 0.\d+; method.neighbours=false leaves them out"),
    ],
)
def test_what_no_calibration_can_meet_is_said_to_be_out_of_reach(configured, tmp_path, monkeypatch, name, why):
    """By a run, in place of a call to calibrate, and by calibrate before it generates anything."""
    config = configured(f"method={name}", f"method.calibration={tmp_path}/found.yaml", "sparsity=0.99")
    monkeypatch.setattr(calibrate, "Search", None)
    monkeypatch.setattr(calibrate, "Session", None)
    for attempt in (lambda: run.job(config, tmp_path / "run"), lambda: calibrate.calibrate(config, [0.98, 0.99])):
        with pytest.raises(OutOfReach, match=rf"sparsity=0.99 is out of reach of {name} at 5x8x12, where its {why}"):
            attempt()


@pytest.mark.parametrize("everything", ["dense.steps=1", "dense.layers=2"])
def test_calibration_needs_a_call_that_is_not_dense(knobbed, monkeypatch, everything):
    monkeypatch.setattr(calibrate, "Session", None)
    with pytest.raises(ValueError, match=rf"^{everything[:10]}"):
        calibrate.calibrate(knobbed(everything), [0.5])


def test_a_searchs_losses_are_the_relative_errors_of_the_heads(configured, tmp_path):
    """Against dense attention by hand, of one option, the mean over the calls of a step and a layer."""
    layout, lengths = Layout((4, 3, 4), 3), torch.tensor([3, 2])
    method = EfficientVDiT(0.5, block=5)
    search = calibrate.Search(method, kernels.run("cpu"), dense.run, DenseParts(0), sparsities=[0.5])
    search.start(2)
    search.at_step(2, 4, 0.5)
    torch.manual_seed(0)
    expected = torch.zeros(2, dtype=torch.float64)
    frame = torch.arange(48) // 12
    kept = torch.nn.functional.pad(
        (frame[:, None] == frame) | (frame[:, None] == 0) | (frame == 0), (0, 3, 0, 3), value=True
    )
    for branch in ("cond", "uncond"):
        q, k, v = torch.randn(3, 2, 51, 2, 8)
        out = search(q, k, v, layout=layout, text_lengths=lengths, layer=6, branch=branch, seeds=(1, 2))
        assert torch.equal(out, dense.run(q, k, v, layout, [3, 2]))
        wrong, size = torch.zeros(2, 2, dtype=torch.float64)
        for item, real in enumerate((51, 50)):
            scores = torch.einsum("qhd,khd->hqk", q[item, :real], k[item, :real]).double() / 8**0.5
            full, part = (
                torch.einsum("hqk,khd->qhd", x.softmax(-1), v[item, :real].double())
                for x in (scores, scores.masked_fill(~kept[:real, :real], -torch.inf))
            )
            wrong += (part - full).square().sum((0, 2))
            size += full.square().sum((0, 2))
        expected += wrong / size / 2
    losses = search.losses()
    assert (losses.steps, losses.layers, list(losses.of)) == ([2], [6], [0, 1, 2, 3])
    torch.testing.assert_close(losses.of[1][0, 0], expected, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_calibrated_is_refused(configured, knobbed, tmp_path, capsys):
    with pytest.raises(ValueError, match="method=draft takes its sparsity as it is"):
        calibrate.calibrate(configured("method=draft"), [0.5])
    with pytest.raises(ValueError, match=r"method.tau must be null to be calibrated, got 0.9"):
        calibrate.calibrate(knobbed("sparsity=0", "method.tau=0.9"), [0.5])
    (tmp_path / "found.yaml").write_text("a: 1\n")
    with pytest.raises(ValueError, match="is not a calibration file"):
        run.job(knobbed(), tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"method.calibration must be a file that can be written, got .*/file/x.yaml: "):
        calibrate.calibrate(configured("method=xattention", f"method.calibration={tmp_path}/file/x.yaml"), [0.5])
    for text in ("2", "abc", "0.5,"):
        assert calibrate.main(["method=svg2", f"sparsity={text}"]) == 2
        assert f"sparsity must be numbers in (0, 1), separated by commas, got {text}\n" in capsys.readouterr().err


def test_an_interrupt_keeps_what_was_found_and_says_so(knobbed, monkeypatch, tmp_path, capsys):
    """The second sparsity is interrupted; the first one's row lies in the file."""
    solve = calibrate.solve

    def once(*arguments, sparsity, **named):
        if sparsity > 0.5:
            raise KeyboardInterrupt
        return solve(*arguments, sparsity=sparsity, **named)

    config = knobbed()
    monkeypatch.setattr(calibrate, "compose", lambda *_: config)
    monkeypatch.setattr(calibrate, "solve", once)
    assert calibrate.main(["method=xattention", "sparsity=0.5,0.75"]) == 130
    assert "draftbench: interrupted; the rows found so far are kept" in capsys.readouterr().err
    (entry,) = read(tmp_path / "found.yaml")
    assert [row["sparsity"] for row in entry["rows"]] == [0.5]


def test_the_shipped_files_use_prompts_and_seeds_of_no_table():
    used = set()
    for path in (ROOT / "results" / "records").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            used.add((row.get("prompt"), row.get("seed")))
    prompts, seeds = ({pair[i] for pair in used} for i in (0, 1))
    assert prompts and seeds
    for path in SHIPPED:
        for entry in yaml.safe_load(path.read_text()):
            assert not prompts & set(entry["prompts"]) and not seeds & set(entry["seeds"]), path
