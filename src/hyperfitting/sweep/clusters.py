"""Runs on a cluster: each a SLURM job (through submitit) or a Ray task.

The sweep's folder and the store are on a file system that all nodes share. Whether a run has
finished, failed or died is read from its folder, never from SLURM or Ray.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
from hydra.core.singleton import Singleton

from hyperfitting.errors import UserError
from hyperfitting.formatting import first_line
from hyperfitting.runtime import preemption
from hyperfitting.runtime.processes import THREAD_VARIABLES
from hyperfitting.sweep.config import HydraSetup, RayConfig, SlurmConfig
from hyperfitting.sweep.jobs import execute_job

LOG_DIR = "slurm"
"""Folder of submitit's scripts and logs, within the sweep's."""

_SIGNAL_DELAY_S = 600
"""For a checkpoint of the largest models here: 289 GB (docs/scale.md) at 0.5 GB/s."""
_POLL_SECONDS = {"slurm": 5.0, "local": 0.5}

log = logging.getLogger(__name__)


def _require(package: str, launcher: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"needs the package {package}, which is not installed",
            field="hydra/launcher",
            value=launcher,
            hint="pip install 'hyperfitting[clusters]'",
        )


class Job:
    """One run, as a function without arguments that other processes can unpickle."""

    def __init__(self, hydra: HydraSetup, number: int, overrides: Sequence[str]) -> None:
        # Hydra's objects contain functions, which only cloudpickle can serialize
        self._payload = cloudpickle.dumps((hydra, Singleton.get_state(), number, list(overrides)))

    def __call__(self) -> None:
        """Execute the run; when a signal preempts it, it writes a checkpoint and is requeued.

        Raises:
            RuntimeError: it was preempted.
        """
        hydra, singletons, number, overrides = cloudpickle.loads(self._payload)
        previous_handlers = preemption.install_handlers()
        Singleton.set_state(singletons)
        try:
            execute_job(hydra, number, overrides)
        except preemption.Preempted as preempted:
            if _should_requeue(preempted.signum):
                preemption.forward_signal(previous_handlers)
            raise RuntimeError(f"received {preempted}") from preempted

    def checkpoint(self) -> Any:
        """Return what submitit submits when it requeues the job: the same job."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_on_slurm(
    config: SlurmConfig, hydra: HydraSetup, jobs: Sequence[Sequence[str]], first: int
) -> None:
    """Submit runs as one job array; return when no job is left.

    Args:
        config: resources of each job.
        hydra: what Hydra passed to the launcher.
        jobs: overrides of each run.
        first: number of the first job.

    Raises:
        UserError: submitit is not installed, there is no such cluster here, or it rejects the jobs.
    """
    _require("submitit", "slurm")
    from submitit.core.utils import FailedJobError

    executor = _slurm_executor(config, Path(hydra.config.hydra.sweep.dir).absolute() / LOG_DIR)
    try:
        with executor.batch():
            submitted = [
                executor.submit(Job(hydra, first + index, overrides))
                for index, overrides in enumerate(jobs)
            ]
    except FailedJobError as error:
        raise UserError(
            f"the cluster rejects its jobs: {str(error).strip()}",
            field="hydra/launcher",
            value="slurm",
            hint="see hydra.launcher.partition, gpus_per_node, cpus_per_task, mem_gb and "
            "additional_parameters",
        ) from error
    log.info("submitted %s", ", ".join(job.job_id for job in submitted))
    unfinished: list[Any] = submitted
    try:
        while unfinished := _unfinished_jobs(unfinished, config.cluster):
            time.sleep(_POLL_SECONDS[config.cluster])
    except BaseException:
        for job in unfinished:
            job.cancel()
        raise


def _slurm_executor(config: SlurmConfig, log_dir: Path) -> Any:
    import submitit

    try:
        executor = submitit.AutoExecutor(
            log_dir / "%j",
            cluster=config.cluster,
            **{f"{config.cluster}_max_num_timeout": config.max_num_timeout},
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot be used: {error}", field="hydra.launcher.cluster", value=config.cluster,
            valid="slurm, on a machine that can submit to it, or local",
        ) from error  # fmt: skip
    executor.update_parameters(**_submitit_parameters(config))
    return executor


