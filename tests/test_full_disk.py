"""A disk that is really full, a tmpfs of a few pages, and a file that may not grow: nothing old is lost or cut."""

import os
import shutil
import subprocess
import sys

import pytest

WORK = """
import os, resource, sys
from pathlib import Path
from draftbench import records, tables

how, root = sys.argv[1], Path(sys.argv[2])
quality = {name: {"motion_right": True, "scene_right": True} for name in ("method", "dense")}
def row(**values):
    known = {"method": "draft", "sparsity": 0.5, "model": "pocket", "weights_hash": "a", "device": "H200", "seed": 0,
             "versions": {}, "grid": [1, 2, 3], "commit": "c", "status": "ok", "prompt": "a", "psnr_db": 30.0}
    return records.new(**known | values)

def promoted(seeds):
    for seed in seeds:
        records.append(row(seed=seed, method=f"method_{seed}"), root / "in" / "some.jsonl")

(root / "in").mkdir()
(root / "R.md").write_text("<!-- table some -->\\n<!-- end -->\\n")
keys = [f"records={root}/in", f"out={root}/out", f"readme={root}/R.md", "quoted=nowhere", "contrasts.draws=1000",
        "figures=nowhere"]
promoted(range(3))
assert tables.main(keys) == 0
records.write(row(), root / "record.json")
records.append(row(), root / "rows.jsonl")
promoted(range(3, 12))
old = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

if how == "tmpfs":
    try:
        with open(root / "filler", "wb", buffering=0) as file:
            while file.write(bytes(4096)): pass
    except OSError: pass
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
big = row(prompt="x" * 9000)
for write, name in ((records.write, "record.json"), (records.append, "rows.jsonl")):
    try:
        write(big, root / name)
        raise SystemExit(f"{name} was written")
    except OSError as error:
        assert f"cannot write {root / name}: " in str(error), error
    assert (root / name).read_bytes() == old[root / name], name
assert tables.main(keys) == 2
cut = [path for path, data in old.items() if path.read_bytes() != data]
left = [str(path) for path in root.rglob(".*")]
assert not left, left

if how == "tmpfs":
    (root / "filler").unlink()
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
whole = {path: path.read_bytes() for path in cut}  # those that still fitted
records.append(row(seed=1), root / "rows.jsonl")
assert [one["seed"] for one in records.read_all([root / "rows.jsonl"])] == [0, 1]
assert tables.main(keys) == 0 == tables.main([*keys, "--check"])
assert all(path.read_bytes() == data for path, data in whole.items())
"""


@pytest.mark.parametrize("how", ["tmpfs", "limit"])
def test_a_full_disk_loses_and_cuts_nothing(how, tmp_path):
    command = [sys.executable, "-P", "-c", WORK, how, str(tmp_path)]
    if how == "tmpfs":
        inside = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=256k none "{tmp_path}" && exec "$@"', "sh"]
        if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True).returncode:
            pytest.skip("mounting a tmpfs in a namespace is not allowed here")
        command = [*inside, *command]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert f"draftbench: cannot write {tmp_path}" in done.stderr and "Traceback" not in done.stderr
