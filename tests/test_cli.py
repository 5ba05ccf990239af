"""The command line with the job itself replaced: what is run, what is refused and how, and what a sweep leaves."""

import errno
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

import draftbench
from draftbench import cli, help, records, schema
from draftbench.knob import OutOfReach, Uncalibrated
from draftbench.prompts import suites

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
JOB = '''
"""Stands for draftbench.run: one record a prompt and seed, written as run.job does."""
from draftbench import records

def job(config, folder, group=None):
    method = config.method._target_.rpartition(".")[2].lower()
    if method == "sta" and config.sparsity == 0.75:
        raise ValueError("no window\\nmeets this")
    rows = []
    for prompt in config.prompts:
        for seed in config.seeds:
            values = dict(model=config.model.name, method=method, sparsity=config.sparsity, prompt=prompt, seed=seed)
            status = "failed: full" if prompt == "turn right" else "ok"
            values |= dict(cell_id=records.cell_id(values))
            row = records.new(**values, device="cpu", versions={}, status=status, labels={"group": group})
            records.write(row, folder / f"record_{len(rows)}.json")
            rows.append(row)
    return rows
'''


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """The (config, folder, group) of every job that is run, in a fresh working folder; models are not looked at."""
    monkeypatch.chdir(tmp_path)
    fake = types.ModuleType("draftbench.run")
    exec(JOB, fake.__dict__)
    seen, job = [], fake.job

    def spy(config, folder, group=None):
        seen.append((config, folder, group))
        return job(config, folder, group)

    fake.job = spy
    monkeypatch.setitem(sys.modules, "draftbench.run", fake)
    monkeypatch.setattr(draftbench, "run", fake, raising=False)
    monkeypatch.setattr(schema, "check_job", lambda config, here: SimpleNamespace(grid=(8, 16, 24), layers=6, steps=8))
    return seen


def cells(jobs):
    return [(config.method._target_.rpartition(".")[2].lower(), config.sparsity) for config, _, _ in jobs]


def read(folder):
    return [(row["method"], row["sparsity"]) for row in records.read_all([folder])]


def fails(capsys, argv, code=2):
    """The message of a command line that is refused."""
    assert cli.main(argv) == code
    output = capsys.readouterr()
    assert "Traceback" not in output.err + output.out
    assert output.err.startswith("draftbench: ") and output.err.count("\n") <= 2
    return output.err.removeprefix("draftbench: ").strip()


def test_normalise():
    groups = ["model", "method", "experiment"]
    left = ["+method.key=1", "+method={a: 1}", "+other=x", "method=a", "~method", "sparsity=0.5", "-m", "+method@x=a"]
    assert cli.normalise(left, groups) == left
    assert cli.normalise(["+method=a,b", "+experiment=x", "+model=choice(a,b)"], groups) == [
        "method=a,b", "experiment=x", "model=choice(a,b)",
    ]  # fmt: skip
    launchers = ["hydra/launcher=joblib", "hydra/launcher=basic", "hydra/launcher=joblib_of_mine"]
    assert cli.normalise(launchers, [*groups, "launcher"]) == ["launcher=joblib", *launchers[1:]]


def test_groups_are_those_of_the_defaults_list():
    assert cli.groups()[:2] == ["model", "method"] and "experiment" in cli.groups()
    assert {path.name for path in CONF.iterdir() if any(path.glob("*.yaml"))} >= set(cli.groups())


@pytest.mark.parametrize(
    ("argv", "cell"),
    [
        ([], ("draft", 0.75)),
        (["+method=draft", "sparsity=0.9"], ("draft", 0.9)),
        (["method=svg", "sparsity=0"], ("svg", 0.0)),
        (["sparsity=0.9", "--run", "+method=random"], ("random", 0.9)),
    ],
    ids=["defaults", "plus", "no_plus", "flag_between"],
)
def test_one_job(jobs, argv, cell):
    assert cli.main([*argv, "tracking=disabled"]) == 0
    assert cells(jobs) == [cell]
    ((config, folder, group),) = jobs
    assert folder.parent == Path("outputs").absolute() and group is None
    assert (folder / "record_0.json").exists() and "hydra" not in config


