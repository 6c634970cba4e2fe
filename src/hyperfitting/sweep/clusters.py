"""Members on a cluster: each a job of SLURM (by submitit) or a task of Ray.

The sweep's folder and the store lie on a disk that all machines see. Whether a member has finished,
failed or died is read from its folder, never from the engine: an engine only gives it a machine.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cloudpickle
from hydra.core.singleton import Singleton

from hydra_plugins.hyperfitting_members import Hydra, RayConf, SlurmConf
from hyperfitting import preemption
from hyperfitting.errors import UserError
from hyperfitting.sweep import workers

LOGS = "slurm"
"""Folder of submitit's scripts and logs, in the sweep's."""

_EVERY = {"slurm": 5.0, "local": 0.5}
"""Seconds between two looks at what has ended."""

log = logging.getLogger(__name__)


def _needs(package: str, launcher: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"needs the package {package}, which is not installed",
            field="hydra/launcher",
            value=launcher,
            hint="pip install 'hyperfitting[clusters]'",
        )


class Job:
    """One member, wherever it is run. (It holds functions, which only cloudpickle can send.)"""

    def __init__(self, hydra: Hydra, number: int, overrides: Sequence[str]) -> None:
        self._sent = cloudpickle.dumps((hydra, Singleton.get_state(), number, list(overrides)))

    def __call__(self) -> None:
        """Run the member. If the machine is wanted back, a checkpoint is written first.

        Raises:
            RuntimeError: it was.
        """
        hydra, singletons, number, overrides = cloudpickle.loads(self._sent)
        before = preemption.listen()
        Singleton.set_state(singletons)
        try:
            workers.run_member(hydra, number, overrides)
        except preemption.Preempted as told:
            preemption.hand_over(before)
            raise RuntimeError(f"told to end ({told})") from told

    def checkpoint(self) -> Any:
        """Return what submitit is to run when the job begins again: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_on_slurm(conf: SlurmConf, hydra: Hydra, jobs: Sequence[Sequence[str]], first: int) -> None:
    """Submit members, all at once; return when no job of them is left.

    Args:
        conf: what each job asks for.
        hydra: what it gave the launcher.
        jobs: overrides of each member.
        first: number of the first.

    Raises:
        UserError: submitit is not installed, there is no such cluster here, or it refuses the jobs.
    """
    _needs("submitit", "slurm")
    import submitit
    from submitit.core.utils import FailedJobError

    executor_fields = {f"{conf.cluster}_max_num_timeout": conf.requeues}
    try:
        executor = submitit.AutoExecutor(
            Path(hydra.config.hydra.sweep.dir).absolute() / LOGS / "%j",
            cluster=conf.cluster,
            **executor_fields,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot be used: {error}", field="hydra.launcher.cluster", value=conf.cluster,
            valid="slurm, on a machine that can submit to it, or local",
        ) from error  # fmt: skip
    executor.update_parameters(**_asked_for(conf))
    try:
        with executor.batch():
            submitted = [
                executor.submit(Job(hydra, first + number, overrides))
                for number, overrides in enumerate(jobs)
            ]
    except FailedJobError as error:
        raise UserError(
            f"the cluster refuses its jobs: {str(error).strip()}",
            field="hydra/launcher",
            value="slurm",
            hint="see hydra.launcher.partition, gpus, cpus, memory_gb and sbatch",
        ) from error
    log.info("submitted %s", ", ".join(job.job_id for job in submitted))
    left: list[Any] = submitted
    try:
        while left := _left(left, conf.cluster):
            time.sleep(_EVERY[conf.cluster])
    except BaseException:
        for job in left:
            job.cancel()
        raise


def _left(jobs: list[Any], cluster: str) -> list[Any]:
    """Return those jobs that have not ended: one that is to begin again has not.

    (Submitit asks SLURM's accounting, which not every cluster has, and once in ten minutes.)
    """
    if cluster != "slurm":
        return [job for job in jobs if not job.done()]
    asked = ["squeue", "--user", str(os.getuid()), "--array", "--noheader", "--format=%i"]
    told = subprocess.run(  # noqa: S603  (our own words, no shell)
        asked, capture_output=True, text=True, check=False
    )
    if told.returncode != 0:  # nobody answers now, which says nothing of the jobs
        log.warning("squeue: %s", told.stderr.strip())
        return jobs
    queued = set(told.stdout.split())
    return [job for job in jobs if job.job_id in queued]


def _asked_for(conf: SlurmConf) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "name": "hyperfitting",
        "timeout_min": conf.timeout_min,
        "cpus_per_task": conf.cpus,
        "gpus_per_node": conf.gpus,
    }
    if conf.memory_gb is not None:
        asked["mem_gb"] = conf.memory_gb
    if conf.cluster == "slurm":
        asked |= {
            "slurm_partition": conf.partition,
            "slurm_signal_delay_s": conf.signal_delay_s,
            "slurm_array_parallelism": conf.at_once,
            "slurm_additional_parameters": dict(conf.sbatch),
        }
    return asked


def run_on_ray(conf: RayConf, hydra: Hydra, jobs: Sequence[Sequence[str]], first: int) -> None:
    """Run members as tasks; return when all have ended, be it that their process has died.

    Args:
        conf: the cluster, and what each task asks for.
        hydra: what it gave the launcher.
        jobs: overrides of each member.
        first: number of the first.

    Raises:
        UserError: Ray is not installed, or there is no cluster at this address.
    """
    _needs("ray", "ray")
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it tells nobody
    threads = {name: os.environ[name] for name in workers.THREADS if name in os.environ}
    try:
        ray.init(
            address=conf.address,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"env_vars": threads},
        )
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"no Ray cluster can be reached: {error}", field="hydra.launcher.address",
            value=conf.address, hint="null: one is started on this machine",
        ) from error  # fmt: skip
    try:
        # retried by the sweep, which knows who has died and who has failed
        run = ray.remote(num_cpus=conf.cpus, num_gpus=conf.gpus, max_retries=0)(_as_task)
        left = [
            run.remote(Job(hydra, first + number, overrides), str(Path.cwd()))
            for number, overrides in enumerate(jobs)
        ]
        while left:
            ended, left = ray.wait(left)
            for task in ended:
                try:
                    ray.get(task)
                except ray.exceptions.RayError as error:
                    log.warning("a member's process has ended: %s", str(error).splitlines()[0])
    finally:
        ray.shutdown()


def _as_task(job: Job, folder: str) -> None:
    os.chdir(folder)
    job()
