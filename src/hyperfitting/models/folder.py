"""Folders in Hugging Face format, checked before anything of the size of a model is built.

A folder may come from anywhere: its code is never run, and what its config.json claims is compared
with the header of its weights.
"""

import json
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from hyperfitting.errors import UserError, near_matches
from hyperfitting.formatting import first_line

FORMAT = "a folder in Hugging Face format (config.json, *.safetensors, tokenizer files)"
_DECODER = "a decoder-only model that transformers knows without remote code"


def check_folder(folder: Path) -> None:
    """Refuse a path that is no folder with a config.json.

    Raises:
        UserError: it is not.
    """
    hint = "save a model there with save_pretrained(DIR), or name the Hub id with model=… "
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint = near_matches(folder.name, siblings) or hint
        raise _error(folder, "is not a folder", FORMAT, hint)
    if not (folder / "config.json").is_file():
        raise _error(folder, "is not a model: it holds no config.json", FORMAT, hint)


def load_config(folder: Path) -> Any:
    """Return the transformers config of a local model folder.

    Raises:
        UserError: transformers does not support it without remote code, or config.json is invalid
            or does not describe the weights beside it.
    """
    _check_model_type(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        message = " ".join(str(error).split("\n", 2)[:2]) or first_line(error)
        raise _error(folder, f"its config.json cannot be used: {message}", _DECODER) from error
    _check_n_blocks(folder, config)
    return config


def _check_model_type(folder: Path) -> None:
    """Refuse a config.json whose model type only code from elsewhere could build.

    transformers would ask on the terminal whether to run that code.
    """
    try:
        fields = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        problem = f"its config.json cannot be used: {first_line(error)}"
        raise _error(folder, problem, _DECODER) from error
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    if model_type in list(transformers.CONFIG_MAPPING):
        return
    if isinstance(fields, dict) and "auto_map" in fields:
        raise _error(
            folder,
            f"its model type {model_type!r} needs code that comes with it (auto_map in "
            "config.json), which is not run",
            _DECODER,
            "a model whose architecture is part of transformers, or a version of this one converted"
            " to such an architecture",
        )
    problem = f"its config.json cannot be used: transformers knows no model type {model_type!r}"
    raise _error(folder, problem, _DECODER)


def _check_n_blocks(folder: Path, config: Any) -> None:
    """Refuse no blocks, and more than the files hold tensors: building them would never end."""
    n_blocks, n_tensors = getattr(config, "num_hidden_layers", 1), _n_tensors(folder)
    if n_blocks < 1 or (n_tensors is not None and n_blocks > n_tensors):
        raise _error(
            folder,
            f"its config.json says num_hidden_layers={n_blocks}; its weights hold {n_tensors} "
            "tensors",
            "a config.json that belongs to the weights",
            "copy both again from where they come from",
        )


def _n_tensors(folder: Path) -> int | None:
    """Return the number of tensors in a folder's safetensors files; None if no header is read."""
    n_tensors = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                n_tensors += len(file.keys())
        except (OSError, SafetensorError):
            return None  # loading it says what is wrong
    return n_tensors or None


def _error(folder: Path, problem: str, valid: str, hint: str = "") -> UserError:
    return UserError(problem, field="model.path", value=folder, valid=valid, hint=hint)
