"""A job from config to records: pairing, what is cached and what is never, what is skipped, what survives a failure."""

import json
import math
from pathlib import Path

import pytest
from draftbench.kernels import dense as dense_kernel
from draftbench.methods.draft import Draft

from draftbench import cli, records, run
from draftbench.attention import Request
from draftbench.latency import Timing
from draftbench.metrics.psnr import psnr_db
from draftbench.parts import PARTS

PROMPTS = "prompts=[turn left in the brick hall, walk forward]"


@pytest.fixture
def job(configured, tmp_path):
    """Runs a job of the overrides in a folder of its own (`job.folder`, the last one's); returns its records."""

    def call(*overrides):
        call.folder = tmp_path / f"job_{len(list(tmp_path.iterdir()))}"
        return run.job(configured(*overrides), call.folder)

    return call


@pytest.fixture
def generated(monkeypatch):
    """(method, seeds, timed) of every whole generation."""
    seen, original = [], run.Job.generate

    def spy(self, method, request, watch, counting=True):
        seen.append((type(method).__name__, request.seeds, type(watch).__name__ == "Timer"))
        return original(self, method, request, watch, counting)

    monkeypatch.setattr(run.Job, "generate", spy)
    return seen


def frames(config, folder, seeds):
    """The clips of a job's model and method, of several seeds in one batch."""
    work = run.Job(config, folder)
    changed = work.method.request(Request((work.config.prompts[0],) * len(seeds), seeds, work.model.steps))
    return [clip.frames for clip in work.clips(work.method, changed)]


def test_a_job_makes_one_record_a_cell_with_all_fields(job):
    rows = job(PROMPTS, "seeds=[3,4]", "batch=3", "metrics=[psnr_db,ssim]", "latency.enabled=true", "latency.repeats=2")
    files = sorted(path.name for path in job.folder.iterdir())
    assert files == ["baseline.json", *(f"record_{i:03}.json" for i in range(4))]
    assert [records.read(job.folder / name) for name in files[1:]] == rows
    prompts = ["turn left in the brick hall", "walk forward"]
    assert [(row["prompt"], row["seed"]) for row in rows] == [(p, s) for p in prompts for s in (3, 4)]
    assert len({row["cell_id"] for row in rows}) == 4 and len({row["baseline_id"] for row in rows}) == 1
    for row in rows:
        assert set(records.FIELDS) <= set(row)
        assert {name for name in records.FIELDS if row[name] is None} == {"lpips", "peak_memory_gib"}
        assert row["status"] == "ok" and row["grid"] == [5, 8, 12] and row["steps"] == 2
        assert (row["method"], row["executor"], row["batch"]) == ("draft", "cpu", 3)
        assert abs(row["sparsity_achieved"] - 0.75) < 0.01 and 0.5 < row["density_effective"] < 0.7
        assert row["quality"]["method"].keys() == row["quality"]["dense"].keys() >= {"sharpness", "motion", "scene"}
    assert rows[0]["quality"]["method"]["scene_right"] in (True, False)
    assert rows[2]["quality"]["method"]["scene_right"] is None  # "walk forward" asks for no scene


def test_a_sparsity_that_was_missed_is_labelled(job):
    for method, labels in (("vsa", {"sparsity": "achieved 0.939 of 0.95"}), ("draft", None)):
        (row,) = job(f"method={method}", "sparsity=0.95")
        assert row["labels"] == labels, row["sparsity_achieved"]
    (row,) = job("method=radial", "sparsity=0", "method.decay=0.2")
    assert row["sparsity_achieved"] > 0.1 and row["labels"] is None  # none was asked for


