"""Sweeps through submitit or joblib, whose jobs may be killed: all are waited for, and what was lost is told.

Hydra's submitit launchers take the results one after the other and give up the whole sweep at the first job that left
none, while the queue still runs the others; and they wait for ever for one that `sacct` does not know, as a job of an
array that was cancelled before it started, or any where there is no accounting. Its joblib launcher shares processes
among the jobs, and when one is killed all jobs are lost with it.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus

if TYPE_CHECKING:
    import submitit

EVERY = 10  # seconds from one look at the queue to the next
GRACE = 15  # seconds that a shared folder may take to show the result of a job that has left the queue


@contextmanager
def patient() -> Iterator[list[str]]:
    """Within it a launcher waits for every job; yields the list that gets a line on each without a result."""
    lost: list[str] = []
    with _submitit(lost), _joblib(lost):
        yield lost


@contextmanager
def _submitit(lost: list[str]) -> Iterator[None]:
    try:
        import submitit
        from submitit.core.utils import FailedJobError, UncompletedJobError
    except ImportError:  # then no launcher of this sweep is one of submitit's
        yield
        return
    original = submitit.Job.results

    def results(job: submitit.Job[Any]) -> list[Any]:
        try:
            if not isinstance(job, submitit.SlurmJob) or _finished(job):
                return original(job)
        except (FailedJobError, UncompletedJobError):
            pass
        lost.append(f"job {job.job_id} ended without a result, see {job.paths.stderr}")
        return [JobReturn(status=JobStatus.COMPLETED)]

    submitit.Job.results = results  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        submitit.Job.results = original  # type: ignore[method-assign]


@contextmanager
def _joblib(lost: list[str]) -> Iterator[None]:
    """joblib's threads wait, each for a process that runs one job alone."""
    try:
        from hydra_plugins.hydra_joblib_launcher import _core
        from joblib import Parallel, cpu_count, delayed, effective_n_jobs
        from joblib.externals.loky.process_executor import ProcessPoolExecutor, TerminatedWorkerError
    except ImportError:
        yield
        return

    started: list[Any] = []

    def parallel(n_jobs: int, **settings: Any) -> Callable[[Iterable[tuple[Any, ...]]], list[Any]]:
        # joblib's own processes would get this share of the cores too
        threads = str(max(1, cpu_count() // effective_n_jobs(n_jobs)))
        environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}

        def alone(execute: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            with ProcessPoolExecutor(max_workers=1, env=environment) as process:
                started.append(process)
                try:
                    return process.submit(execute, *arguments, **keywords).result()
                except TerminatedWorkerError as error:
                    number, overrides, *_ = arguments
                    codes = "".join(re.findall(r"\{(.+)\}", str(error)))
                    lost.append(f"job {number} ({' '.join(overrides)}) ended without a result, killed: {codes}")
                    return JobReturn(status=JobStatus.COMPLETED)

        threaded = Parallel(n_jobs, **settings | {"backend": "threading"})
        return lambda calls: list(threaded(delayed(alone)(*call) for call in calls))

    original, _core.Parallel = _core.Parallel, parallel
    try:
        yield
    finally:
        _core.Parallel = original
        for process in started:  # all have ended, unless the sweep is interrupted
            process.shutdown(wait=False, kill_workers=True)


def _finished(job: submitit.SlurmJob[Any]) -> bool:
    """Wait until the job has left its result or Slurm's queue; True for a result."""
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"]
    result, folder = job.paths.result_pickle, job.paths.folder
    while not result.exists():
        queue = subprocess.run(command, capture_output=True, text=True)
        if queue.returncode == 0 and job.job_id not in queue.stdout.split():
            end = time.monotonic() + GRACE
            while not result.exists() and time.monotonic() < end:
                time.sleep(1)
                with suppress(OSError):
                    folder.chmod(folder.stat().st_mode)  # has NFS look again
            return result.exists()
        time.sleep(EVERY)
    return True
