"""The config groups `hydra/sweeper` and `hydra/launcher`.

Hydra imports this module at every start, so it imports nothing but Hydra.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass(frozen=True)
class HydraSetup:
    """What Hydra passes to a plugin's `setup`."""

    context: HydraContext
    task: TaskFunction
    """Runs one composed config."""
    config: DictConfig
    """The composed config of the command, with the `hydra` node."""


@dataclass
class SweeperConfig:
    """Which runs a sweep consists of."""

    _target_: str = "hydra_plugins.hyperfitting_sweeper.HyperfittingSweeper"
    name: str | None = None
    """Name of the sweep and of its folder; null: built from the command's overrides."""
    params: dict[str, str] = field(default_factory=dict)
    """A grid, as in Hydra's basic sweeper: `seed: 0,1,2`."""
    base_overrides: list[str] = field(default_factory=list)
    """Overrides of every run; those of the command come after them."""
    axes: dict[str, Any] = field(default_factory=dict)
    """What varies between runs; see `hyperfitting.sweep.runs`."""
    scales: dict[str, Any] = field(default_factory=dict)
    """For each `scale`, additional `base_overrides` and `axes`."""
    code_change: str = "new_folder"
    """For a sweep with finished or running runs of other code: `new_folder` runs it again in the
    folder NAME_CODE; `continue` finishes it with this code. Artifacts are shared either way."""
    retry_failed: bool = True
    """Repeat runs that failed in an earlier command."""
    max_attempts: int = 3
    """Attempts at a run whose process dies (killed, out of memory, machine lost). A run that fails
    with an error is not repeated within the same command."""
    report: dict[str, Any] = field(default_factory=dict)
    """Tables and figures of the report; see `hyperfitting.reporting`."""


@dataclass
class WorkersConfig:
    """Worker processes on this machine."""

    _target_: str = "hydra_plugins.hyperfitting_sweeper.WorkersLauncher"
    workers: int = 1
    """Runs at the same time; the CPU cores are divided between them."""


@dataclass
class SlurmConfig:
    """One SLURM job per run, through submitit. Needs hyperfitting[clusters].

    The sweep's folder and the store must be on a file system that all nodes share. A job that is
    preempted or times out writes a checkpoint, is requeued, and resumes. Fields have submitit's
    names.
    """

    _target_: str = "hydra_plugins.hyperfitting_sweeper.SlurmLauncher"
    cluster: str = "slurm"
    """`slurm`, or `local`: submitit's local executor, to try the launcher without a cluster."""
    timeout_min: int = 24 * 60
    """Time limit of a job, in minutes."""
    partition: str | None = None
    """SLURM partition; null: the cluster's default."""
    cpus_per_task: int = 8
    """CPU cores of a job."""
    gpus_per_node: int = 1
    """GPUs of a job, on one node; `hardware.num_processes` or `hardware=fsdp` uses more than
    one."""
    mem_gb: float | None = None
    """Memory of a job, in GiB; null: the cluster's default."""
    array_parallelism: int = 256
    """Jobs that may run at the same time."""
    signal_delay_s: int | None = None
    """Seconds between SLURM's warning signal and the time limit, for the checkpoint; null: 600, but
    at most a tenth of the limit."""
    max_num_timeout: int = 100
    """How often a job that timed out is requeued."""
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    """Further options of `sbatch`, such as `account: x` or `constraint: a100`."""


@dataclass
class RayConfig:
    """One Ray task per run. Needs hyperfitting[clusters].

    The sweep's folder and the store must be on a file system that all nodes share. Fields have
    Ray's names.
    """

    _target_: str = "hydra_plugins.hyperfitting_sweeper.RayLauncher"
    address: str | None = None
    """Address of a cluster, such as `auto` or `ray://HOST:10001`; null: Ray is started on this
    machine."""
    num_cpus: float = 1
    """CPU cores that Ray reserves for a run."""
    num_gpus: float | None = None
    """GPUs that Ray reserves for a run; null: one, if the cluster has any."""
