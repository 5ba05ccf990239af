"""Jobs that are killed while the launcher waits for them; tests/test_slurm.py does the same on a real Slurm."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from draftbench import cli, queued, records

submitit = pytest.importorskip("submitit")

JOB = """
import os, signal, time
from draftbench import records

def job(config, folder, group=None):
    if config.sparsity == 0.5:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(2)  # it is still running when the loss of the first is known
    values = dict(model="pocket", method="draft", sparsity=config.sparsity, prompt="a", seed=0)
    records.write(records.new(**values, cell_id="a", device="cpu", versions={}, status="ok"), folder / "record.json")
"""


def stand_in(monkeypatch, folder):
    """JOB for draftbench.run in the processes of a sweep, whose working folder this is."""
    monkeypatch.chdir(folder)
    (folder / "stand_in.py").write_text(JOB)
    (folder / "sitecustomize.py").write_text("import sys, stand_in\nsys.modules['draftbench.run'] = stand_in\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    model = SimpleNamespace(grid=(8, 16, 24), layers=6, steps=8)
    monkeypatch.setattr(cli.schema, "check_job", lambda config, here: model)


def test_a_killed_job_ends_neither_the_others_nor_the_wait(monkeypatch, tmp_path, capsys):
    stand_in(monkeypatch, tmp_path)
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 0)
    original = submitit.Job.results
    argv = ["-m", "launcher=submitit_local", "sparsity=0.5,0.9", "hydra.sweep.dir=out", "tracking=disabled"]
    assert cli.main(argv) == 1 and submitit.Job.results is original
    assert [row["sparsity"] for row in records.read_all([Path("out")])] == [0.9]
    error = capsys.readouterr().err
    assert "ended without a result, see " in error and "Traceback" not in error
    assert error.endswith("1 of 2 jobs left no record\n")


def test_a_job_that_is_killed_under_joblib_ends_no_other_and_is_named(monkeypatch, tmp_path, capsys):
    core = pytest.importorskip("hydra_plugins.hydra_joblib_launcher._core")
    stand_in(monkeypatch, tmp_path)
    original = core.Parallel
    argv = ["-m", "launcher=joblib", "sparsity=0.6,0.5,0.9", "hydra.sweep.dir=out", "tracking=disabled"]
    assert cli.main(argv) == 1 and core.Parallel is original
    assert [row["sparsity"] for row in records.read_all([Path("out")])] == [0.6, 0.9]
    error = capsys.readouterr().err
    assert "job 1 (launcher=joblib sparsity=0.5 tracking=disabled) ended without a result, killed: SIGKILL" in error
    assert "Traceback" not in error and error.endswith("1 of 3 jobs left no record\n")


@pytest.mark.parametrize("late", [False, True])
def test_a_job_that_left_the_queue_is_over_and_a_queue_that_does_not_answer_says_nothing(monkeypatch, tmp_path, late):
    result = tmp_path / "result.pkl"
    job = SimpleNamespace(job_id="7_1", paths=SimpleNamespace(result_pickle=result, folder=tmp_path))
    answers = [(0, "7_1\n7_11\n"), (1, ""), (0, "7_11\n")]

    def run(command, **_):
        assert command[0] == "squeue" and command[-1] == f"--user={os.getuid()}"
        code, text = answers.pop(0)
        if late and not answers:
            result.touch()
        return subprocess.CompletedProcess(command, code, text)

    monkeypatch.setattr(queued.subprocess, "run", run)
    monkeypatch.setattr(queued, "EVERY", 0)
    monkeypatch.setattr(queued, "GRACE", 0)
    assert queued._finished(job) is late and not answers