def test_timings_are_of_both_and_divide_by_this_process_dense_one(job):
    (row,) = job("latency.enabled=true", "latency.repeats=3", "model.steps=4")
    assert (job.folder / "record.json").exists()
    latency = row["latency"]
    for name in ("dense", "method"):
        assert {kind: latency[name][kind]["n"] for kind in latency[name]} == {
            "generate_s": 3, "step_ms": 9, "attention_ms": 9,  # the first of four steps is dense
        }  # fmt: skip
    for kind in ("generate", "attention"):
        name = "generate_s" if kind == "generate" else "attention_ms"
        ratio = latency["dense"][name]["p50"] / latency["method"][name]["p50"]
        assert math.isclose(row[f"speedup_{kind}"], ratio, rel_tol=1e-2)
    assert row["attention_ms"] < row["step_ms"] < 1000 * row["generate_s"]
    assert set(row["parts_ms"]) == {*PARTS, "rest"}
    assert row["parts_ms"]["kernel"] > 0 and row["parts_ms"]["estimate"] > 0
    baseline = records.read(job.folder / "baseline.json")
    assert baseline["kind"] == "baseline" and baseline["baseline_id"] == row["baseline_id"]


def test_without_latency_nothing_is_timed_or_warmed_up(job, monkeypatch):
    for name in ("time", "sparse_step"):
        monkeypatch.setattr(run.Job, name, lambda *_: pytest.fail("a pass for the clock"))
    (row,) = job("method=draft")
    assert {row[name] for name in ("generate_s", "latency", "parts_ms", "baseline_id")} == {None}


def test_dense_is_itself(job):
    (row,) = job("method=dense")
    assert (row["psnr_db"], row["sparsity_achieved"], row["density_effective"]) == (100, 0, 1)


@pytest.mark.parametrize("method", ["draft", "sta", "svg", "random", "oracle", "other_kernel"])
def test_a_method_is_paired_with_the_dense_clip_of_its_seed_and_noise(job, method):
    (row,) = job(f"method={method}", "sparsity=0", "seeds=[7]")
    assert row["psnr_db"] > 60


def test_dropping_attention_and_another_seed_show(job):
    (sparse,) = job("sparsity=0.9")
    (other,) = job("method=other_seed")
    assert other["psnr_db"] < 25 and other["psnr_db"] < sparse["psnr_db"] < 60
    assert other["seed"] == 0


def test_a_method_that_never_runs_is_told(job, capsys):
    rows = job("method=draft", "dense.layers=99", "seeds=[0,1]", "batch=1")
    assert [row["sparsity_achieved"] for row in rows] == [0.0, 0.0]
    said = (
        "draftbench: dense.steps=0.25, dense.timestep=None, dense.layers=99 keep every call dense, so draft never ran"
    )
    assert capsys.readouterr().err.count(said) == 1


def test_fewer_steps_records_its_steps_and_is_found_again(job, monkeypatch, capsys):
    def time(self, method, request):
        seconds = 3.0 if method.sparse else 6.0
        return Timing([seconds], [seconds], [seconds])

    monkeypatch.setattr(run.Job, "time", time)
    (row,) = job("method=fewer_steps", "model.steps=6")
    assert row["steps"] == 3 and row["method_settings"]["share"] == 0.5
    assert 5 < row["psnr_db"] < 60 and row["density_effective"] == 1
    assert job("method=fewer_steps", "model.steps=6") == [row]
    assert "1 of 1 cells were finished before" in capsys.readouterr().err


def test_committed_code_runs_again_what_uncommitted_code_made(job, monkeypatch, capsys):
    described = run.describe
    for dirty, before in ((True, False), (True, True), (False, False), (False, True), (True, True)):
        monkeypatch.setattr(run, "describe", lambda device, dirty=dirty: described(device) | {"dirty": dirty})
        job()
        assert ("1 of 1 cells were finished before" in capsys.readouterr().err) == before


def test_the_reference_is_generated_once(job, generated):
    first = job("seeds=[0,1]")
    assert generated == [("Dense", (0, 1), False), ("Draft", (0, 1), False)]
    generated.clear()
    second = job("seeds=[0,1]", "sparsity=0.5")
    assert generated == [("Draft", (0, 1), False)]
    assert [row["quality"]["dense"] for row in first] == [row["quality"]["dense"] for row in second]


