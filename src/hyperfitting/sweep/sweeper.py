"""A sweep from its axes to its report: it goes on where it stopped, whatever stopped it.

The same command finds the same folder. Members that have finished are left alone, the others run,
those that another launcher of the same sweep runs at the moment are waited for.
"""

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from hydra_plugins.hyperfitting_members import Hydra, MembersConf
from hyperfitting import failures
from hyperfitting.config import RunConfig, from_hydra
from hyperfitting.errors import UserError
from hyperfitting.store import look_anew, write_json
from hyperfitting.sweep import view, workers
from hyperfitting.sweep.members import Member, axes_of, choose_scale, members, sweep_name
from hyperfitting.sweep.state import SPEC, SPEC_VERSION, Folder

log = logging.getLogger(__name__)

_LOOK = 1.0
"""Seconds between two looks at members that another launcher runs."""


@dataclass(frozen=True)
class Sweep:
    """All members of a sweep, composed and checked."""

    folder: Path
    members: list[Member]
    configs: Mapping[str, RunConfig]
    overrides: Mapping[str, list[str]]
    """By member, what makes its config, its folder included."""

    def place(self, member: Member) -> Folder:
        """Return a member's folder."""
        return Folder(self.folder / member.name)

    def finished(self) -> frozenset[str]:
        """Return the members whose record is there, and of their config."""
        return frozenset(
            m.name for m in self.members if self.place(m).is_finished(self.configs[m.name])
        )

    def failed(self) -> dict[str, str]:
        """Return why members have failed, by name."""
        states = {m.name: self.place(m).status() for m in self.members}
        return {name: s.reason for name, s in states.items() if s.kind == "failed"}


def sweep(spec: MembersConf, hydra: Hydra, arguments: list[str]) -> None:
    """Run a sweep, or only plan it.

    Args:
        spec: which members there are.
        hydra: what it gave the sweeper.
        arguments: the command's overrides.

    Raises:
        Told: members failed; the user has been told which, and why.
        UserError: something in the sweep itself is wrong; nothing has begun.
    """
    console = Console() if sys.stdout.isatty() else Console(width=110)
    config = hydra.config
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "torchrun starts processes for one member, and this is a sweep",
            hint="without torchrun: hardware=fsdp uses all GPUs of a machine for each member, and "
            "hydra/launcher=slurm gives each member a machine",
        )
    whole = _composed(spec, hydra, arguments)
    finished = whole.finished()
    if config.plan:
        from hyperfitting.sweep import plan

        count = config.hydra.launcher.get("workers", 1)
        plan.show(plan.Plan.of(whole.configs, finished, count), console)
        return
    whole.folder.mkdir(parents=True, exist_ok=True)
    write_json(whole.folder / SPEC, _described(spec, config, arguments, whole))
    _set_outdated_aside(whole, console)
    failed = {} if spec.retry_failed else whole.failed()
    todo = [m for m in whole.members if m.name not in finished and m.name not in failed]
    if config.hydra.launcher.get("workers", 1) > 1:
        todo = _spread(todo, whole.configs)
    with view.shown(console, whole.folder, whole.members, whole.configs, todo):
        _run_all(whole, todo, hydra)
    failed = whole.failed()
    console.print(view.summary(whole.folder, whole.members))
    _report(whole, console, anew=bool(todo))
    if failed:
        lines = [f"{len(whole.finished())} members finished, {len(failed)} failed:"]
        for name, reason in failed.items():
            log_file = whole.folder / name / "hyperfit.log"
            lines.append(f"- {name}: {reason.partition(chr(10))[0]}  (log: {log_file})")
        failures.tell("\n".join(lines))
        raise failures.Told(f"{len(failed)} of {len(whole.members)} members failed")


def _composed(spec: MembersConf, hydra: Hydra, arguments: Sequence[str]) -> Sweep:
    """Return the sweep of a command, every member composed and checked before any begins."""
    config = hydra.config
    scale = choose_scale(spec.scales, config.scale)
    parser = OverridesParser.create(config_loader=hydra.context.config_loader)
    params = {k: v for k, v in spec.params.items() if not _given(k, arguments)}
    given = [a for a in arguments if not a.startswith("plan=")]
    found = members(
        [*spec.always, *scale.always],
        axes_of({**scale.axes, **{k: v for k, v in spec.axes.items() if k not in scale.axes}}),
        [*(f"{key}={value}" for key, value in params.items()), *given],
        parser,
    )
    with open_dict(config):
        name = spec.name or sweep_name([*(f"{k}={v}" for k, v in params.items()), *arguments])
        config.hydra.sweeper.name = name
    folder = Path(config.hydra.sweep.dir).absolute()
    overrides = {
        member.name: [
            *member.overrides,
            f"hydra.sweep.dir={_quoted(str(folder))}",
            f"hydra.sweep.subdir={_quoted(member.name)}",
        ]
        for member in found
    }
    configs = {}
    for number, member in enumerate(found):
        loaded = workers.load(hydra, number, overrides[member.name])
        with open_dict(loaded):
            del loaded["hydra"]
        try:
            configs[member.name] = from_hydra(loaded)
        except UserError as error:
            raise error.of(f"member {member.name}") from error
    return Sweep(folder, found, configs, overrides)


