"""One global value of a knob for each sparsity: how it is found, written, read and recorded."""

import json
from pathlib import Path

import pytest
import yaml
from draftbench.methods.xattention import XAttention

from draftbench import calibrate, run, schema
from draftbench.knob import read

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
    with pytest.raises(calibrate.OutOfReach, match=r"sparsity=0.9 is out of reach: the knob at 0 gives 0.800"):
        calibrate.solve(measure, 0.9, (0.0, 1.0), known)
    with pytest.raises(calibrate.OutOfReach, match=r"the nearest is 0.8"):  # nothing lies between all and .8
        calibrate.solve(lambda value: 0.8 * (value < 1), 0.5, (0.0, 1.0), {})


def test_a_given_knob_asks_for_no_sparsity_and_must_lie_between_its_ends():
    method = XAttention(sparsity=0.75, tau=0.9)
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
    assert found["value"] == entry["rows"][0]["value"]
    assert abs(record["sparsity_achieved"] - 0.5) < 0.05  # a tiny random model, another prompt
    with pytest.raises(ValueError, match=r"has no calibrated method.tau for pocket at 5x8x12, 2 steps"):
        schema.method(other := knobbed("method.stride=8")).meet(schema.check_job(other), schema.parts(other))
    calibrate.calibrate(knobbed("prompts=[turn left]", "seeds=[9]"), [0.5])
    (entry,) = read(path)
    assert entry["seeds"] == [9] and len(entry["rows"]) == 1  # what others found is gone


def test_what_cannot_be_calibrated_is_refused(configured, knobbed, tmp_path, capsys):
    with pytest.raises(ValueError, match="method=draft takes its sparsity as it is"):
        calibrate.calibrate(configured("method=draft"), [0.5])
    with pytest.raises(ValueError, match=r"method.tau must be null to be calibrated, got 0.9"):
        calibrate.calibrate(knobbed("method.tau=0.9"), [0.5])
    (tmp_path / "found.yaml").write_text("a: 1\n")
    with pytest.raises(ValueError, match="is not a calibration file"):
        run.job(knobbed(), tmp_path / "out")
    assert calibrate.main(["method=draft", "sparsity=2"]) == 2
    assert "sparsity must be numbers in (0, 1), got 2" in capsys.readouterr().err


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