def test_the_reference_key_is_of_all_that_shapes_the_frames(configured, tmp_path, tiny):
    def key(*overrides, seeds=(0,), prompt="turn left"):
        work = run.Job(configured(*overrides), tmp_path)
        return work.reference_key(Request((prompt,) * len(seeds), seeds, work.model.steps), 0)

    same = [key(), key("sparsity=0.5"), key("method=sta"), key("dense.steps=0.5"), key("metrics=[ssim]")]
    assert len(set(same)) == 1
    others = [
        key(seeds=(1,)), key(seeds=(0, 1)), key(prompt="turn right"), key("model.steps=3"), key("model.shift=2"),
        key("model.guidance=2"), key("model.frames=4"), key("model.width=32"), key("model.dtype=bfloat16"),
        key(f"model.weights={tiny(1)}"),
    ]  # fmt: skip
    assert len({same[0], *others}) == len(others) + 1


def test_a_cache_that_cannot_be_written_costs_no_result(job, tmp_path, capsys):
    (tmp_path / "file").touch()
    rows = job(f"cache={tmp_path}/file", "seeds=[0,1]", "batch=1")
    assert [row["status"] for row in rows] == ["ok", "ok"] and records.read_all([job.folder]) == rows
    error = capsys.readouterr().err
    assert f"draftbench: the reference was not cached: cannot write {tmp_path}/file/frames/" in error
    assert f"draftbench: a cell will be run again: cannot write {tmp_path}/file/cells/" in error


def test_a_timing_is_never_cached(job, generated):
    (first,) = job("latency.enabled=true")
    generated.clear()
    (second,) = job("latency.enabled=true", "force=true")
    assert generated == [("Dense", (0,), True), ("Draft", (0,), True)]  # and the clips are those that were timed
    assert first["baseline_id"] != second["baseline_id"]
    assert first["cell_id"] == second["cell_id"] and first["frames_sha256"] == second["frames_sha256"]


def test_finished_cells_are_skipped_unless_forced(job, generated, capsys):
    first = job("seeds=[0,1]")
    generated.clear()
    assert job("seeds=[0,1]") == first and not generated
    assert "2 of 2 cells were finished before, see" in capsys.readouterr().err
    assert records.read_all([job.folder]) == first  # the new folder has them too
    assert [row["cell_id"] for row in job("seeds=[0,1]", "force=true")] == [row["cell_id"] for row in first]
    assert [name for name, _, _ in generated] == ["Draft"]


def test_a_partial_job_runs_what_is_missing(job, generated):
    first = job("seeds=[1]")
    generated.clear()
    rows = job("seeds=[0,1,2]")
    assert generated == [("Dense", (0, 2), False), ("Draft", (0, 2), False)]
    assert [row["seed"] for row in rows] == [0, 1, 2] and rows[1] == first[0]


@pytest.mark.parametrize(
    "change",
    [
        "sparsity=0.5", "method=random", "method.pool=max", "dense.steps=0", "dense.layers=1", "executor=reference",
        "model.guidance=2", "model.steps=3", "metrics=[ssim]", "latency.repeats=2",
    ],
)  # fmt: skip
def test_a_changed_setting_is_not_skipped(configured, tmp_path, change):
    before, after = (run.Job(configured(*o), tmp_path).cell_id("turn left", 0) for o in ([], [change]))
    assert before != after


def test_a_changed_source_is_not_skipped(job, monkeypatch, generated):
    job()
    generated.clear()
    source = run._source
    monkeypatch.setattr(run, "_source", lambda kind, *more: source(kind, *more) + ("x" if kind is Draft else ""))
    job()
    assert [name for name, _, _ in generated] == ["Draft"]


