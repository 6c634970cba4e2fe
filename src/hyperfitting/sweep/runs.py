"""The runs of a sweep: the product of its axes.

An axis is a list of named options, and an option is a list of overrides. One axis with many options
is an explicit list of runs, an option with several overrides varies them together, and several axes
are a grid:

    axes:
      model:                            # explicit, with labels for a table
        base, greedy: [tuning=none]
        tuned, greedy: []
      seed: [0, 1, 2]                   # short for seed=0, seed=1, seed=2
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from hyperfitting.config import DEFAULT_SCALE, RunConfig
from hyperfitting.config_errors import quote
from hyperfitting.errors import UserError, no_such
from hyperfitting.fields import changes_results
from hyperfitting.store.hashing import digest
from hyperfitting.sweep.config import SweeperConfig

_MAX_NAME = 100
"""Characters of a run's name, so that it fits into a path."""


@dataclass(frozen=True)
class Axis:
    """One thing that varies between the runs."""

    name: str
    options: Mapping[str, tuple[str, ...]]
    """The overrides of each option, by label."""
    explicit: bool
    """Whether the labels are given; else they are values of the config field ``name``."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    """Built from its labels; also the name of its folder."""
    labels: Mapping[str, str]
    """The label of its option, by axis."""
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Scale:
    """What an experiment adds at one scale."""

    base_overrides: Sequence[str] = ()
    axes: Mapping[str, Any] = field(default_factory=dict)


def parse_axes(axes: Mapping[str, Any]) -> list[Axis]:
    """Return the axes of a sweeper's config.

    Raises:
        UserError: an axis has no options, or options that are not lists of overrides.
    """
    return [_parse_axis(str(name), options) for name, options in axes.items()]


def _parse_axis(name: str, options: Any) -> Axis:
    at = f"hydra.sweeper.axes.{name}"
    if options is not None and not isinstance(options, list | tuple | Mapping):
        raise UserError(
            "is neither a list of values nor options with their overrides",
            field=at,
            value=options,
            hint="[0, 1, 2]",
        )
    if not options:
        raise UserError("an axis without options", field=at, value=options, hint="[0, 1, 2]")
    if not isinstance(options, Mapping):
        texts = {_label(value): (f"{name}={_override_text(value)}",) for value in options}
        return Axis(name, texts, explicit=False)
    parsed = {}
    for label, overrides in options.items():
        is_list = overrides is None or isinstance(overrides, list | tuple)
        if not is_list or not all(isinstance(override, str) for override in overrides or ()):
            raise UserError(
                "is not a list of overrides",
                field=f"{at}.{label}",
                value=overrides,
                valid="such as [tuning=none, decode=top_p]",
            )
        parsed[str(label)] = tuple(overrides or ())
    return Axis(name, parsed, explicit=True)


def _label(value: Any) -> str:
    return "null" if value is None else str(value)


def _override_text(value: Any) -> str:
    """Return a value of YAML in Hydra's grammar of overrides."""
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, list):
        return f"[{','.join(map(_override_text, value))}]"
    return _label(value)


def command_overrides(sweeper: SweeperConfig, arguments: Sequence[str]) -> list[str]:
    """Return those of `hydra.sweeper.params`, and those of a command, which replace them."""
    keys = {argument.lstrip("+").partition("=")[0] for argument in arguments}
    params = [f"{key}={value}" for key, value in sweeper.params.items() if key not in keys]
    return [*params, *arguments]


def command_runs(
    sweeper: SweeperConfig, scale_name: str, overrides: Sequence[str], parser: OverridesParser
) -> list[SweepRun]:
    """Return all runs of a sweep.

    Args:
        sweeper: its base overrides, axes and scales.
        scale_name: the scale.
        overrides: of the command (`command_overrides`).
        parser: of Hydra's override grammar.

    Raises:
        UserError: there is no such scale, or an axis or override is invalid.
    """
    scale = choose_scale(sweeper.scales, scale_name)
    axes = {k: v for k, v in sweeper.axes.items() if k not in scale.axes}
    return expand_runs(
        [*sweeper.base_overrides, *scale.base_overrides],
        parse_axes({**scale.axes, **axes}),
        [override for override in overrides if not override.startswith("plan=")],
        parser,
    )


