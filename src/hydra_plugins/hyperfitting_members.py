"""Hydra finds its plugins here: the sweeper and the launcher of `hyperfitting.sweep`.

Hydra imports this at every start, so it imports nothing of ours before a sweep begins.
"""

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
    report: dict[str, Any] = field(default_factory=dict)
    """How the result is drawn; see `hyperfitting.reporting.report`."""


@dataclass
class WorkersConf:
    """`hydra.launcher`: processes of this machine that take one member after the other."""

    _target_: str = "hydra_plugins.hyperfitting_members.WorkersLauncher"
    workers: int = 1
    """Members at once; each has its share of the cores."""


ConfigStore.instance().store("members", MembersConf, group="hydra/sweeper", provider="hyperfitting")
ConfigStore.instance().store(
    "workers", WorkersConf, group="hydra/launcher", provider="hyperfitting"
)


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


class WorkersLauncher(Launcher):
    """Runs members in processes of their own, which cannot take each other down."""

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra says."""
        self.hydra = Hydra(hydra_context, task_function, config)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run members; how each ended is said in its folder."""
        from hyperfitting.sweep import workers

        workers.run(self.workers, self.hydra, job_overrides, initial_job_idx)
        return []
