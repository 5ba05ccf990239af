"""The wheel works from outside the repo: configs, weights and console script are in it, and its names are typed."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    with FileLock(folder.parent.parent / "wheel.lock"):  # two at once would share the folder `build` of the checkout
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def python(site, *arguments, **options):
    """Run Python outside the repo with the wheel in front of the editable install."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-P", *arguments], cwd=site.parent, env=environment, capture_output=True, text=True, **options
    )


def test_everything_is_in_it(site):
    for name in ("conf", "kernels", "methods"):
        ours = {path.relative_to(ROOT / name) for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".yaml")}
        there = {path.relative_to(site / "draftbench" / name) for path in (site / "draftbench" / name).rglob("*.*")}
        assert ours and ours <= there
    weights = site / "draftbench" / "models" / "pocket" / "weights" / "pocket.safetensors"
    assert weights.stat().st_size <= 24 * 2**20
    assert all((site / "draftbench" / name).exists() for name in ("py.typed", "report.html"))
    assert {"LICENSE", "NOTICE"} <= {path.name for path in site.rglob("licenses/*")}


def test_it_runs_from_elsewhere(site):
    tiny = ["model.frames=5", "model.height=32", "model.width=48", "model.steps=2", "metrics=[psnr_db]"]
    tiny += ["model.geometry.region=[4,4]", "tracking=disabled", "videos=false", f"cache={site.parent / 'cache'}"]
    done = python(site, "-m", "draftbench", "+method=draft", "sparsity=0.9", *tiny)
    assert done.returncode == 0, done.stderr
    (record,) = (site.parent / "outputs").rglob("record.json")
    assert '"status": "ok"' in record.read_text()
    where = python(site, "-c", "import draftbench.run, draftbench.methods; print(draftbench.run.__file__)")
    assert where.stdout.startswith(str(site))


def test_importing_is_light(site):
    code = "import sys, draftbench; print([m for m in ('torch', 'wandb', 'triton', 'hydra') if m in sys.modules])"
    assert python(site, "-c", code).stdout.strip() == "[]"


def test_names_are_typed_and_agree(site):
    done = python(site, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "-p", "draftbench")
    assert done.returncode == 0, done.stdout + done.stderr
