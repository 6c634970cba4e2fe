"""The sweeper and the launchers that Hydra finds. What they do is in `hyperfitting.sweep`.

Hydra imports this module at every start: everything heavy is imported when a sweep begins.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hyperfitting.sweep.config import (
    HydraSetup,
    RayConfig,
    SlurmConfig,
    SweeperConfig,
    WorkersConfig,
)

if TYPE_CHECKING:
    from hyperfitting.sweep.sweeper import SweepResult

_CONFIGS: tuple[tuple[str, str, type], ...] = (
    ("sweeper", "hyperfitting", SweeperConfig),
    ("launcher", "workers", WorkersConfig),
    ("launcher", "slurm", SlurmConfig),
    ("launcher", "ray", RayConfig),
)
for _group, _name, _config in _CONFIGS:
    ConfigStore.instance().store(_name, _config, group=f"hydra/{_group}", provider="hyperfitting")


class HyperfittingSweeper(Sweeper):
    """A sweep that resumes where it stopped, and ends with a report."""

    def __init__(self, **config: Any) -> None:
        plain: Any = OmegaConf.to_container(OmegaConf.create(config))
        self._config = SweeperConfig(**plain)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep Hydra's objects."""
        self.hydra = HydraSetup(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Any:
        """Run what has not finished, draw the report, and fail if a run failed."""
        from hyperfitting.reporting.spec import parse_report
        from hyperfitting.sweep.sweeper import run_sweep

        parse_report(self._config.report)  # a mistake in it is an error now, not after hours
        result = run_sweep(self._config, self.hydra, arguments)
        if result is not None:
            _report(result)
            result.raise_failures()


def _report(result: "SweepResult") -> None:
    """Draw the report of the finished runs; log it to W&B if any is new."""
    from hyperfitting.tracking.report_sweep import report_sweep

    if result.has_records:
        report_sweep(result.folder, result.config, result.console, log_to_wandb=result.is_new)


class _Launcher(Launcher):
    """Executes runs. Their outcome is in their folders, so no results are returned."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep Hydra's objects."""
        self.hydra = HydraSetup(hydra_context, task_function, config)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Execute runs; return when all have ended."""
        self.execute(job_overrides, initial_job_idx)
        return []

    @abstractmethod
    def execute(self, jobs: Sequence[Sequence[str]], first: int) -> None:
        """Execute the runs of these overrides; ``first`` is the number of the first job."""


class WorkersLauncher(_Launcher):
    """Executes runs in worker processes on this machine."""

    def __init__(self, **config: Any) -> None:
        self._config = WorkersConfig(**config)

    def execute(self, jobs: Sequence[Sequence[str]], first: int) -> None:
        """Execute runs, up to `workers` at the same time."""
        from hyperfitting.sweep.workers import run_with_workers

        run_with_workers(self._config.workers, self.hydra, jobs, first)


class SlurmLauncher(_Launcher):
    """Executes runs as SLURM jobs."""

    def __init__(self, **config: Any) -> None:
        self._config = SlurmConfig(**config)

    def execute(self, jobs: Sequence[Sequence[str]], first: int) -> None:
        """Submit a job for each run."""
        from hyperfitting.sweep.clusters import run_on_slurm

        run_on_slurm(self._config, self.hydra, jobs, first)


class RayLauncher(_Launcher):
    """Executes runs as Ray tasks."""

    def __init__(self, **config: Any) -> None:
        self._config = RayConfig(**config)

    def execute(self, jobs: Sequence[Sequence[str]], first: int) -> None:
        """Start a task for each run."""
        from hyperfitting.sweep.clusters import run_on_ray

        run_on_ray(self._config, self.hydra, jobs, first)
