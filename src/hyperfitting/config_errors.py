"""What a mistake in the config looks like: errors of Hydra and OmegaConf, for the user."""

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hyperfitting.errors import UserError, near_matches, no_such

_AMBIGUOUS = re.compile("Ambiguous value for argument '(.*)'")
_FIELD = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@:-]*", re.ASCII)
_QUOTES = "\"'"
_GROUPS_WITHOUT_FIELDS = ["preset", "experiment"]
"""Config groups that only set fields of others."""
_OTHER_NAMES = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "max_length": "seq_len",
    "max_seq_length": "seq_len",
}
"""What other frameworks call some fields, such as the Trainer of transformers."""


def _explain_override(override: str, problem: str) -> str:
    """Return the message of an override that Hydra's grammar does not accept, with it quoted."""
    name, _, value = override.partition("=")
    valid = "FIELD=VALUE; a VALUE with any of = , ; # ( ) { } [ ] or non-ASCII letters in quotes"
    hint = ""
    if value and _FIELD.fullmatch(name):
        hint = shlex.quote(f"{name}={quote(value.strip(_QUOTES))}")
    return str(UserError(f"{override}: {problem}", valid=valid, hint=hint))


def _explain_several_values(override: str) -> str:
    """Return the message of values with commas between them, without `-m`."""
    if re.search(r",\s", override):  # a sentence, or the name of a file
        return _explain_override(override, "is parsed as several values of a multirun")
    problem = f"{override}: several values without -m"
    return str(UserError(problem, hint=f"-m {override}"))


def quote(text: str) -> str:
    """Return a text as a quoted value in Hydra's grammar of overrides."""
    # backslashes are escapes only where they precede a quote
    escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + (m[2] and "\\" + m[2]), text)
    return f'"{escaped}"'


def _no_such_field(field: str, name: str, parent: Any) -> UserError:
    """Return the error of a field that the config does not have, with those that may be meant.

    Args:
        field: its dotted path.
        name: the last part of it.
        parent: config node that it would be a field of.
    """
    options = [str(key) for key in parent]
    if field == name:
        options += _GROUPS_WITHOUT_FIELDS
    root: Any = OmegaConf.to_container(parent._get_root())
    wanted = _OTHER_NAMES.get(name, name)
    elsewhere = [path for path in _field_paths(root) if path.split(".")[-1] == wanted]
    hint = f"did you mean {' or '.join(elsewhere[:3])}?" if elsewhere else ""
    return UserError(
        "no such field",
        field=field,
        value="…",
        valid=", ".join(options),
        hint=hint or near_matches(name, options),
    )


def _field_paths(config: Mapping[str, Any], group: str = "") -> Iterator[str]:
    """Yield the dotted path of every field of a config, without those of Hydra."""
    for name, value in config.items():
        if isinstance(value, Mapping) and name != "hydra":
            yield from _field_paths(value, f"{group}{name}.")
        else:
            yield f"{group}{name}"


def explain_config(error: BaseException) -> str:
    """Return Hydra's message, with near matches for an option or field that does not exist."""
    if isinstance(error, OverrideParseException):
        return _explain_override(str(error.override), "cannot be read as FIELD=VALUE")
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return str(no_such("option", group, option, error.options))
    if ambiguous := _AMBIGUOUS.match(str(error)):
        return _explain_several_values(ambiguous[1])
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        return _explain_field(cause)
    return "\n  ".join(text for text in str(error).splitlines() if text.strip())


def _explain_field(error: OmegaConfBaseException) -> str:
    """Return the message of a field that does not exist, or does not take its value."""
    parent, name = error.parent_node, str(error.key)
    if parent is not None and hasattr(parent, "keys") and name not in list(parent.keys()):
        return str(_no_such_field(error.full_key or name, name, parent))
    if "is not a ListConfig" in str(error) and error.full_key:
        hint = shlex.quote(f"{error.full_key}=[VALUE]")
        return str(UserError(f"{error.full_key} is a list", hint=f"{hint}, in brackets"))
    return f"{error.full_key}: {str(error).splitlines()[0]}"