@pytest.mark.parametrize("experiment", ["experiment=draft_table1", "+experiment=draft_table1"])
def test_experiment_in_both_spellings(jobs, experiment):
    """The paper's grid of sparsities on pocket, as a sweep without -m; what is given replaces what it sweeps."""
    assert cli.main([experiment, "model=pocket", "sparsity=0.6,0.8"]) == 0
    assert [(config.method._target_.split(".")[-2], config.sparsity) for config, _, _ in jobs] == [
        (method, level) for method in ("svg", "draft") for level in (0.6, 0.8)
    ]
    assert {(job.model.steps, job.dense.steps, job.dense.layers, len(job.prompts)) for job, _, _ in jobs} == {
        (50, 0.3, 2, 4)
    }
    with cli._configs():
        configs = {name: cli.hydra.compose("config", ["experiment=draft_table1", f"model={name}"], True) for name in
                   ("hunyuan_video", "pocket_large")}  # fmt: skip
    params = {name: config.hydra.sweeper.params for name, config in configs.items()}
    assert (params["hunyuan_video"].sparsity, params["hunyuan_video"]["dense.layers"]) == ("0.6,0.8,0.9", "2")
    assert params["pocket_large"].sparsity == "0.55,0.6,0.75,0.8,0.9"


def test_the_papers_table_is_made_by_the_commands_in_the_experiments_file():
    text = (CONF / "experiment" / "draft_table1.yaml").read_text()
    paper = OmegaConf.load(CONF / "paper" / "draft_attention.yaml")
    made = {}
    for line in re.findall(r"#   python -m draftbench (.*)", text):
        command, _, setup = line.partition("   ")
        with cli._configs():
            config = cli.hydra.compose("config", command.split(), True)
        if setup.strip() in paper.setups:
            model, params = config.model, config.hydra.sweeper.params
            grid = [(model.frames - 1) // 4 + 1, model.height // 16, model.width // 16]
            layers = int(params["dense.layers"])
            made[setup.strip()] = {"model": model.name, "grid": grid, "dense_layers": layers}
            assert (model.steps, config.dense.steps) == (paper.steps, paper.dense_steps)
    assert made == OmegaConf.to_container(paper.setups)


def planned(*overrides):
    """(name, sparsity, method) of every job of a sweep, checked with the real model."""
    argv = cli.get_args_parser().parse_intermixed_args([*overrides, "device=cpu", "hydra.sweep.dir=out", "cache=cache"])
    methods = [schema.method(config) for config in cli.plan(argv, argv.overrides).configs]
    return [(Path(sys.modules[type(method).__module__].__file__).stem, method.sparsity, method) for method in methods]


def test_the_field_is_every_method_and_each_cell_can_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    grid = {name: planned(f"experiment={name}") for name in ("field", "field_most", "field_controls")}
    assert {name: len(cells) for name, cells in grid.items()} == {"field": 48, "field_most": 9, "field_controls": 3}
    methods = [method for cells in grid.values() for method in {name for name, *_ in cells}]
    assert sorted(methods) == sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
    for name in ("jenga", "re_ttention", "efficient_vdit"):  # why they are apart
        with pytest.raises(ExceptionGroup) as error:
            planned("experiment=field", f"method={name},draft", "sparsity=0.95")
        assert "reach" in cli.message(error.value) and "calibrate" not in cli.message(error.value)


def test_the_fields_own_knobs_are_taken(monkeypatch, tmp_path):
    """Those of the comment in its file."""
    monkeypatch.chdir(tmp_path)
    rows = re.findall(r"'(\w+) (method\.\w+=[\d.]+)'", (CONF / "experiment" / "field.yaml").read_text())
    assert len(rows) == 6
    for name, knob in rows:
        ((method, sparsity, made),) = planned("experiment=field", "sparsity=0", f"method={name}", knob)
        assert (method, sparsity) == (name, 0) and set(made.given.values()) == {float(knob.partition("=")[2])}


def test_papers_models_get_the_papers_prompts(jobs):
    pytest.importorskip("diffusers")
    for model in ("hunyuan_video", "wan21_14b"):
        assert cli.main(["experiment=draft_table1", f"model={model}", "model.weights=random", "sparsity=0.9"]) == 0
    papers = ["A cat walks on the grass, realistic style.", "A giant panda is walking."]
    assert len(jobs) == 4 and all(job.prompts == papers for job, _, _ in jobs)


def test_sweep(jobs, capsys):
    argv = ["-m", "+method=dense,svg", "sparsity=0.5,0.9", "prompts=[turn left, walk forward]"]
    assert cli.main([*argv, "tracking=disabled"]) == 0
    grid = [(method, s) for method in ("dense", "svg") for s in (0.5, 0.9)]
    assert cells(jobs) == grid
    (sweep,) = Path("outputs").iterdir()
    assert {group for _, _, group in jobs} == {sweep.name}
    assert [folder.name for _, folder, _ in jobs] == ["0", "1", "2", "3"]
    assert read(sweep) == [cell for cell in grid for _ in range(2)]
    table = (sweep / "table.txt").read_text()
    assert table in capsys.readouterr().out
    assert table.splitlines()[2].split()[:4] == ["pocket", "dense", "0.5", "2"]


def test_a_failing_job_leaves_the_others(jobs, capsys):
    argv = ["-m", "+method=dense,sta,svg,draft", "sparsity=0.5,0.75,0.9", "hydra.sweep.dir=out", "tracking=disabled"]
    assert cli.main(argv) == 1
    assert len(jobs) == 12 and len(read("out")) == 11
    error = capsys.readouterr().err
    assert "job 4 (method=sta sparsity=0.75 tracking=disabled) failed: no window meets this" in error
    assert "1 of 12 jobs failed, see out/*/error.txt" in error and "Traceback" not in error
    assert "ValueError: no window" in Path("out/4/error.txt").read_text()
    assert len(Path("out/table.txt").read_text().splitlines()) == 2 + 11
    # mended and run again in its folder, the failure is forgotten
    assert cli.main(["-m", "method=svg", "sparsity=0.1,0.2,0.3,0.4,0.5", *argv[3:]]) == 0


def test_a_failing_cell_fails_the_run(jobs, capsys):
    assert fails(capsys, ["prompts=[turn left, turn right]"], 1).splitlines() == [
        "draft sparsity=0.75: failed: full (cells: 1)",
        "draftbench: 1 of 2 cells failed; the same command runs those and what is missing",
    ]


def test_a_failure_of_a_clip_that_is_no_longer_asked_for_does_not_count(jobs, capsys):
    assert fails(capsys, ["prompts=[turn left, turn right]", "hydra.run.dir=out"], 1)
    assert cli.main(["prompts=[turn left]", "hydra.run.dir=out", "tracking=disabled"]) == 0
    assert "failed: full" in {row["status"] for row in records.read_all(["out"])}


def test_a_failing_job_alone(jobs, capsys):
    text = fails(capsys, ["method=sta", "hydra.run.dir=out"], 1)
    assert text == f"no window meets this\nThe traceback is in {Path('out/error.txt').absolute()}"
    assert cli.main(["method=sta", "debug=true"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_unexpected_errors_are_named(jobs, capsys, monkeypatch):
    monkeypatch.setattr(draftbench.run, "job", lambda *args, **kwargs: {}["nope"])
    assert fails(capsys, [], 1).startswith("KeyError: 'nope'\n")


def test_interrupt(jobs, capsys, monkeypatch):
    def stop(config, folder, group=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(draftbench.run, "job", stop)
    assert fails(capsys, ["hydra.run.dir=out"], 130) == "interrupted; what is finished is in out"


def test_the_sweeps_table_is_logged_once_more(jobs, monkeypatch):
    logged = []
    monkeypatch.setattr("draftbench.tracking.log_sweep", lambda rows, *rest: logged.append((len(rows), *rest)))
    assert cli.main(["-m", "sparsity=0.5,0.9", "hydra.sweep.dir=a/b"]) == 0
    assert logged == [(2, "draftbench", Path("a/b"), "b", "offline")]


def test_runs_of_one_second_have_a_folder_each(jobs):
    for _ in range(3):
        assert cli.main(["hydra.run.dir=out_${now:%Y}"]) == 0
    assert len({folder for _, folder, _ in jobs}) == 3


BAD = [
    (["sparsity=1.2"], "sparsity must be a number in [0, 1), got 1.2"),
    (["sparsity=abc"], "sparsity must be a number in [0, 1), got 'abc'"),
    (["method=nope"], "method must be one of dense, draft, "),
    (["+method=nope"], "got 'nope'"),
    (["-m", "method=dense,nope"], "got 'nope'"),
    (["method=null"], "got 'null'"),
    (["method=[dense,draft]"], "got '[dense,draft]'"),
    (["+experiment=nope"], "experiment must be one of draft_table1"),
    (["hydra/launcher=nope"], "hydra/launcher must be one of basic"),
    (["~method"], "method is missing"),
    (["prompts="], "prompts must be a non-empty list of distinct, non-empty texts, got ''"),
    (["prompts=['']"], "got ''"),
    (["prompts={a:1}"], "prompts={a:1} does not fit"),
    (["prompts=it's"], 'cannot read "prompts=it\'s": quote a value with special characters'),
    (["model.frames=0"], "model.frames must be an integer of at least 1, got 0"),
    (["sparsty=0.9"], "unknown key sparsty=0.9; did you mean sparsity? (keys: model, method, tracking, sparsity, "),
    (["metod=draft"], "did you mean method?"),
    (["+sparsty=0.9"], "unknown key sparsty=0.9; did you mean sparsity?"),
    (["frames=3"], "did you mean model.frames?"),
    (["model.framse=3"], "unknown key model.framse=3; did you mean model.frames? (keys: model._target_, "),
    (["method=svg", "method.sampels=3"], "did you mean method.samples?"),
    (["method={a:1}"], "unknown key method.a (keys: method._target_, "),
    (["hydra.run.dri=x"], "did you mean hydra.run.dir?"),
    (["sparsity"], "'sparsity' must have the form key=value"),
    (["=3"], "'=3' must have the form key=value"),
    (["+executor=cpu"], "executor is in the config already: write executor=VALUE without the +"),
    (["sparsity=0.5,0.9"], "sparsity=0.5,0.9 has several values: add -m to run a sweep"),
    (["seeds=0,1"], "seeds=[...] is one job with a list of them"),
    (["-m", "sparsity=interval(0,1)"], "sparsity=interval(0,1) cannot be swept"),
    (["-m", "hydra.run.dir=a,b"], "hydra.run.dir=a,b cannot be swept"),
    (["-m", "hydra.sweep.subdir=x", "seeds=0,1"], "hydra.sweep.subdir must differ from job to job, got 'x'"),
    (["--foo"], "unrecognized arguments: --foo"),
    (["dense.steps=1"], "dense.steps must be at most 7/8, to leave the method a step, got 1.0"),
    (["dense.steps=0.9"], "dense.steps must be at most 7/8, to leave the method a step, got 0.9"),
    (["dense.layers=6"], "dense.layers must be an integer from 0 to 5, below the model's layers, got 6"),
    (["hydra.run.dir="], "hydra.run.dir must be a folder, got ''"),
    (["--config-dir", "nowhere"], "--config-dir must be a folder, got nowhere"),
    (["--config-path", "x"], "--config-path is not supported"),
    (["--config-name", "nope"], "Cannot find primary config 'nope'"),
    (["--cfg", "job", "sparsty=1"], "did you mean sparsity?"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input_is_refused_in_a_line_or_two(jobs, capsys, argv, message):
    text = fails(capsys, argv)
    assert message in text and len(text) < 400
    assert not jobs and not list(Path().iterdir())


def test_every_job_is_checked_before_the_first_runs(jobs, capsys):
    assert "got 1.5" in fails(capsys, ["-m", "method=dense,draft", "sparsity=0.5,0.9,1.5"])
    assert not jobs


def test_maps_are_judged_in_every_job_of_a_sweep(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^maps.layer must be null or an integer from 0 to 5, .* got 6$"):
        planned("-m", "diagnostics=true", "maps.layer=0,6,1")
    assert not list(tmp_path.iterdir())


def test_the_traceback_comes_when_asked_for(jobs, capsys):
    assert cli.main(["sparsity=abc", "debug=true"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("draftbench: sparsity must be") and "Traceback" in error


def test_a_model_is_asked_once_for_each_config_of_its_own(jobs, capsys, monkeypatch):
    asked = []

    def note(config, here):
        asked.append((config.model.name, *config.prompts))
        return SimpleNamespace(grid=(8, 16, 24), layers=6, steps=8)

    monkeypatch.setattr(schema, "check_job", note)
    argv = ["-m", "method=dense,draft", "prompts=turn left,walk forward", "tracking=disabled"]
    assert cli.main(argv) == 0
    assert sorted(asked) == [("pocket", "turn left"), ("pocket", "walk forward")]

    def refuse(config, here):
        raise FileNotFoundError(errno.ENOENT, "no such weights", "w.safetensors")

    monkeypatch.setattr(schema, "check_job", refuse)
    jobs.clear()
    assert fails(capsys, []) == "no such weights: w.safetensors"
    assert not jobs


def test_all_methods_that_cannot_run_are_named_before_the_first_job(jobs, capsys, monkeypatch):
    from draftbench.attention import Method

    def meet(self, model, parts):
        name = type(self).__name__.lower()
        if name == "sta" and self.sparsity > 0.8:
            raise OutOfReach(f"sparsity={self.sparsity:g} is out of reach of sta")
        if name in ("svg", "radial"):
            raise Uncalibrated(f"sparsity=??? of {name} needs calibrate sparsity=???", {self.sparsity})

    monkeypatch.setattr(Method, "meet", meet)
    assert cli.main(["-m", "method=draft,svg,sta,radial", "sparsity=0.9,0.5"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "draftbench: sparsity=0.5,0.9 of svg needs calibrate sparsity=0.5,0.9",
        "sparsity=0.9 is out of reach of sta",
        "sparsity=0.5,0.9 of radial needs calibrate sparsity=0.5,0.9",
    ]
    assert not jobs


@pytest.mark.parametrize("argv", [["hydra.run.dir=file/x"], ["-m", "hydra.sweep.dir=file", "seeds=0,1"]], ids=" ".join)
def test_an_output_folder_that_cannot_be_made(jobs, capsys, argv):
    Path("file").touch()
    text = fails(capsys, argv)
    assert text.startswith("hydra.") and "must be a folder that can be written, got file" in text
    assert not jobs


def test_a_full_disk_is_noticed_before_work(jobs, capsys, monkeypatch):
    def full(path, data, write=Path.write_bytes):
        if path.parent.name == "out":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    text = fails(capsys, ["hydra.run.dir=out"])
    assert text == "hydra.run.dir must be a folder that can be written, got out: No space left on device"
    assert not jobs and not list(Path("out").iterdir())


def test_a_cache_that_cannot_be_written_is_noticed_before_work(jobs, capsys):
    Path("file").touch()
    text = fails(capsys, ["cache=file/x", "hydra.run.dir=out"])
    assert text == "cache must be a folder that can be written, got file/x: Not a directory"
    assert not jobs and not Path("out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_folder(jobs, capsys, tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in fails(capsys, [])


def test_configs_of_ones_own(jobs, tmp_path):
    folder = tmp_path / "own" / "method"
    folder.mkdir(parents=True)
    text = "defaults: [svg]\nsamples: 7\n"
    (folder / "mine.yaml").write_text(text)
    assert cli.main(["--config-dir", "own", "-m", "method=mine,svg", "tracking=disabled"]) == 0
    assert [config.method.samples for config, _, _ in jobs] == [7, 64]


def test_help_page(capsys):
    assert cli.main(["--help"]) == 0
    page = capsys.readouterr().out
    for group in cli.groups():
        for path in (CONF / group).glob("*.yaml"):
            assert any(path.stem in line.replace("*", " ").split()[:2] for line in page.splitlines())
    for text in (
        "+method=dense,sta,svg,draft sparsity=0.5,0.75,0.9",
        "*draft",
        "DraftAttention (Shen et al., 2025",
        "DraftAttention's Table 1 as a sweep",
        "sparsity=0.75",
        "share of video-by-video pairs to drop, in [0, 1)",
        "dense.steps=0.25",
        "outputs/",
    ):
        assert text in page
    words = " ".join(page.split())
    for path in (CONF / "experiment").glob("*.yaml"):
        about = help._about(path.read_text())
        assert about.endswith(".") and f" {path.stem} {about} " in words  # whole sentences
    assert all(name in re.search(r" prompts=(.*?) seeds=", words)[1] for name in suites())
    assert "hydra.job" not in page and max(map(len, page.splitlines())) <= 120


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("draftbench ")


def test_hydras_own_flags(jobs, capsys):
    assert cli.main(["--cfg", "job", "+method=svg"]) == 0
    assert "draftbench.methods.svg.SVG" in capsys.readouterr().out
    assert cli.main(["--info", "searchpath"]) == 0
    assert "pkg://draftbench.conf" in capsys.readouterr().out
    assert cli.main(["--hydra-help"]) == 0
    assert not jobs and not list(Path().iterdir())


def test_help_imports_no_torch_and_the_working_folder_is_off_the_path():
    code = (
        "import runpy, sys; sys.argv[1:] = ['--help']\n"
        "try: runpy.run_module('draftbench', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, sys.path)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("0 False")
    assert f"'{ROOT}'" not in last and "''" not in last


@pytest.mark.parametrize(
    ("launcher", "plugin"),
    [("joblib", "hydra_joblib_launcher"), ("submitit_local", "hydra_submitit_launcher")],
)
def test_launchers(jobs, monkeypatch, tmp_path, capfd, launcher, plugin):
    pytest.importorskip(f"hydra_plugins.{plugin}")
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "stand_in.py").write_text(JOB)
    (folder / "sitecustomize.py").write_text("import sys, stand_in\nsys.modules['draftbench.run'] = stand_in\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))  # for the worker processes
    argv = [f"launcher={launcher}", "hydra.sweep.dir=out", "tracking=disabled"]
    assert cli.main(["-m", "+method=dense,sta", "sparsity=0.5,0.75", *argv]) == 1
    assert not jobs
    assert read("out") == [("dense", 0.5), ("dense", 0.75), ("sta", 0.5)]
    assert {row["labels"]["group"] for row in records.read_all(["out"])} == {"out"}
    output = capfd.readouterr()
    told = output.err + "".join(path.read_text() for path in Path("out/.submitit").rglob("*.err"))
    assert "failed: no window meets this" in told and "1 of 4 jobs failed" in output.err
    assert "Traceback" not in output.err
    assert json.loads(Path("out/0/record_0.json").read_text())["status"] == "ok"
    assert "dense" in Path("out/table.txt").read_text()


def test_a_launcher_without_its_plugin_is_refused(jobs, capsys, monkeypatch):
    monkeypatch.setattr(cli.hydra, "compose", lambda *_, **__: (_ for _ in ()).throw(
        cli.ConfigCompositionException("In 'launcher/submitit_slurm': Could not find 'hydra/launcher/submitit_slurm'")
    ))  # fmt: skip
    error = fails(capsys, ["-m", "launcher=submitit_slurm", "sparsity=0.5,0.9"])
    assert error == "launcher=submitit_slurm needs its plugin: pip install 'draftbench[submitit]'" and not jobs


def test_slurm_where_there_is_none_is_refused(jobs, capsys, monkeypatch, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = ["launcher=submitit_slurm", "tracking=disabled", "hydra.sweep.dir=out", "hydra.run.dir=one"]
    error = fails(capsys, ["-m", "sparsity=0.5,0.9", *argv])
    assert error == (
        "launcher=submitit_slurm needs Slurm, whose sbatch is not on PATH here; launcher=submitit_local and "
        "launcher=joblib work without it"
    )
    assert not jobs and not Path("out").exists()
    assert cli.main(["sparsity=0.5", *argv]) == 0  # one job, which no launcher starts


@pytest.mark.parametrize("launcher", ["launcher", "+launcher", "hydra/launcher"])
def test_slurms_config_is_one_that_its_launcher_takes_in_every_spelling(launcher):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    argv = cli.normalise([f"{launcher}=submitit_slurm", "hydra.launcher.partition=gpu"], cli.groups())
    with cli._configs():
        config = cli.hydra.compose("config", argv, True)
    assert config.hydra.launcher.timeout_min == 1440 and config.hydra.launcher.partition == "gpu"
    assert config.hydra.launcher._target_.endswith(".SlurmLauncher") and config.hydra.launcher.gpus_per_node == 1
