"""The page docs/config.md: every config field, from the dataclasses that declare it."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
from collections.abc import Iterator
from typing import Any, cast, get_args, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf

from hyperfitting.config import RunConfig, conf_dir
from hyperfitting.data.config import TextsConfig
from hyperfitting.fields import RECORD, RUNTIME
from hyperfitting.reporting.tables import markdown_cell
from hyperfitting.sweep.config import RayConfig, SlurmConfig, SweeperConfig, WorkersConfig

_LAUNCHERS = {"workers": WorkersConfig, "slurm": SlurmConfig, "ray": RayConfig}

_INTRO = """\
# Config fields

Every field of a config, with its type, its default and what it determines. `GROUP.FIELD=VALUE`
overrides one ([usage](usage.md#config-groups)). The defaults here are those of the code: the
paper's, where there is one. A group's option ([`conf/`](../conf)) and `preset` change some of them:
`hyperfit --cfg job` prints the values of a command.

*Determines*: the kind of [artifact](usage.md#the-artifact-store) whose id the field enters, so that
with another value it is built again, and all that is made from it; `record`: only `results.json`;
`-`: no result (where and how fast). A field that is only for some choices of its group is an error
with the others. `evaluation.datasets.NAME` and `intervention.dataset` have the fields of `dataset`
that say which documents.
"""

_OPTIMIZERS = """\
Options that set the class (`_target_`) and its keyword arguments: `optimizer.lr=1e-5` overrides
one, and `+optimizer.NAME=VALUE` adds one that the class has. They determine `tuned`."""


def config_page() -> str:
    """Return docs/config.md, without the remark that it is generated."""
    groups = {name: hint for name, hint in get_type_hints(RunConfig).items() if _group_of(hint)}
    sections = [_section("Top level", RunConfig), _optimizers()]
    for name, group in groups.items():
        sections.append(_section(f"`{name}`", group))
        parts = {part: _group_of(hint) for part, hint in get_type_hints(group).items()}
        sections += [
            _section(f"`{name}.{part}`", part_group)
            for part, part_group in parts.items()
            if part_group not in (None, TextsConfig)  # whose fields are those of `dataset`
        ]
    sections.append(_section("`hydra.sweeper`", SweeperConfig))
    sections += [
        _section(f"`hydra.launcher`, with `hydra/launcher={name}`", launcher)
        for name, launcher in _LAUNCHERS.items()
    ]
    return "\n".join([_INTRO, *sections])


def _optimizers() -> str:
    """Return a table of the keyword arguments that each option of the group `optimizer` sets."""
    options: dict[str, dict[str, Any]] = {
        path.stem: cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path)))
        for path in sorted((conf_dir() / "optimizer").glob("*.yaml"))
    }
    arguments = dict.fromkeys(name for values in options.values() for name in values)
    lines = ["## `optimizer`", "", _OPTIMIZERS, ""]
    lines += ["| field | " + " | ".join(f"`optimizer={name}`" for name in options) + " |"]
    lines += ["|---|" + "---|" * len(options)]
    for name in arguments:
        cells = (
            f"`{_yaml(values[name])}`" if name in values else "-" for values in options.values()
        )
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _group_of(hint: Any) -> Any:
    """Return the dataclass in a type such as ``ImageConfig | None``, if there is one."""
    parts = (part for part in (hint, *get_args(hint)) if isinstance(part, type))
    return next(filter(dataclasses.is_dataclass, parts), None)


def _section(title: str, group: Any) -> str:
    """Return the table of a group's fields; those that are groups have sections of their own."""
    hints, described = get_type_hints(group), dict(_descriptions(group))
    summary = " ".join((group.__doc__ or "").split("\n\n")[0].split())
    lines = [f"## {title}", "", summary[0].upper() + summary[1:], ""]
    lines += ["| field | type | default | determines | description |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(group):
        hint = hints[field.name]
        if field.name == "_target_" or hint is _group_of(hint):
            continue
        enters = field.metadata.get("enters", RUNTIME)
        if _group_of(hint):
            enters = RUNTIME  # its own fields determine something
        cells = (
            f"`{field.name}`", _type(hint), _default(field),
            {RUNTIME: "-", RECORD: "record"}.get(enters, f"`{enters}`"),
            described.get(field.name, "") + _readers(field),
        )  # fmt: skip
        lines.append("| " + " | ".join(map(markdown_cell, cells)) + " |")
    return "\n".join([*lines, ""])


def _descriptions(group: type) -> Iterator[tuple[str, str]]:
    """Yield the string that follows each field in the source of a class and of its bases."""
    for base in reversed(group.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        for member, following in itertools.pairwise(cast(ast.ClassDef, body).body):
            match member, following:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    yield name, " ".join(text.split())


def _readers(field: "dataclasses.Field[Any]") -> str:
    readers = field.metadata.get("read_by", ())
    return f" (Only with {', '.join(f'`{reader}`' for reader in readers)}.)" if readers else ""


def _default(field: "dataclasses.Field[Any]") -> str:
    """Return a default as YAML writes it."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return f"`{value}`"
    if field.default is dataclasses.MISSING or field.default == MISSING:
        return ""
    if field.default is None or isinstance(field.default, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[field.default]
    return f"`{field.default}`" if field.default != "" else "empty"


def _type(hint: Any) -> str:
    """Return a type as YAML has it."""
    if get_origin(hint) is types.UnionType:
        return " or ".join(map(_type, get_args(hint)))
    if get_origin(hint) is list:
        return f"list of {_type(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "mapping"
    names = {
        str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null",
    }  # fmt: skip
    return names.get(hint, "mapping")