def test_a_method_of_ones_own_is_measured_by_its_lists_and_runs_again_when_edited(job, monkeypatch, tmp_path, capsys):
    path = tmp_path / "own" / "liar_of_test_run.py"
    path.parent.mkdir()
    path.write_text(
        "from draftbench.attention import Method\nfrom draftbench.kernels.select import full_plan\n"
        "class Liar(Method):\n    def plan(self, q, k, v, call):\n        return full_plan(call, q.shape[2])\n"
    )
    monkeypatch.syspath_prepend(str(path.parent))
    own = ["method=other_kernel", "method._target_=liar_of_test_run.Liar", "sparsity=0.9"]
    (row,) = job(*own)
    assert (row["method"], row["sparsity"], row["sparsity_achieved"]) == ("liar_of_test_run", 0.9, 0)
    assert row["density_effective"] == 1
    capsys.readouterr()
    assert job(*own) == [row]
    path.write_text(path.read_text() + "# edited\n")
    (again,) = job(*own)
    assert again["cell_id"] != row["cell_id"]


@pytest.fixture
def failing(monkeypatch):
    """Makes draft raise for a seed; returns the switch."""
    plan = Draft.plan

    def fail(error, seed):
        def raising(self, q, k, v, call):
            if seed in call.seeds:
                raise error
            return plan(self, q, k, v, call)

        monkeypatch.setattr(Draft, "plan", raising)

    return fail


def test_a_batch_that_fails_leaves_the_others(job, configured, failing, generated, capsys, monkeypatch):
    failing(RuntimeError("out of memory\nand more"), 1)
    rows = job("seeds=[0,1,2]", "batch=1")
    assert [row["status"] for row in rows] == ["ok", "failed: out of memory", "ok"]
    assert rows[1]["psnr_db"] is None and rows[1]["device"] and rows[1]["prompt"]
    assert records.read_all([job.folder]) == rows
    assert "draft sparsity=0.75: failed: out of memory" in capsys.readouterr().err
    failing(RuntimeError("never"), 99)
    generated.clear()
    assert [row["status"] for row in job("seeds=[0,1,2]", "batch=1")] == ["ok"] * 3
    assert [seeds for _, seeds, _ in generated] == [(1,)]  # its reference is cached


def test_a_failed_cell_makes_exit_code_one(failing, tiny, tmp_path, capsys):
    failing(ValueError("no such plan"), 1)
    argv = [
        f"model.weights={tiny()}", "model.frames=5", "model.height=32", "model.width=48", "model.steps=2",
        "tracking=disabled", "videos=false", "metrics=[]", "latency.enabled=false", f"cache={tmp_path}/cache",
        "device=cpu", "batch=1", "seeds=[0,1]", f"hydra.run.dir={tmp_path}/out",
    ]  # fmt: skip
    assert cli.main(argv) == 1
    output = capsys.readouterr()
    last = output.err.splitlines()[-2:]
    assert last[0] == "draftbench: draft sparsity=0.75: failed: no such plan (cells: 1)"
    assert (
        last[1].startswith("draftbench: 1 of 2 cells failed; the same command runs those")
        and "Traceback" not in output.err
    )
    assert "failed: no such plan (pocket draft sparsity 0.75" in output.out
    assert [row["status"] for row in records.read_all([tmp_path / "out"])] == ["ok", "failed: no such plan"]


def test_a_job_whose_timing_fails_has_a_record_of_every_cell_with_the_reason(job, failing, capsys):
    failing(RuntimeError("CUDA out of memory\nTried to"), 0)
    rows = job("seeds=[0,1]", "latency.enabled=true")
    assert [(row["seed"], row["status"]) for row in rows] == [(0, why := "failed: CUDA out of memory"), (1, why)]
    assert records.read_all([job.folder]) == rows and all(row["cell_id"] for row in rows)
    assert capsys.readouterr().err.count(why) == 1


def test_a_finished_record_is_not_lost_to_a_run_that_is_killed(configured, failing, tmp_path):
    config = configured("seeds=[0,1]", "batch=1", "force=true")
    before = run.job(config, tmp_path / "out")
    failing(KeyboardInterrupt(), 1)
    with pytest.raises(KeyboardInterrupt):
        run.job(config, tmp_path / "out")
    assert [row["status"] for row in records.read_all([tmp_path / "out"])] == ["ok", "ok"]
    assert records.read(tmp_path / "out" / "record_001.json") == before[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TypeError("a bug")], ids=["interrupt", "bug"])
