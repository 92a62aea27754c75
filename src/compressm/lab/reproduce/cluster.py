"""Runs of a grid on other machines, through the scheduler that is there: Slurm, by submitit.

submitit serves better than Ray here. A grid is some dozens of independent runs of hours each, and batch schedulers are
made for such jobs; Ray would need a cluster of its own. A run that is cut off goes on from its last checkpoint, so the
folders of runs and results must be on a file system that all machines share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from compressm.errors import CompressmError, ConfigError, MissingExtraError, RunError

Cluster = Literal["slurm", "local"]


class Submitted(ThreadPoolExecutor):
    """An executor whose calls run as jobs: a thread here waits for each.

    Args:
        workers: jobs at a time.
        cluster: ``"slurm"``; or ``"local"``, processes of this machine, to try things out.
        folder: where the jobs' logs go.
        options: of `submitit.AutoExecutor.update_parameters`: ``timeout_min``, ``slurm_partition`` and so on.

    Raises:
        MissingExtraError: submitit is not installed.
        ConfigError: no such scheduler here, or an option that it does not know.
    """

    def __init__(self, workers: int, cluster: Cluster, folder: Path, options: Mapping[str, Any]) -> None:
        try:
            import submitit
        except ImportError as error:
            raise MissingExtraError('--cluster needs submitit: pip install "compressm[cluster]"') from error
        try:
            self._jobs: Any = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._jobs.update_parameters(**{"name": "compressm", "cpus_per_task": 1, "timeout_min": 24 * 60, **options})
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise ConfigError(f"--cluster {cluster}: {error}") from error
        super().__init__(workers)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As `concurrent.futures.Executor.submit`; the future raises `RunError` for a job that came to nothing."""
        return super().submit(self._wait_for_job, fn, *args, **kwargs)

    def _wait_for_job(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from submitit.core.utils import FailedSubmissionError, UncompletedJobError

        job: Any = None
        try:
            job = self._jobs.submit(_outcome, fn, *args, **kwargs)
            outcome = job.result()
        except FailedSubmissionError as error:
            raise RunError(f"the scheduler did not take the job: {error}; see --cluster-options") from error
        except UncompletedJobError as error:
            log = job.paths.stderr if job.paths.stderr.exists() else job.paths.folder
            raise RunError(
                f"job {job.job_id} ended without a result (out of time or memory, or a node that failed?): see {log}; "
                "the same command goes on where it was"
            ) from error
        if isinstance(outcome, CompressmError):
            raise outcome
        return outcome


def _outcome(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of a function, or the error that it raised on purpose. submitit would pass on the text only."""
    try:
        return fn(*args, **kwargs)
    except CompressmError as error:
        return error


def on_cluster(cluster: Cluster, folder: Path, options: Mapping[str, Any]) -> Callable[[int], Executor]:
    """An executor for `run_grid`."""
    return lambda workers: Submitted(workers, cluster, folder, options)


def parse_options(text: str | None) -> dict[str, Any]:
    """``"timeout_min=60,slurm_partition=gpu"`` to a dict; whole numbers as such.

    Raises:
        ConfigError: something else.
    """
    options: dict[str, Any] = {}
    for part in (text or "").split(","):
        key, equals, value = part.strip().partition("=")
        if part.strip() and not (key.isidentifier() and equals and value):
            raise ConfigError(f"--cluster-options {part.strip()!r}: write key=value, for example slurm_partition=gpu")
        if key:
            options[key] = int(value) if value.isdecimal() else value
    return options


__all__ = ["Cluster", "Submitted", "on_cluster", "parse_options"]
