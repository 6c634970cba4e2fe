"""A sweep: its runs are composed and checked, then executed until each has finished or failed.

The same command finds the same folder: finished runs are skipped, the others executed, and it waits
for those that another command is executing.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from omegaconf import open_dict
from rich.console import Console

from hyperfitting.config import RunConfig, from_hydra
from hyperfitting.config_errors import quote
from hyperfitting.errors import UserError
from hyperfitting.failures import ReportedError, print_error
from hyperfitting.fields import at_least, result_settings
from hyperfitting.formatting import make_console
from hyperfitting.runtime import processes
from hyperfitting.runtime.code_version import code_version
from hyperfitting.runtime.files import refresh_directory
from hyperfitting.store.hashing import digest
from hyperfitting.sweep.code_pin import pinned_folder
from hyperfitting.sweep.config import HydraSetup, SweeperConfig
from hyperfitting.sweep.jobs import compose_job
from hyperfitting.sweep.live_view import live_view, summary_table
from hyperfitting.sweep.runs import (
    SweepRun,
    check_distinct,
    command_overrides,
    command_runs,
    sweep_name,
)
from hyperfitting.sweep.spec import write_sweep_spec
from hyperfitting.sweep.state import RunFolder
from hyperfitting.sweep.workers import warn_of_shared_gpus

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
"""Between two checks of runs that another command executes."""


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep, composed and checked."""

    name: str
    """That of its experiment and scale; its folder is NAME_CODE if NAME has runs of other code."""
    folder: Path
    runs: list[SweepRun]
    configs: Mapping[str, RunConfig]
    """By name of the run."""
    overrides: Mapping[str, list[str]]
    """By name of the run: what composes its config, its folder included."""

    def run_folder(self, run: SweepRun) -> RunFolder:
        """Return the folder of a run."""
        return RunFolder(self.folder / run.name)

    def finished(self) -> frozenset[str]:
        """Return the names of the runs that have a record of their config."""
        return frozenset(
            run.name
            for run in self.runs
            if self.run_folder(run).is_finished(self.configs[run.name])
        )

    def failed(self) -> dict[str, str]:
        """Return the reasons of the runs that have failed, by name."""
        statuses = {run.name: self.run_folder(run).status() for run in self.runs}
        return {name: s.reason for name, s in statuses.items() if s.kind == "failed"}


@dataclass(frozen=True)
class SweepResult:
    """The outcome of a sweep."""

    folder: Path
    config: RunConfig
    """Of its first run."""
    n_runs: int
    n_finished: int
    failed: Mapping[str, str]
    """Reasons, by name of the run."""
    has_records: bool
    """Whether any run has a record, so that there is something to report."""
    is_new: bool
    """Whether this command executed any run."""
    console: Console

    def raise_failures(self) -> None:
        """Print the runs that failed, and why.

        Raises:
            ReportedError: there are some.
        """
        if not self.failed:
            return
        lines = [f"finished runs: {self.n_finished}, failed: {len(self.failed)}"]
        for name, reason in self.failed.items():
            log_file = self.folder / name / "hyperfit.log"
            lines.append(f"- {name}: {reason.partition(chr(10))[0]}  (log: {log_file})")
        print_error("\n".join(lines))
        raise ReportedError(f"{len(self.failed)} of {self.n_runs} runs failed")


def run_sweep(
    sweeper: SweeperConfig, hydra: HydraSetup, arguments: Sequence[str]
) -> SweepResult | None:
    """Execute a sweep, or with `plan=true` print its plan.

    Args:
        sweeper: the config of the sweeper.
        hydra: what Hydra passed to it.
        arguments: overrides of the command.

    Returns:
        The outcome, with the runs that failed; None if the sweep was only planned.

    Raises:
        UserError: the sweep or the config of one of its runs is invalid; no run was started.
    """
    console = make_console()
    if processes.is_distributed():
        raise UserError(
            "torchrun starts the processes of one run, and this is a sweep",
            hint="without torchrun: hardware=fsdp uses all GPUs of a machine for each run, and "
            "hydra/launcher=slurm gives each run a machine",
        )
    sweep = _compose_sweep(sweeper, hydra, arguments, console)
    workers = hydra.config.hydra.launcher.get("workers", 1)
    at_least("hydra.launcher.workers", workers, 1)
    if hydra.config.plan:
        from hyperfitting.sweep import plan  # imports torch

        plan.show(plan.make_plan(sweep.configs, sweep.finished(), workers), console)
        return None
    _write_spec(sweep, sweeper, hydra.config.scale, arguments)
    _set_stale_records_aside(sweep, console)
    finished = sweep.finished()
    skipped = finished if sweeper.retry_failed else finished.union(sweep.failed())
    todo = [run for run in sweep.runs if run.name not in skipped]
    if workers > 1:
        todo = _interleave_trainings(todo, sweep.configs)
    with live_view(console, sweep.folder, sweep.configs, todo, len(finished), workers):
        _execute(sweep, todo, hydra)
    console.print(summary_table(sweep.folder, sweep.runs))
    return SweepResult(
        folder=sweep.folder,
        config=next(iter(sweep.configs.values())),
        n_runs=len(sweep.runs),
        n_finished=len(sweep.finished()),
        failed=sweep.failed(),
        has_records=any(sweep.run_folder(run).record_path.is_file() for run in sweep.runs),
        is_new=bool(todo),
        console=console,
    )