def test_what_was_finished_stays_when_a_later_batch_ends_the_job(job, failing, generated, error):
    failing(error, 2)
    with pytest.raises(type(error)):
        job("seeds=[0,1,2]", "batch=2")
    left = [(row["seed"], row["status"]) for row in records.read_all([job.folder])]
    assert left == [(0, "ok"), (1, "ok"), (2, run.UNFINISHED)]
    failing(error, 99)
    generated.clear()
    assert len(job("seeds=[0,1,2]", "batch=2")) == 3
    assert {seeds for _, seeds, _ in generated} == {(2,)}


@pytest.mark.parametrize("method", ["draft", "random", "svg", "other_seed"])
def test_a_clip_is_the_same_in_any_batch(configured, tmp_path, method):
    config = configured(f"method={method}")
    together = frames(config, tmp_path, (5, 6))
    alone = [frames(config, tmp_path, (seed,))[0] for seed in (5, 6)]
    assert all(psnr_db(a, b) > 55 for a, b in zip(together, alone, strict=True))
    assert psnr_db(*alone) < 30


def test_two_runs_give_the_same_frames(job, tmp_path):
    first, second = (job("method=random", PROMPTS, f"cache={tmp_path}/{name}") for name in "ab")
    assert [row["frames_sha256"] for row in first] == [row["frames_sha256"] for row in second]
    assert first[0]["frames_sha256"] != first[1]["frames_sha256"]


def test_dense_steps_and_layers_run_the_dense_kernel(job, monkeypatch):
    (dense,) = job("method=dense")
    for everything in ("dense.steps=1", "dense.layers=2", "dense.timestep=0"):
        (row,) = job(everything)
        assert row["psnr_db"] == 100 and row["frames_sha256"] == dense["frames_sha256"], everything
        assert row["density_effective"] == 1 and row["sparsity_achieved"] == 0
    calls, kernel = [], dense_kernel.run
    monkeypatch.setattr(dense_kernel, "run", lambda *a: calls.append(1) or kernel(*a))
    job("model.steps=4", "dense.steps=0.3", "method=dense")
    assert len(calls) == 2 * 4 * 2  # the reference and the clip, 4 steps, 2 layers
    calls.clear()
    job("model.steps=4", "dense.steps=0.3")
    assert len(calls) == 2 * 2  # 2 of 4 steps; the reference is cached
    calls.clear()
    job("model.steps=4", "dense.steps=0.3", "dense.layers=1")
    assert len(calls) == 2 * 2 + 2 * 1


def test_videos_and_picture_of_every_cell(job):
    import av
    from PIL import Image

    job("videos=true", "seeds=[0,1]")
    for number in ("000", "001"):
        for name in ("dense", "draft"):
            with av.open(str(job.folder / f"{number}_{name}.mp4")) as container:
                assert len(list(container.decode(video=0))) == 5
        assert Image.open(job.folder / f"{number}_side_by_side.png").width > 200
    assert len(list(job.folder.glob("*.mp4"))) == 4 and len(list(job.folder.glob("*.png"))) == 2


def test_diagnostics_have_a_row_for_each_active_call(job):
    (row,) = job("diagnostics=true", "model.steps=4", "dense.layers=1")
    found = json.loads((job.folder / "diagnostics.json").read_text())
    assert [(call["step"], call["layer"]) for call in found["calls"]] == [(1, 1), (2, 1), (3, 1)]
    assert found["cell_id"] == row["cell_id"] and found["method"] == "draft"
    for name in ("error", "mass"):
        values = [call[name] for call in found["calls"]]
        assert all(0 < value < 1 for value in values)
        assert math.isclose(found["mean"][name], sum(values) / 3)


SHOWN = {f"00{number}_{name}" for number in (0, 1) for name in ("dense.mp4", "draft.mp4", "side_by_side.png")}
DIAGNOSED = {"diagnostics.json", "recall.png", "maps.png", "kept_over_frames.png"}
ALL = ("videos=true", "diagnostics=true", "seeds=[0,1]", "batch=1")


