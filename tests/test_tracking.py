"""W&B offline is read back; its failures lose nothing."""

import json
import os
import subprocess
import sys

import pytest
import torch

from draftbench import media, records, run, tracking


def rows():
    known = {"model": "pocket", "sparsity": 0.9, "status": "ok", "grid": (2, 4, 4), "versions": {"torch": "2.13"}}
    return [records.new(method="draft", seed=seed, psnr_db=20.0 + seed, **known) for seed in (0, 1)]


def inspect(folder):
    """A run's name, summary and config as W&B's own reader prints them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_offline_runs_are_read_back(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    frames = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    media.write_video(frames, tmp_path / "a.mp4", 8)
    media.side_by_side(frames, frames, tmp_path / "a.png", {})
    before = dict(os.environ)
    with tracking.Tracker("offline", "p", tmp_path / "run", "a-group", "first", {"method": {"pool": "max"}}) as tracker:
        tracker.log_rows(rows())
        tracker.log_files({"video": tmp_path / "a.mp4"}, {"picture": tmp_path / "a.png"})
    dense = records.new(model="pocket", method="dense", sparsity=0.0, status="ok", psnr_db=100.0)
    tracking.log_sweep([dense, *rows()], "p", tmp_path / "sweep", "a-group", "offline")
    assert {k: v for k, v in os.environ.items() if k.startswith("WANDB_DATA")} == {}
    assert {k for k in os.environ if k not in before} <= {"WANDB_SERVICE", "PYTEST_CURRENT_TEST"}
    (run,), (sweep,) = ((tmp_path / name / "wandb").glob("offline-run-*") for name in ("run", "sweep"))
    text = inspect(run)
    assert "first (" in text and "method.pool" in text and "finished (exit code 0)" in text
    summary = dict(line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  "))
    assert (summary["psnr_db"], summary["n"]) == ("20.5", "2")
    assert summary["video"].startswith("video-file") and summary["picture"].startswith("image-file")
    (table,) = run.rglob("cells*.table.json")
    table = json.loads(table.read_text())
    cells = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    assert [(c["psnr_db"], c["grid"], c["versions.torch"], c["ssim"]) for c in cells] == [
        (20.0, "[2, 4, 4]", "2.13", None), (21.0, "[2, 4, 4]", "2.13", None)
    ]  # fmt: skip
    assert "pocket/draft@0.9/psnr_db" in inspect(sweep) and "pocket/dense@0.0/psnr_db" in inspect(sweep)
    assert all(b"a-group" in next(folder.glob("*.wandb")).read_bytes() for folder in (run, sweep))


def test_heat_maps_go_up_without_videos(configured, tmp_path):
    """And an MP4 that lies in the folder does not."""
    media.write_video(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), tmp_path / "run" / "old.mp4", 8)
    run.job(configured("tracking=offline", "diagnostics=true", "videos=false"), tmp_path / "run")
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    summary = dict(line.split(maxsplit=1) for line in inspect(folder).splitlines() if line.startswith("  "))
    sent = {name for name, value in summary.items() if value.startswith(("image-file", "video-file"))}
    assert sent == {"recall", "maps", "kept_over_frames"}
    assert len(list(folder.rglob("*.png"))) == 3 and not list(folder.rglob("*.mp4"))


def test_disabled_does_not_import_wandb(tmp_path):
    code = (
        "import sys; from draftbench import tracking\n"
        f"with tracking.Tracker('disabled', 'p', {str(tmp_path)!r}, None, 'n', {{}}) as t:\n"
        "    t.log_rows([{}]); t.log_files({}, {})\n"
        f"tracking.log_sweep([{{}}], 'p', {str(tmp_path)!r}, None, 'disabled')\n"
        "assert not {'wandb', 'torch', 'av', 'PIL', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    assert not list(tmp_path.iterdir())


def test_a_bad_mode_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"tracking\.mode must be one of offline, online, disabled, got 'on'"):
        tracking.Tracker("on", "p", tmp_path, None, "n", {})


def test_no_login_is_one_line_before_the_work(tmp_path):
    """In a process of its own, with no home and so no key; in one of a sweep's jobs, and where a run begins."""
    tracker = f"from draftbench import tracking; tracking.Tracker('online', 'p', {str(tmp_path)!r}, None, 'n', {{}})"
    sweep = ["-m", "draftbench", "-m", "tracking=disabled,online", "device=cpu", "hydra.sweep.dir=out", "cache=cache"]
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    for command, code in ((sweep, 2), (["-c", f"{tracker}.__enter__()"], 1)):
        done = subprocess.run(
            [sys.executable, "-P", *command], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
        )
        assert done.returncode == code and ("Traceback" in done.stderr) == (code == 1)
        last = done.stderr.splitlines()[-1]
        assert "W&B cannot start with tracking.mode=online: not logged in; run `wandb login`" in last
    assert not {"out", "cache"} & {path.name for path in tmp_path.iterdir()}


class BrokenRun:
    """Fails at everything after the start."""

    def log(self, _):
        raise ConnectionError("no network")

    def finish(self, exit_code):
        raise TimeoutError("still no network")


def test_no_network_at_the_start_is_one_line(tmp_path, monkeypatch):
    import wandb

    def fail(**_):
        raise wandb.errors.CommError("run initialization has timed out\nafter 30 s")

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(RuntimeError, match=r"^W&B cannot start with tracking.mode=online: run .* out after 30 s$"):
        tracking.Tracker("online", "p", tmp_path, None, "n", {}).__enter__()
    with pytest.warns(UserWarning, match="W&B cannot start"):
        tracking.log_sweep(rows(), "p", tmp_path, None, "online")


def test_wandb_not_installed_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match="pip install wandb"):
        tracking.Tracker("offline", "p", tmp_path, None, "n", {}).__enter__()


def test_a_failure_later_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.Tracker, "_start", lambda self: BrokenRun())
    with pytest.warns(UserWarning) as caught, tracking.Tracker("offline", "p", tmp_path, None, "n", {}) as tracker:
        tracker.log_rows(rows())
        tracker.log_files({}, {})
    assert [str(w.message).split(":")[0] for w in caught] == [
        "W&B could not log the rows", "W&B could not log the videos and pictures", "W&B could not finish"
    ]  # fmt: skip
    with pytest.warns(UserWarning), pytest.raises(KeyError, match="mine"), tracking.Tracker(
        "offline", "p", tmp_path, None, "n", {}
    ):  # fmt: skip
        raise KeyError("mine")
