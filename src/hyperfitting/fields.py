"""Declaring and checking config fields.

Every field of a config group is declared with `setting`, which states once, at the field, which
artifact's id it enters and which choices read it. `id_config` collects an artifact's settings from
these declarations; `refuse_unused` rejects a field that the chosen option ignores. Nothing here
knows Hydra, torch, or any particular group.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hyperfitting.errors import UserError, no_such

RECORD = "record"
"""Enters no artifact's id, but changes results.json (scores, labels, selections)."""
RUNTIME = "runtime"
"""Where and how fast: enters no id and changes no result."""


def setting(
    default: Any = dataclasses.MISSING,
    *,
    enters: str,
    read_by: tuple[str, ...] = (),
    factory: Callable[[], Any] | Any = dataclasses.MISSING,
) -> Any:
    """Declare a config field.

    Args:
        default: its default value.
        enters: the kind of artifact whose id it enters (and so, through the inputs, the ids of
            everything made from that), or `RECORD`, or `RUNTIME`.
        read_by: the values of the group's choice field (such as `tuning.method`) that read it;
            empty: all of them do.
        factory: makes the default, for mutable ones.
    """
    metadata = {"enters": enters, "read_by": read_by}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def id_config(cfg: Any, kind: str, choice: str | None = None) -> dict[str, Any]:
    """Return the settings of a config group that enter the id of a kind of artifact.

    Args:
        cfg: the group's dataclass.
        kind: of artifact.
        choice: the group's choice field; fields that its value does not read are left out.
    """
    return {
        field.name: as_plain(getattr(cfg, field.name))
        for field in dataclasses.fields(cfg)
        if field.metadata.get("enters") == kind and _is_read(cfg, field, choice)
    }


def _is_read(cfg: Any, field: "dataclasses.Field[Any]", choice: str | None) -> bool:
    readers = field.metadata.get("read_by") or ()
    return not readers or choice is None or getattr(cfg, choice) in readers


def changes_results(schema: Any, name: str) -> bool:
    """Return whether a field can change a number or label of a record."""
    declared = {field.name: field for field in dataclasses.fields(schema)}
    return bool(declared[name].metadata.get("enters") != RUNTIME)


def result_settings(cfg: Any) -> dict[str, Any]:
    """Return the settings that can change a number or label of a record, groups as nested dicts."""
    settings = {}
    for name in (f.name for f in dataclasses.fields(cfg) if changes_results(type(cfg), f.name)):
        value = getattr(cfg, name)
        is_group = dataclasses.is_dataclass(value)
        settings[name] = result_settings(value) if is_group else as_plain(value)
    return settings


def refuse_unused(cfg: Any, at: str, choice: str, allowed: tuple[str, ...] = ()) -> None:
    """Refuse a field that is set although the choice made does not read it.

    Args:
        cfg: the group's dataclass.
        at: name of the group.
        choice: its choice field.
        allowed: fields that may be set all the same, since the config sets them for every choice.

    Raises:
        UserError: there is such a field; the message names the choices that read it.
    """
    for field in dataclasses.fields(cfg):
        unused = not _is_read(cfg, field, choice) and field.name not in allowed
        if unused and getattr(cfg, field.name) != _default(field):
            readers = " or ".join(field.metadata["read_by"])
            raise UserError(
                f"changes nothing with {at}.{choice}={getattr(cfg, choice)}",
                field=f"{at}.{field.name}",
                value=getattr(cfg, field.name),
                valid=f"only with {at}.{choice}={readers}",
            )


def refuse_fields_of(cfg: Any, at: str, kind: str, needed: str, hint: str) -> None:
    """Refuse a field that is set and enters the id of a kind of artifact that is not built.

    Args:
        cfg: the group's dataclass.
        at: name of the group.
        kind: of artifact.
        needed: what is missing for it to be built.
        hint: what to set.

    Raises:
        UserError: there is such a field.
    """
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.metadata.get("enters") == kind and value != _default(field):
            raise UserError(
                f"changes nothing without {needed}",
                field=f"{at}.{field.name}",
                value=value,
                hint=hint,
            )


def differing_fields(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """Yield the dotted names of the fields in which two configs differ, `RUNTIME` ones left out.

    Args:
        old: a config as plain values; a field that it lacks counts as its default, a group
            as the defaults of its class.
        new: the dataclass to compare with.
        at: prefix of the names.
    """
    known = {field.name: field for field in dataclasses.fields(new)}
    yield from (f"{at}{name}" for name in old if name not in known)
    for name, field in known.items():
        if field.metadata.get("enters") == RUNTIME:
            continue
        after = getattr(new, name)
        before = old.get(name, {} if dataclasses.is_dataclass(after) else _default(field))
        if dataclasses.is_dataclass(after) and isinstance(before, dict):
            yield from differing_fields(before, after, f"{at}{name}.")
        elif _holds_configs(after) and isinstance(before, dict) and before.keys() == after.keys():
            for key, part in after.items():
                yield from differing_fields(before[key], part, f"{at}{name}.{key}.")
        elif as_plain(before) != as_plain(after):
            yield f"{at}{name}"


def _holds_configs(value: Any) -> bool:
    return isinstance(value, dict) and all(map(dataclasses.is_dataclass, value.values()))


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def as_plain(value: Any) -> Any:
    """Return a config value as JSON holds it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: as_plain(item) for name, item in value.items()}
    return value


def one_of(name: str, value: str, options: Iterable[str]) -> None:
    """Refuse a value that is not one of the options."""
    options = tuple(options)
    if value not in options:
        raise no_such("choice", name, value, options)


def at_least(name: str, value: float | None, low: float) -> None:
    """Refuse a number that is below ``low`` or not finite; none is accepted."""
    if value is not None and not (math.isfinite(value) and value >= low):
        raise UserError("out of range", field=name, value=value, valid=f"{low} or more")


def above_zero(name: str, value: float | None) -> None:
    """Refuse a number that is not positive and finite; none is accepted."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UserError("out of range", field=name, value=value, valid="a number above 0")


def in_range(name: str, value: float, low: float, high: float, low_included: bool = True) -> None:
    """Refuse a number outside [low, high], or (low, high] without ``low_included``."""
    if not ((low <= value if low_included else low < value) and value <= high):
        above = f"{low} or more" if low_included else f"above {low}"
        raise UserError("out of range", field=name, value=value, valid=f"{above}, at most {high}")


def fraction(name: str, value: float) -> None:
    """Refuse a number that is not strictly between 0 and 1."""
    if not 0 < value < 1:
        raise UserError("out of range", field=name, value=value, valid="above 0 and below 1")


def required(name: str, value: Any, why: str, hint: str) -> None:
    """Refuse a missing value."""
    if value in (None, ""):
        raise UserError(f"is needed: {why}", field=name, value=value, hint=hint)