def _submitit_parameters(config: SlurmConfig) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "name": "hyperfitting",
        "timeout_min": config.timeout_min,
        "cpus_per_task": config.cpus_per_task,
        "gpus_per_node": config.gpus_per_node,
    }
    if config.mem_gb is not None:
        parameters["mem_gb"] = config.mem_gb
    if config.cluster == "slurm":
        parameters |= {
            "slurm_partition": config.partition,
            "slurm_signal_delay_s": _signal_delay(config),
            "slurm_array_parallelism": config.array_parallelism,
            "slurm_additional_parameters": dict(config.additional_parameters),
        }
    return parameters


def _signal_delay(config: SlurmConfig) -> int:
    """Return how many seconds before its time limit a job receives the warning signal.

    Raises:
        UserError: all of the job's time, so that it would be requeued forever.
    """
    limit = 60 * config.timeout_min
    if config.signal_delay_s is None:
        return min(_SIGNAL_DELAY_S, limit // 10)
    if config.signal_delay_s >= limit:
        raise UserError(
            "leaves a job no time to train",
            field="hydra.launcher.signal_delay_s",
            value=config.signal_delay_s,
            valid=f"less than hydra.launcher.timeout_min, {limit} seconds",
        )
    return config.signal_delay_s


def _unfinished_jobs(jobs: list[Any], cluster: str) -> list[Any]:
    """Return the jobs that have not ended; one that will be requeued has not.

    submitit's own answer comes from SLURM's accounting, which not every cluster has, and is
    refreshed once in ten minutes; squeue is always there.
    """
    if cluster != "slurm":
        return [job for job in jobs if not job.done()]
    queued = _squeue("--user", str(os.getuid()), "--array", "--format=%i")
    if queued is None:  # the controller is unreachable: nothing is known about the jobs
        return jobs
    return [job for job in jobs if job.job_id in queued]


def _should_requeue(signum: int) -> bool:
    """Return whether this process's job is to be requeued after a signal.

    SIGUSR2 comes before the time limit. SIGTERM comes before a preemption if the cluster has a
    grace time; SLURM requeues a job that still runs when that is over, not one that has ended.
    SIGTERM comes from `scancel` too: SLURM no longer lists the job as running, and a requeue would
    start it again.
    """
    if signum == signal.SIGUSR2:
        return True
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return False
    from submitit import JobEnvironment

    states = _squeue("--jobs", JobEnvironment().job_id, "--format=%T")
    return bool(states and "COMPLETING" not in states)


def _squeue(*options: str) -> set[str] | None:
    """Return the words that squeue prints, or None if it fails."""
    command = ["squeue", "--noheader", *options]
    result = subprocess.run(  # noqa: S603  (a fixed command, without a shell)
        command, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        log.warning("squeue: %s", result.stderr.strip())
        return None
    return set(result.stdout.split())


def run_on_ray(
    config: RayConfig, hydra: HydraSetup, jobs: Sequence[Sequence[str]], first: int
) -> None:
    """Execute runs as Ray tasks; return when all have ended, also those whose process died.

    Args:
        config: the cluster, and resources of each task.
        hydra: what Hydra passed to the launcher.
        jobs: overrides of each run.
        first: number of the first job.

    Raises:
        UserError: Ray is not installed, or there is no cluster at this address.
    """
    _require("ray", "ray")
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    threads = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    try:
        ray.init(
            address=config.address,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"env_vars": threads},
        )
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"no Ray cluster can be reached: {error}", field="hydra.launcher.address",
            value=config.address, hint="null: one is started on this machine",
        ) from error  # fmt: skip
    try:
        # no retries by Ray: the sweeper distinguishes runs that died from runs that failed
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call] # ray has no types for it
        num_gpus = _gpus_of_a_task(config, resources)
        remote = ray.remote(num_cpus=config.num_cpus, num_gpus=num_gpus, max_retries=0)
        execute = remote(_execute_in)
        unfinished = [
            execute.remote(Path.cwd(), Job(hydra, first + index, overrides))
            for index, overrides in enumerate(jobs)
        ]
        while unfinished:
            ended, unfinished = ray.wait(unfinished)
            for task in ended:
                try:
                    ray.get(task)
                except ray.exceptions.RayError as error:
                    log.warning("the process of a run has ended: %s", first_line(error))
    finally:
        ray.shutdown()


def _gpus_of_a_task(config: RayConfig, resources: Mapping[str, float]) -> float:
    """Return the GPUs that each task has: those configured, else one where the cluster has any.

    Args:
        config: of the launcher.
        resources: of the cluster, by name.
    """
    if config.num_gpus is not None:
        return config.num_gpus
    return min(1.0, resources.get("GPU", 0.0))


def _execute_in(folder: Path, job: Job) -> None:
    """Execute a job in a working folder."""
    os.chdir(folder)
    job()