def expand_runs(
    base_overrides: Sequence[str],
    axes: Sequence[Axis],
    command_overrides: Sequence[str],
    parser: OverridesParser,
) -> list[SweepRun]:
    """Return all runs, in the order of the axes.

    Args:
        base_overrides: overrides of every run, which those of the command replace.
        axes: what varies.
        command_overrides: overrides of the command; one with several values, such as ``seed=0,1``,
            is an axis, and replaces the experiment's axis of that name.
        parser: of Hydra's override grammar.

    Raises:
        UserError: the command overrides what an axis of the experiment sets.
    """
    common: list[Override] = []
    axis_of = {axis.name: axis for axis in axes}
    for override in parser.parse_overrides(list(command_overrides)):
        key = _key(override)
        _refuse_axis_override(key, override, axis_of.values(), parser)
        if override.is_sweep_override():
            given = override.get_key_element()
            options = {text: (f"{given}={text}",) for text in override.sweep_string_iterator()}
            axis_of[key] = Axis(key, options, explicit=False)
            continue
        axis_of.pop(key, None)
        common.append(override)
    base = _by_key([*parser.parse_overrides(list(base_overrides)), *common])
    runs = []
    for chosen in itertools.product(*(axis.options for axis in axis_of.values())):
        labels = dict(zip(axis_of, chosen, strict=True))
        varied = [o for axis, label in labels.items() for o in axis_of[axis].options[label]]
        overrides = base | _by_key(parser.parse_overrides(varied))
        name = "_".join(_name_part(axis_of[axis], label) for axis, label in labels.items())
        runs.append(SweepRun(_shorten(name or "only"), labels, tuple(overrides.values())))
    return _with_distinct_names(runs)


def _key(override: Override) -> str:
    """Return the field or group that an override is of, without `+`, `++` or `~`."""
    package = "" if override.package is None else f"@{override.package}"
    return f"{override.key_or_group}{package}"


def _by_key(overrides: Sequence[Override]) -> dict[str, str]:
    """Return the last override of each key: Hydra refuses a group that is given twice."""
    return {override.get_key_element(): str(override.input_line) for override in overrides}


def _refuse_axis_override(
    key: str, override: Override, axes: Iterable[Axis], parser: OverridesParser
) -> None:
    for axis in axes:
        if not axis.explicit:
            continue
        for label, option in axis.options.items():
            if key in map(_key, parser.parse_overrides(list(option))):
                raise UserError(
                    f"the experiment sets this: its axis '{axis.name}' varies it "
                    f"(option '{label}')",
                    field=key,
                    value=override.get_value_element_as_str(),
                    valid="any field that no axis sets",
                    hint="leave it out, or run without experiment=…",
                )


def _name_part(axis: Axis, label: str) -> str:
    """Return the part of a run's name that one axis contributes."""
    text = label if axis.explicit else f"{axis.name.rpartition('.')[2]}={label}"
    return re.sub(r"[^\w=.+-]+", "-", text).strip("-.") or "none"


def _shorten(name: str) -> str:
    return name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}-{digest(name)[:6]}"


def _with_distinct_names(runs: Sequence[SweepRun]) -> list[SweepRun]:
    """Return the runs, with a digest of the overrides in names that would coincide."""
    names = [run.name.lower() for run in runs]  # a file system may ignore case
    return [
        run
        if names.count(run.name.lower()) == 1
        else replace(run, name=f"{run.name}-{digest(run.overrides)[:6]}")
        for run in runs
    ]


def check_distinct(configs: Mapping[str, RunConfig]) -> None:
    """Refuse runs with the same config: means over runs would count one run twice.

    Args:
        configs: by name of the run.

    Raises:
        UserError: two are equal.
    """
    for (name, config), (other, same) in itertools.combinations(configs.items(), 2):
        if config == same:
            raise UserError(
                f"two runs have the same config: {name}, {other}",
                hint="other values, such as seed=0,10,20 where an axis of the experiment sets "
                "seeds from 0 to 3",
            )


def sweep_name(overrides: Sequence[str]) -> str:
    """Return the name of a sweep without an experiment: the overrides that determine its runs."""
    relevant = sorted(override for override in overrides if _determines_runs(override))
    return _shorten(re.sub(r"[^\w=.,+-]+", "-", "_".join(relevant)) or "sweep")


def _determines_runs(override: str) -> bool:
    """Return whether an override selects or changes runs, rather than where or how fast they go."""
    key = override.lstrip("+~").partition("=")[0]
    name = re.split(r"[./@]", key)[0]
    if name == "scale":  # changes no run by itself, but selects base_overrides and axes
        return True
    if name in RunConfig.__dataclass_fields__:
        return changes_results(RunConfig, name)
    return name != "hydra"


def choose_scale(scales: Mapping[str, Any], scale: str) -> Scale:
    """Return what an experiment adds at a scale.

    Raises:
        UserError: it has no such scale, or there is no experiment and ``scale`` is not the default.
    """
    if not scales:
        if scale != DEFAULT_SCALE:
            raise UserError(
                "changes nothing without an experiment",
                field="scale",
                value=scale,
                hint="experiment=table1, or preset=paper for the paper's protocol",
            )
        return Scale()
    if scale not in scales:
        raise no_such("scale", "scale", scale, scales)
    chosen = scales[scale] or {}
    return Scale(chosen.get("base_overrides") or (), chosen.get("axes") or {})