def shown(folder):
    return {path.name for path in folder.iterdir() if not path.name.startswith("record")}


@pytest.fixture
def probed(monkeypatch):
    """The spot of every run of diagnostics."""
    seen, original = [], run.Job.diagnose
    monkeypatch.setattr(run.Job, "diagnose", lambda self, spot: seen.append(spot) or original(self, spot))
    return seen


def test_a_second_folder_has_all_that_the_first_has(job, generated, probed):
    rows = job(*ALL)
    first, _ = job.folder, generated.clear()
    assert job(*ALL) == rows and job.folder != first
    assert not generated and len(probed) == 1 and shown(job.folder) == SHOWN | DIAGNOSED
    assert all((job.folder / name).read_bytes() == (first / name).read_bytes() for name in SHOWN | DIAGNOSED)
    (row,) = job("videos=true", "diagnostics=true", "seeds=[1]", "batch=1")  # its number is another one here
    assert row == rows[1] and not generated and (job.folder / "record.json").exists()
    assert (job.folder / "000_draft.mp4").read_bytes() == (first / "001_draft.mp4").read_bytes()
    assert len(probed) == 2 and json.loads((job.folder / "diagnostics.json").read_text())["seed"] == 1


def test_the_dense_timing_comes_with_a_finished_cell_unless_it_is_of_another_run(job):
    (row,) = job("latency.enabled=true")
    first = job.folder / "baseline.json"
    job("latency.enabled=true")
    assert records.read(job.folder / "baseline.json")["baseline_id"] == row["baseline_id"]
    records.write(records.read(first) | {"baseline_id": "another"}, first)
    job("latency.enabled=true")
    assert not (job.folder / "baseline.json").exists()


def test_files_are_copied_where_they_cannot_be_linked(job, monkeypatch):
    job(*ALL)
    first = job.folder

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    job(*ALL)
    for name in SHOWN | DIAGNOSED:
        assert (job.folder / name).read_bytes() == (first / name).read_bytes()
        assert not (job.folder / name).samefile(first / name)


@pytest.mark.parametrize(
    "name", ["000_dense.mp4", "001_draft.mp4", "001_side_by_side.png", "diagnostics.json", "maps.png"]
)
def test_what_was_deleted_is_made_again_and_nothing_else(configured, tmp_path, generated, probed, name):
    config = configured(*ALL)
    run.job(config, tmp_path / "out")
    generated.clear()
    (tmp_path / "out" / name).unlink()
    run.job(config, tmp_path / "out")
    assert shown(tmp_path / "out") == SHOWN | DIAGNOSED
    assert [seeds for _, seeds, _ in generated] == ([(int(name[2]),)] if name in SHOWN else [])
    assert len(probed) == 1 + (name in DIAGNOSED or name[2] == "0")


def test_without_videos_none_are_missed(job, generated):
    rows = job("seeds=[0,1]")
    generated.clear()
    assert job("seeds=[0,1]") == rows and not generated and not shown(job.folder)


def test_maps_of_another_head_are_drawn_once(configured, tmp_path, probed):
    for folder, head in (("a", 0), ("a", 0), ("b", 1), ("b", 1)):
        run.job(configured("diagnostics=true", f"maps.head={head}"), tmp_path / folder)
    assert [spot.head for spot in probed] == [0, 1]
    notes = [json.loads((tmp_path / folder / "diagnostics.json").read_text()) for folder in "ab"]
    assert [note["spot"]["head"] for note in notes] == [0, 1]


def test_a_run_that_is_killed_while_it_shows_a_clip_shows_it_the_next_time(configured, tmp_path, monkeypatch):
    config = configured(*ALL)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.media, "side_by_side", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run.job(config, tmp_path / "out")
    assert [row["status"] for row in records.read_all([tmp_path / "out"])] == ["ok", run.UNFINISHED]
    run.job(config, tmp_path / "out")
    assert shown(tmp_path / "out") == SHOWN | DIAGNOSED