def _compose_sweep(
    sweeper: SweeperConfig, hydra: HydraSetup, arguments: Sequence[str], console: Console
) -> Sweep:
    """Return the sweep of a command, every run composed and checked before any starts."""
    config = hydra.config
    parser = OverridesParser.create(config_loader=hydra.context.config_loader)
    given = command_overrides(sweeper, arguments)
    runs = command_runs(sweeper, config.scale, given, parser)
    with open_dict(config):
        config.hydra.sweeper.name = sweeper.name or sweep_name(given)
    folder = pinned_folder(Path(config.hydra.sweep.dir).absolute(), sweeper.code_change, console)
    overrides = {
        run.name: [
            *run.overrides,
            f"hydra.sweep.dir={quote(str(folder))}",
            f"hydra.sweep.subdir={quote(run.name)}",
        ]
        for run in runs
    }
    configs = {
        run.name: _checked_config(hydra, number, run.name, overrides[run.name])
        for number, run in enumerate(runs)
    }
    check_distinct(configs)
    return Sweep(config.hydra.sweeper.name, folder, runs, configs, overrides)


def _checked_config(
    hydra: HydraSetup, number: int, name: str, overrides: Sequence[str]
) -> RunConfig:
    composed = compose_job(hydra, number, overrides)
    with open_dict(composed):
        del composed["hydra"]
    try:
        return from_hydra(composed)
    except UserError as error:
        raise error.for_run(name) from error


def _interleave_trainings(
    todo: Sequence[SweepRun], configs: Mapping[str, RunConfig]
) -> list[SweepRun]:
    """Return the runs with those that share a training apart.

    Next to each other, one worker would train and the others wait for it.
    """
    seen: Counter[str] = Counter()
    rounds = []
    for run in todo:
        cfg = configs[run.name]
        training = repr((cfg.model, cfg.dataset, cfg.optimizer, cfg.tuning, cfg.trainer))
        rounds.append(seen[training])
        seen[training] += 1
    return [run for _, run in sorted(zip(rounds, todo, strict=True), key=lambda pair: pair[0])]


def _write_spec(sweep: Sweep, sweeper: SweeperConfig, scale: str, arguments: Sequence[str]) -> None:
    """Write sweep.json, which reports and the runs read."""
    write_sweep_spec(
        sweep.folder,
        name=sweep.name,
        scale=scale,
        command=["hyperfit", *arguments],
        scales=sweeper.scales,
        axes=sweeper.axes,
        report=sweeper.report,
        runs=[
            {
                "name": run.name,
                "labels": dict(run.labels),
                "settings": digest(result_settings(sweep.configs[run.name])),
            }
            for run in sweep.runs
        ],
        code=code_version(),
    )


def _set_stale_records_aside(sweep: Sweep, console: Console) -> None:
    for run in sweep.runs:
        run_folder = sweep.run_folder(run)
        reason = run_folder.stale_reason(sweep.configs[run.name])
        if reason:
            aside = run_folder.set_aside()
            console.print(
                f"{run.name}: the existing record is {reason}; it is kept as {aside.name}, and the "
                "run is repeated (artifacts that are still valid are reused)",
                highlight=False,
                markup=False,
            )


def _execute(sweep: Sweep, todo: Sequence[SweepRun], hydra: HydraSetup) -> None:
    """Launch runs until each has finished or failed, here or by another command."""
    launches: Counter[str] = Counter()
    warn_of_shared_gpus(hydra.config.hydra.launcher.get("n_jobs", 1))
    for run in todo:
        sweep.run_folder(run).reset_status()
    while todo:
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra.context, task_function=hydra.task, config=hydra.config
        )
        try:
            launcher.launch([sweep.overrides[run.name] for run in todo], initial_job_idx=0)
        except (RuntimeError, OSError) as error:  # joblib gives up when one process dies
            log.warning("the launcher failed: %s: %s", type(error).__name__, error)
        launches.update(run.name for run in todo)
        for run in _unfinished(sweep, todo):  # no launcher executes them: their processes died
            run_folder = sweep.run_folder(run)
            exhausted = launches[run.name] >= hydra.config.hydra.sweeper.max_attempts
            if exhausted and not run_folder.is_locked():
                run_folder.mark_failed(launches[run.name])
        todo = _unfinished(sweep, todo)
        while todo and all(sweep.run_folder(run).is_locked() for run in todo):
            time.sleep(_POLL_SECONDS)
            todo = _unfinished(sweep, todo)


def _unfinished(sweep: Sweep, runs: Sequence[SweepRun]) -> list[SweepRun]:
    """Return the runs that have neither finished nor failed."""
    refresh_directory(sweep.folder)
    for run in runs:
        refresh_directory(sweep.run_folder(run).path)
    return [
        run for run in runs if sweep.run_folder(run).status().kind not in ("finished", "failed")
    ]