def _spread(todo: Sequence[Member], configs: Mapping[str, RunConfig]) -> list[Member]:
    """Return members so that those at work at once train something else, as far as can be.

    Else one would train, and the others wait for what it trains.
    """
    seen: Counter[str] = Counter()
    turns = []
    for member in todo:
        cfg = configs[member.name]
        parts = (cfg.model, cfg.dataset, cfg.optimizer, cfg.tuning, cfg.trainer)
        key = repr((*parts, cfg.evaluation.share))
        turns.append(seen[key])
        seen[key] += 1
    return [member for _, member in sorted(zip(turns, todo, strict=True), key=lambda one: one[0])]


def _given(key: str, arguments: Sequence[str]) -> bool:
    return any(a.lstrip("+").partition("=")[0] == key for a in arguments)


def _quoted(text: str) -> str:
    """Return a text as Hydra's override grammar takes it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _described(
    spec: MembersConf, config: DictConfig, arguments: Sequence[str], whole: Sweep
) -> dict[str, Any]:
    """Return what a report needs to know of a sweep."""
    return {
        "version": SPEC_VERSION,
        "name": whole.folder.name,
        "scale": config.scale,
        "command": ["hyperfit", *arguments],
        "scales": OmegaConf.to_container(OmegaConf.create(spec.scales)),
        "axes": OmegaConf.to_container(OmegaConf.create(spec.axes)),
        "report": OmegaConf.to_container(OmegaConf.create(spec.report)),
        "members": [{"name": m.name, "labels": dict(m.labels)} for m in whole.members],
    }


def _set_outdated_aside(whole: Sweep, console: Console) -> None:
    for member in whole.members:
        place = whole.place(member)
        why = place.outdated(whole.configs[member.name])
        if why:
            aside = place.set_aside()
            console.print(
                f"{member.name}: the record there is {why}; it is kept as {aside.name}, and the "
                "member runs again (what it can still use is not made again)",
                highlight=False,
                markup=False,
            )


def _run_all(whole: Sweep, todo: Sequence[Member], hydra: Hydra) -> None:
    """Run members until each has finished or failed, by us or by another launcher."""
    launched: Counter[str] = Counter()

    def unfinished(of: Sequence[Member]) -> list[Member]:
        look_anew(whole.folder)
        for member in of:
            look_anew(whole.place(member).path)
        return [m for m in of if whole.place(m).status().kind not in ("finished", "failed")]

    while todo:
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra.context, task_function=hydra.task, config=hydra.config
        )
        try:
            launcher.launch([whole.overrides[m.name] for m in todo], initial_job_idx=0)
        except (RuntimeError, OSError) as error:  # of an engine that gives up when one member dies
            log.warning("the launcher has ended: %s: %s", type(error).__name__, error)
        launched.update(m.name for m in todo)
        todo = unfinished(todo)
        for member in todo:  # the launcher has ended, and they have not: their processes died
            place = whole.place(member)
            if launched[member.name] >= hydra.config.hydra.sweeper.attempts and not place.is_held():
                place.give_up(launched[member.name])
        todo = unfinished(todo)
        while todo and all(whole.place(m).is_held() for m in todo):
            time.sleep(_LOOK)
            todo = unfinished(todo)


def _report(whole: Sweep, console: Console, anew: bool) -> None:
    """Draw the tables and figures of what is there; on W&B too, if anything is new."""
    from hyperfitting.reporting import report
    from hyperfitting.reporting.sweeps import SweepRecords
    from hyperfitting.tracking import Identity, tracked

    if not any(whole.place(m).record.is_file() for m in whole.members):
        return
    written = report.write(whole.folder)
    console.print(f"report     {written}", highlight=False, soft_wrap=True)
    config = next(iter(whole.configs.values()))
    if anew and config.tracking.mode != "disabled":
        name = whole.folder.name
        who = Identity(f"{name} report", whole.folder, config, sweep=name, job_type="report")
        with tracked(who) as tracker:
            tracker.report(SweepRecords.of(whole.folder), written)