def test_stale_videos_of_a_number_are_no_other_cells(configured, tmp_path, monkeypatch):
    """A folder used for one setting and then, killed before it showed its clip, for another."""
    one, other = (configured("videos=true", f"sparsity={level}") for level in (0.5, 0.9))
    run.job(one, tmp_path / "out")
    old = (tmp_path / "out" / "000_draft.mp4").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Job, "show", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run.job(other, tmp_path / "out")
    run.job(other, tmp_path / "out")
    assert (tmp_path / "out" / "000_draft.mp4").read_bytes() != old


def test_other_seeds_in_a_folder_leave_the_finished_cells_their_files(configured, tmp_path, generated):
    """Fewer, which would take a number of another clip, more in front, and one alone, whose record has another name."""
    clips = {}
    for folder, seeds in (("a", [0, 1]), ("a", [1]), ("a", [9, 0, 1]), ("b", [9]), ("b", [0, 9]), ("c", [1, 0, 9])):
        generated.clear()
        rows = run.job(configured("videos=true", f"seeds={seeds}", "batch=1"), tmp_path / folder)
        new = {seed for seed in seeds if seed not in clips}
        assert {seed for _, seeds, _ in generated for seed in seeds} == new and [row["seed"] for row in rows] == seeds
        for path in (tmp_path / folder).glob("record*.json"):
            record = records.read(path)
            clip = (tmp_path / folder / f"{records.number(path)}_draft.mp4").read_bytes()
            assert clips.setdefault(record["seed"], clip) == clip
    assert len(set(clips.values())) == 3 and not list(tmp_path.glob("?/.*"))


def test_finished_cells_are_brought_from_a_folder_that_cannot_be_written(job, monkeypatch):
    job("videos=true")
    for path in job.folder.iterdir():
        path.chmod(0o444)
    opened, real = [], Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r", *a, **k: opened.append(mode) or real(self, mode, *a, **k))
    job("videos=true")
    assert "rb" in opened and "rb+" not in opened  # root may write to anything


@pytest.mark.parametrize("part", ["draw_recall", "draw_frames"])
def test_a_run_that_is_killed_in_its_diagnostics_has_them_the_next_time(
    configured, tmp_path, generated, probed, monkeypatch, part
):
    config = configured(*ALL)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.heatmaps, part, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run.job(config, tmp_path / "out")
    generated.clear()
    run.job(config, tmp_path / "out")
    assert not generated and len(probed) == 2 and shown(tmp_path / "out") == SHOWN | DIAGNOSED


def test_no_diagnostics_of_dense(job):
    job("method=dense", "diagnostics=true")
    assert not (job.folder / "diagnostics.json").exists()


def test_wrong_prompts_are_refused_before_any_work(job, generated):
    with pytest.raises(ValueError, match=r"words pocket does not know: \['fly'\]"):
        job("prompts=[turn left, fly]")
    assert not generated and not list(job.folder.iterdir())


def test_steps_are_those_in_which_the_method_was_active(job):
    (row,) = job(
        "model.steps=4", "dense.timestep=400", "latency.enabled=true"
    )  # dense until the noise level is under .4
    assert row["latency"]["method"]["step_ms"]["n"] == row["latency"]["dense"]["step_ms"]["n"] < 3


def test_a_job_without_a_sparse_call_is_measured_all_the_same(job):
    (row,) = job("dense.steps=1", "diagnostics=true", "latency.enabled=true")
    assert row["status"] == "ok" and row["psnr_db"] == 100 and row["sparsity_achieved"] == 0
    assert row["latency"]["method"]["step_ms"]["n"] == row["steps"]


def test_a_failure_does_not_take_the_place_of_a_finished_cell(configured, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "job"
    (first,) = run.job(configured(), folder)
    with monkeypatch.context() as patch:
        patch.setattr(Draft, "plan", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
        (row,) = run.job(configured("force=true"), folder)
    assert row["status"] == "failed: no memory" and records.read(folder / "record.json") == first
    assert "record.json stays as it was finished before" in capsys.readouterr().err
