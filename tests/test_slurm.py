"""A sweep through a real Slurm on 127.0.0.1, which the test starts and stops: pytest -m slurm, as root on Debian, after
apt-get install munge slurmctld slurmd slurm-client. No systemd, cgroups or accounting.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from draftbench import records, run

PATH = f"{os.environ['PATH']}:/usr/sbin"
DAEMONS = ["munged", "slurmctld", "slurmd"]

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdPort={node}
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
SlurmdParameters=config_overrides
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=1
NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000
PartitionName=all Nodes=node Default=YES
"""

HEADER = """pytest -m slurm tests/test_slurm.py --slurm-log=results/logs/slurm_sweep.txt

Twelve tiny jobs of random weights, two at once, on a Slurm of the test's own; the overrides that make them tiny are
left out. In the first sweep job 4 is made to fail and job 5 to hang; 5 is cancelled as it runs, 11 before it starts.
"""

# On the nodes of the first sweep: one job has no memory left, another never ends.
FAULTS = """
import os
import time

def plan(*_):
    if task == "4":
        raise RuntimeError("out of memory")
    time.sleep(1000)

task = os.environ.get("SLURM_ARRAY_TASK_ID")
if task in ("4", "5"):
    from draftbench.methods.draft import Draft
    Draft.plan = plan
"""


def stop(process):
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture
def slurm(tmp_path):
    """The environment for Slurm's commands on a cluster of two times two CPUs; its state is in a temporary folder."""
    absent = [name for name in DAEMONS if not shutil.which(name, path=PATH)]
    if absent or os.geteuid():
        pytest.skip(f"not installed: {', '.join(absent)}" if absent else "Slurm's daemons want to be root here")
    folder = tmp_path / "slurm"
    for path in (folder, folder / "state", folder / "spool"):
        path.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = {"controller": one.getsockname()[1], "node": two.getsockname()[1]}
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, **ports))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": f"{folder}/slurm.conf", "OMP_NUM_THREADS": "1"}

    def answers(word, *argv):
        return lambda: word in subprocess.run(argv, env=environment, capture_output=True, text=True).stdout

    with ExitStack() as daemons:

        def start(argv, ready):
            path = folder / f"{argv[0]}.out"
            with open(path, "w") as log:
                process = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
            daemons.callback(stop, process)
            end = time.monotonic() + 60
            while not ready():
                assert process.poll() is None and time.monotonic() < end, path.read_text()
                time.sleep(0.2)

        sock = folder / "munge.socket"
        files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        start(["munged", "--foreground", "--force", f"--socket={sock}", *files], sock.exists)
        start(["slurmctld", "-D"], answers("UP", "scontrol", "ping"))
        start(["slurmd", "-D"], answers(" idle ", "sinfo"))
        yield environment
        subprocess.run(["scancel", "--user=root"], env=environment)
        deadline = time.monotonic() + 30
        while answers("node", "squeue")() and time.monotonic() < deadline:
            time.sleep(0.2)


@pytest.mark.slurm
def test_a_sweep_with_a_failing_and_two_cancelled_jobs_and_the_same_command_again(slurm, small, tmp_path, request):
    sweep = [
        "-m", "launcher=submitit_slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=2",
        "hydra.launcher.mem_gb=1", "method=random,draft,svg", "sparsity=0.5,0.9", "seeds=[0],[1]",
        "latency.enabled=false", "hydra.sweep.dir=out",
    ]  # fmt: skip
    argv = [sys.executable, "-P", "-m", "draftbench", *small, *sweep]
    out, faults = tmp_path / "out", tmp_path / "faults"
    faults.mkdir()
    (faults / "sitecustomize.py").write_text(FAULTS)
    heard = [HEADER]

    def until(found):
        end = time.monotonic() + 200
        while not found():
            assert first.poll() is None and time.monotonic() < end, (tmp_path / "first").read_text()
            time.sleep(0.2)

    def told(*command):
        done = subprocess.run(command, env=slurm, cwd=tmp_path, capture_output=True, text=True)
        heard.append(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}")
        return done

    with open(tmp_path / "first", "w") as log:
        broken = {**slurm, "PYTHONPATH": str(faults)}
        first = subprocess.Popen(argv, env=broken, cwd=tmp_path, stdout=log, stderr=log)
    try:
        until(lambda: list(out.glob(".submitit/*_11")))
        (array,) = (path.name.partition("_")[0] for path in out.glob(".submitit/*_11"))
        told("scancel", f"{array}_11")  # it waits for the others still
        until((out / "5" / "record.json").exists)
        told("scancel", f"{array}_5")  # it runs
        code = first.wait(200)
    finally:
        stop(first)
    said = (tmp_path / "first").read_text()
    heard.append(f"$ draftbench {' '.join(sweep)}\n{said}exit code {code}\n")
    before = {int(path.parent.name): records.read(path) for path in out.glob("*/record.json")}
    expected = {number: "ok" for number in range(11)} | {4: "failed: out of memory", 5: run.UNFINISHED}
    assert code == 1 and "Traceback" not in said
    assert {number: row["status"] for number, row in before.items()} == expected, said
    assert f"job {array}_5 ended without a result, see " in said
    assert f"job {array}_11 ended without a result, see " in said
    assert said.endswith("2 of 11 cells failed; the same command runs those and what is missing\n")
    assert "1 of 12 jobs left no record" in said and (out / "table.txt").read_text() in said
    told("squeue", "--array", "--states=all", "--format=%.8i %.10T %.6M %.4C")

    again = told(*argv)
    heard[-1] = f"$ draftbench {' '.join(sweep)}\n{again.stdout}{again.stderr}exit code {again.returncode}\n"
    after = {int(path.parent.name): records.read(path) for path in out.glob("*/record.json")}
    assert again.returncode == 0, again.stderr
    assert {number: row["status"] for number, row in after.items()} == dict.fromkeys(range(12), "ok")
    assert all(after[number] == row for number, row in before.items() if row["status"] == "ok")
    assert (out / "table.txt").read_text() in again.stdout
    if request.config.option.slurm_log:
        text = "\n".join(heard).replace(f"{tmp_path}/", "")
        text = re.sub(r": model\.weights=.*? launcher=submitit_slurm", ": (tiny) launcher=submitit_slurm", text)
        Path(request.config.option.slurm_log).write_text(text)
