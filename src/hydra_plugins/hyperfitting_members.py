"""Hydra finds its plugins here: the sweeper and the launcher of `hyperfitting.sweep`.

Hydra imports this at every start, so it imports nothing of ours before a sweep begins.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass(frozen=True)
class Hydra:
    """What Hydra gives a plugin when a sweep begins."""

    context: HydraContext
    task: TaskFunction
    """Runs one composed config."""
    config: DictConfig
    """What the command composes to."""


@dataclass
class MembersConf:
    """`hydra.sweeper`: which members there are."""

    _target_: str = "hydra_plugins.hyperfitting_members.MemberSweeper"
    name: str | None = None
    """Of the sweep, and its folder; none: from the overrides that make it."""
    params: dict[str, str] = field(default_factory=dict)
    """A grid, as Hydra's own sweeper has it: `seed: 0,1,2`."""
    always: list[str] = field(default_factory=list)
    """Overrides of every member; the command's own come after them."""
    axes: dict[str, Any] = field(default_factory=dict)
    """What varies; see `hyperfitting.sweep.members`."""
    scales: dict[str, Any] = field(default_factory=dict)
    """By `scale`: more of `always` and `axes`."""
    retry_failed: bool = True
    """Try members again that failed before."""
    attempts: int = 3
    """How often a member is begun whose process dies: is killed, runs out of memory, or is lost
    with its machine. (One that fails says why, and is not tried again by the same command.)"""
    report: dict[str, Any] = field(default_factory=dict)
    """How the result is drawn; see `hyperfitting.reporting.report`."""


@dataclass
class WorkersConf:
    """`hydra.launcher`: processes of this machine that take one member after the other."""

    _target_: str = "hydra_plugins.hyperfitting_members.WorkersLauncher"
    workers: int = 1
    """Members at once; each has its share of the cores."""


@dataclass
class SlurmConf:
    """`hydra.launcher`: a job of SLURM for each member, by submitit. Needs hyperfitting[clusters].

    Sweep and store are on a disk that all machines see. A job that is preempted, or runs out of
    time, writes a checkpoint, is queued again, and goes on.
    """

    _target_: str = "hydra_plugins.hyperfitting_members.SlurmLauncher"
    cluster: str = "slurm"
    """`slurm`, or `local`: the same as processes of this machine, to try it."""
    timeout_min: int = 24 * 60
    """Of one job, in minutes."""
    partition: str | None = None
    cpus: int = 8
    gpus: int = 1
    """On one node; `hardware.ranks` or `hardware=fsdp` uses more than one."""
    memory_gb: float | None = None
    """Of the node, in GiB; none: the cluster's own."""
    at_once: int = 256
    """Jobs that may run at once."""
    signal_delay_s: int = 120
    """SLURM says so many seconds before the end of a job's time that it will end."""
    requeues: int = 100
    """How often a job that ran out of time is queued again."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """More of what `sbatch` takes, such as `account: x` or `constraint: a100`."""


@dataclass
class RayConf:
    """`hydra.launcher`: a task of Ray for each member. Needs hyperfitting[clusters].

    Sweep and store are on a disk that all machines see.
    """

    _target_: str = "hydra_plugins.hyperfitting_members.RayLauncher"
    address: str | None = None
    """Of a cluster, such as `auto` or `ray://HOST:10001`; none: one is started on this machine."""
    cpus: float = 1
    """That Ray counts for each member."""
    gpus: float = 0


ConfigStore.instance().store("members", MembersConf, group="hydra/sweeper", provider="hyperfitting")
ConfigStore.instance().store(
    "workers", WorkersConf, group="hydra/launcher", provider="hyperfitting"
)
for _name, _conf in (("slurm", SlurmConf), ("ray", RayConf)):
    ConfigStore.instance().store(_name, _conf, group="hydra/launcher", provider="hyperfitting")


class MemberSweeper(Sweeper):
    """A sweep that goes on where it stopped."""

    def __init__(self, **spec: Any) -> None:
        self.spec = MembersConf(**spec)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra says."""
        self.hydra = Hydra(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Any:
        """Run all members that have not finished, and report."""
        from hyperfitting.sweep import sweeper

        sweeper.sweep(self.spec, self.hydra, arguments)


class _Launcher(Launcher):
    """Runs members; how each has ended is said in its folder."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra says."""
        self.hydra = Hydra(hydra_context, task_function, config)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run members, and return when they have ended."""
        self.run(job_overrides, initial_job_idx)
        return []

    @abstractmethod
    def run(self, jobs: Sequence[Sequence[str]], first: int) -> None:
        """Run members of these overrides; ``first`` is the number of the first."""


class WorkersLauncher(_Launcher):
    """Runs members in processes of their own, which cannot take each other down."""

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers

    def run(self, jobs: Sequence[Sequence[str]], first: int) -> None:
        """Run members one after the other, or some at once."""
        from hyperfitting.sweep import workers

        workers.run(self.workers, self.hydra, jobs, first)


class SlurmLauncher(_Launcher):
    """Runs members as jobs of SLURM."""

    def __init__(self, **conf: Any) -> None:
        self.conf = SlurmConf(**conf)

    def run(self, jobs: Sequence[Sequence[str]], first: int) -> None:
        """Submit members."""
        from hyperfitting.sweep import clusters

        clusters.run_on_slurm(self.conf, self.hydra, jobs, first)


class RayLauncher(_Launcher):
    """Runs members as tasks of Ray."""

    def __init__(self, **conf: Any) -> None:
        self.conf = RayConf(**conf)

    def run(self, jobs: Sequence[Sequence[str]], first: int) -> None:
        """Have Ray run members."""
        from hyperfitting.sweep import clusters

        clusters.run_on_ray(self.conf, self.hydra, jobs, first)
