"""sweep.json against what its command composes here: names, labels, and the config of each run.

A sweep's folder holds both the records and what says which record is which, so the anchor is
outside: the experiment's file and the config groups of this checkout.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from hyperfitting.config import RunConfig, conf_dir, from_hydra, register
from hyperfitting.errors import UserError
from hyperfitting.fields import differing_fields
from hyperfitting.formatting import first_line, listed
from hyperfitting.record.files import RECORD_FILE, read_record
from hyperfitting.runtime.code_version import CodeVersion, code_version
from hyperfitting.sweep.config import SweeperConfig
from hyperfitting.sweep.runs import SweepRun, command_overrides, command_runs, sweep_name
from hyperfitting.sweep.spec import ScaleSpec, SweepSpec
from hyperfitting.verify.check import Check, Outcome

_DESCRIPTION = "description"


def check_description(folder: Path, spec: SweepSpec) -> Iterator[Check]:
    """Yield whether a sweep's description is that of its command, and its records that of both.

    What differs here may be an edit or another version of `conf/` and `experiments/`: it has failed
    where that can be told, else it is not checked.

    Args:
        folder: of the sweep.
        spec: its description.
    """
    register()
    parser = OverridesParser.create()
    try:
        sweeper, scale = _composed_sweeper(spec.command[1:], parser)
        overrides = command_overrides(sweeper, spec.command[1:])
        described = replace(sweeper, **spec.model_dump(include={"axes", "scales"}))
        runs = command_runs(described, scale, overrides, parser)
    except (UserError, HydraException, OmegaConfBaseException, ValueError) as error:
        detail = f"its command cannot be composed here: {first_line(error)}"
        yield Check(_DESCRIPTION, "not checked", detail)
        return
    name = sweeper.name or sweep_name(overrides)
    if detail := _differing_names(spec, name, scale) or _differing_runs(spec, runs):
        yield Check(_DESCRIPTION, "failed", detail)
    elif described != replace(sweeper, scales=_as_recorded(sweeper.scales)):
        yield _mismatch(_DESCRIPTION, spec, "its axes are not those of the experiment here")
    else:
        detail = f"name, runs, labels and axes of {' '.join(spec.command)}"
        yield Check(_DESCRIPTION, "passed", detail)
        yield _check_configs(folder, spec, runs)


def _differing_names(spec: SweepSpec, name: str, scale: str) -> str:
    """Return how the names of a sweep and its scale differ from those of its command; "": equal."""
    if (spec.name, spec.scale) == (name, scale):
        return ""
    return f"{spec.name} at scale={spec.scale}, and its command gives {name} at scale={scale}"


def _differing_runs(spec: SweepSpec, runs: list[SweepRun]) -> str:
    """Return which runs, or labels of theirs, differ from those of the command; "": none."""
    expected = {run.name: dict(run.labels) for run in runs}
    recorded = {run.name: run.labels for run in spec.runs}
    differing = [n for n in expected | recorded if expected.get(n) != recorded.get(n)]
    if not differing:
        return ""
    return f"runs or labels are not those of its command and axes: {listed(differing)}"


def _as_recorded(scales: dict[str, Any]) -> dict[str, Any]:
    """Return scales with the defaults that sweep.json has."""
    return {name: scale and ScaleSpec(**scale).model_dump() for name, scale in scales.items()}


def _mismatch(name: str, spec: SweepSpec, detail: str) -> Check:
    """Return the check of something that differs from what is composed here.

    It has failed if this is the code that began the sweep; else its config may be another version.
    """
    outcome: Outcome = "failed" if _is_this_checkout(spec.code) else "not checked"
    return Check(name, outcome, detail)


def _composed_sweeper(arguments: list[str], parser: OverridesParser) -> tuple[SweeperConfig, str]:
    """Return the sweeper's config of a command, and its scale."""
    parsed = zip(arguments, parser.parse_overrides(arguments), strict=True)
    plain = [argument for argument, override in parsed if not override.is_sweep_override()]
    composed = _composed([a for a in plain if a.startswith("hydra.sweeper.") or not _of_hydra(a)])
    values: Any = OmegaConf.to_container(composed.hydra.sweeper, resolve=True)
    values = json.loads(json.dumps(values))  # labels may be numbers, which are texts in sweep.json
    return SweeperConfig(**values), str(composed.scale)


def _check_configs(folder: Path, spec: SweepSpec, runs: list[SweepRun]) -> Check:
    """Compare each record's config with the one that its labels stand for."""
    name = "configs of the labels"
    try:
        configs = {run.name: _composed_config(run) for run in runs}
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return Check(name, "not checked", f"cannot be composed here: {first_line(error)}")
    n_records, changed = 0, {}
    for run in runs:
        try:
            recorded = read_record(folder / run.name / RECORD_FILE).config
        except UserError:
            continue  # missing, or a failed check of its own
        n_records += 1
        fields = sorted(differing_fields(recorded, configs[run.name]))
        if not fields:
            continue
        changed[run.name] = fields
        for other, config in configs.items():
            if not any(differing_fields(recorded, config)):
                return Check(name, "failed", f"{run.name} has the config of {other}")
    if changed:
        first, fields = next(iter(changed.items()))
        detail = f"{listed(list(changed))} differ from what is composed here ({first}: {fields[0]})"
        return _mismatch(name, spec, detail)
    outcome: Outcome = "passed" if n_records else "not checked"
    return Check(name, outcome, f"{n_records} records have the config of their labels")


def _composed_config(run: SweepRun) -> RunConfig:
    composed = _composed([override for override in run.overrides if not _of_hydra(override)])
    with open_dict(composed):
        del composed["hydra"]
    return from_hydra(composed)


def _composed(overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra.compose("config", overrides=overrides, return_hydra_config=True)


def _of_hydra(override: str) -> bool:
    """Return whether it is of Hydra itself: a launcher, say, or an untrusted search path."""
    return override.lstrip("+~").startswith(("hydra.", "hydra/"))


def _is_this_checkout(code: CodeVersion | None) -> bool:
    """Return whether code was of the commit of this checkout, both without changes."""
    own = code_version().git
    other = code.git if code is not None else None
    return own is not None and own == other and not own.dirty
