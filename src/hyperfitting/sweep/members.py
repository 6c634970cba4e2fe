"""The members of a sweep: a product of axes, each a list of named options.

An option is a few overrides. So one axis with many options is an explicit list of members, one
option with several overrides is what others call zipped, and several axes are a grid:

    axes:
      writer:                                  # explicit, in words that a table can use
        original, greedy: [tuning=none]
        hyperfitted, greedy: []
      seed: [0, 1, 2]                          # short for seed=0, seed=1, seed=2
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from hyperfitting.config import DEFAULT_SCALE
from hyperfitting.errors import UserError, near_matches
from hyperfitting.store import digest

_LONGEST_NAME = 100
_NOT_PART = ("plan", "hydra.", "tracking", "hardware")
"""Overrides that say nothing about which sweep it is."""


@dataclass(frozen=True)
class Axis:
    """One thing that varies."""

    name: str
    options: Mapping[str, tuple[str, ...]]
    """By label, the overrides that make it."""
    explicit: bool
    """Whether the labels were given; else they are values of the config field ``name``."""


@dataclass(frozen=True)
class Member:
    """One member of a sweep."""

    name: str
    """Says what differs; also its folder's name."""
    labels: Mapping[str, str]
    """By axis the label of its option."""
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Scale:
    """What an experiment does at one scale."""

    always: Sequence[str] = ()
    axes: Mapping[str, Any] = field(default_factory=dict)


def axes_of(given: Mapping[str, Any]) -> list[Axis]:
    """Return the axes that a config describes.

    Raises:
        UserError: an axis has no options, or options that are not lists of overrides.
    """
    return [_axis(str(name), options) for name, options in given.items()]


def _axis(name: str, options: Any) -> Axis:
    at = f"hydra.sweeper.axes.{name}"
    if not options:
        raise UserError("an axis without options", field=at, value=options, hint="[0, 1, 2]")
    if not isinstance(options, Mapping):
        values = [str(value) for value in options]
        return Axis(name, {value: (f"{name}={value}",) for value in values}, explicit=False)
    found = {}
    for label, overrides in options.items():
        if isinstance(overrides, str) or not all(isinstance(o, str) for o in overrides or ()):
            raise UserError(
                "is not a list of overrides",
                field=f"{at}.{label}",
                value=overrides,
                valid="such as [tuning=none, decode=top_p]",
            )
        found[str(label)] = tuple(overrides or ())
    return Axis(name, found, explicit=True)


def members(
    always: Sequence[str], axes: Sequence[Axis], given: Sequence[str], parser: OverridesParser
) -> list[Member]:
    """Return all members, in the order of the axes.

    Args:
        always: overrides of every member, which the user's may change.
        axes: what varies.
        given: the user's overrides; one with several values, such as ``seed=0,1``, is an axis, and
            takes the place of the experiment's own of that name.
        parser: of Hydra's override grammar.

    Raises:
        UserError: the user overrides what the experiment fixes.
    """
    for_all: list[Override] = []
    all_axes = {axis.name: axis for axis in axes}
    for override in parser.parse_overrides(list(given)):
        key = override.get_key_element()
        _check_free(key, override, all_axes.values(), parser)
        if override.is_sweep_override():
            values = [str(value) for value in override.sweep_string_iterator()]
            all_axes[key] = Axis(key, {v: (f"{key}={v}",) for v in values}, explicit=False)
            continue
        all_axes.pop(key, None)
        for_all.append(override)
    base = _by_key([*parser.parse_overrides(list(always)), *for_all])
    found = []
    for chosen in itertools.product(*(axis.options for axis in all_axes.values())):
        labels = dict(zip(all_axes, chosen, strict=True))
        own = [o for name, label in labels.items() for o in all_axes[name].options[label]]
        overrides = base | _by_key(parser.parse_overrides(own))
        name = "_".join(_part(all_axes[axis], label) for axis, label in labels.items())
        found.append(Member(_short(name or "only"), labels, tuple(overrides.values())))
    return _distinct(found)


def _by_key(overrides: Sequence[Override]) -> dict[str, str]:
    """Return the last override of each key: Hydra takes no group twice."""
    return {override.get_key_element(): str(override.input_line) for override in overrides}


def _check_free(key: str, given: Override, axes: Any, parser: OverridesParser) -> None:
    for axis in axes:
        if not axis.explicit:
            continue
        for label, option in axis.options.items():
            if key in _by_key(parser.parse_overrides(list(option))):
                raise UserError(
                    f"the experiment fixes this: it is what its axis '{axis.name}' varies "
                    f"(option '{label}')",
                    field=key,
                    value=given.get_value_element_as_str(),
                    valid="everything that no axis sets",
                    hint="leave it out, or run without experiment=…",
                )


def _part(axis: Axis, label: str) -> str:
    """Return the part of a member's name that one axis gives."""
    text = label if axis.explicit else f"{axis.name.rpartition('.')[2]}={label}"
    return re.sub(r"[^\w=.+-]+", "-", text).strip("-.") or "none"


def _short(name: str) -> str:
    """Return a name that fits into a path."""
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}-{digest(name)[:6]}"


def _distinct(found: list[Member]) -> list[Member]:
    """Return the members with the overrides' digest in names that would be the same."""
    names = [member.name.lower() for member in found]
    return [
        member
        if names.count(member.name.lower()) == 1
        else Member(
            f"{member.name}-{digest(member.overrides)[:6]}", member.labels, member.overrides
        )
        for member in found
    ]


def sweep_name(given: Sequence[str]) -> str:
    """Return the folder's name of a sweep without an experiment: the overrides that make it."""
    kept = sorted(o for o in given if not o.lstrip("+~").startswith(_NOT_PART))
    return _short(re.sub(r"[^\w=.,+-]+", "-", "_".join(kept)) or "sweep")


def choose_scale(scales: Mapping[str, Any], scale: str) -> Scale:
    """Return what an experiment does at a scale.

    Raises:
        UserError: it has no such scale, or there is no experiment and another than the default.
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
        raise UserError(
            "no such scale",
            field="scale",
            value=scale,
            valid=", ".join(scales),
            hint=near_matches(scale, scales),
        )
    chosen = scales[scale] or {}
    return Scale(chosen.get("always") or (), chosen.get("axes") or {})
