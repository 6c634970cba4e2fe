"""The base model of a run: resolved from its config, available as a local Hugging Face folder.

Every source ends as such a folder (safetensors, config.json, tokenizer): downloaded from the Hub,
given by the user, or converted or initialized into the store. No remote code is run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from hyperfitting.errors import UserError, near_matches
from hyperfitting.models import gguf, hub, random_init
from hyperfitting.models.config import ModelConfig
from hyperfitting.progress import ProgressReporter, no_op
from hyperfitting.store import Step, Store, fingerprint

_MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")
_HF_FORMAT = "a folder in Hugging Face format (config.json, *.safetensors, tokenizer files)"


@dataclass(frozen=True)
class BaseModel:
    """A pre-trained model before any tuning. Constructing it reads no weights."""

    id: str
    """Determines its weights, tokenizer and dtype."""
    name: str
    dtype: str
    """Of the loaded weights, such as `float32`."""
    folder: Callable[[], Path]
    """Returns its local Hugging Face folder; call `ensure` first. (Raises DamagedArtifactError if
    the model is converted or initialized into the store and is not there yet.)"""
    read_config: Callable[[], Any] | None = None
    """Returns its transformers config before `ensure`; none: reads it from the folder."""
    step: Step | None = None
    """Converts or initializes it in the store; none for Hub models and local folders."""

    @classmethod
    def local(cls, name: str, folder: Path, dtype: str = "float32") -> "BaseModel":
        """Return the model saved in a folder; its id is a hash of the folder's files."""
        files = {p.name: p for p in folder.iterdir() if p.suffix in _MODEL_SUFFIXES}
        return cls(f"{fingerprint(files)}:{dtype}", name, dtype, lambda: folder)

    def ensure(self) -> None:
        """Convert, initialize or download the model, unless that is done.

        Raises:
            UserError: no network or no access, or it cannot be converted or initialized.
        """
        if self.step is not None:
            self.step.ensure()
        else:
            self.folder()

    def transformers_config(self) -> Any:
        """Return its transformers config. Needs no weights and no `ensure`.

        Raises:
            UserError: transformers does not support it.
        """
        return self.read_config() if self.read_config else load_config(self.folder())

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
        """Return its number of transformer blocks and its hidden size."""
        config = self.transformers_config()
        return int(config.num_hidden_layers), int(config.hidden_size)

    def check_length(self, field: str, length: int) -> None:
        """Refuse sequences longer than the model's context window, if its config states one.

        Args:
            field: the config field that sets the length.
            length: in tokens.

        Raises:
            UserError: the sequences are too long.
        """
        longest = getattr(self.transformers_config(), "max_position_embeddings", None)
        if longest and length > longest:
            raise UserError(
                f"longer than the context of {self.name}",
                field=field,
                value=length,
                valid=f"at most {longest} tokens",
            )


def base_model(cfg: ModelConfig, store: Store, progress: ProgressReporter = no_op) -> BaseModel:
    """Resolve a config to its model: only the id is determined, nothing is built or downloaded.

    Raises:
        UserError: there is no such model, or resolving it needs network or access that is missing.
    """
    if cfg.source == "hub":
        return _hub_model(cfg)
    if cfg.source == "local":
        folder = Path(str(cfg.path)).expanduser().absolute()
        _check_folder(folder)
        return BaseModel.local(cfg.name, folder, cfg.dtype)
    if cfg.source == "gguf":
        step = gguf.conversion_step(cfg, store, progress)
        return _store_model(cfg, step, lambda: gguf.transformers_config(cfg))
    step = random_init.initialization_step(cfg, store)
    return _store_model(cfg, step, lambda: random_init.transformers_config(cfg))


def _hub_model(cfg: ModelConfig) -> BaseModel:
    repo = str(cfg.path)
    commit = hub.resolve_commit("model", repo, cfg.revision)
    return BaseModel(
        f"{repo}@{commit}:{cfg.dtype}",
        cfg.name,
        cfg.dtype,
        lambda: hub.download_model(repo, commit),
        lambda: load_config(hub.download_config(repo, commit)),
    )


def _store_model(cfg: ModelConfig, step: Step, config_before: Callable[[], Any]) -> BaseModel:
    """Return a model of the store, whose transformers config is known before it is built."""
    artifact = step.artifact

    def read_config() -> Any:
        return load_config(artifact.folder) if artifact.exists else config_before()

    return BaseModel(
        f"{artifact.id}:{cfg.dtype}", cfg.name, cfg.dtype, artifact.path, read_config, step
    )


def _check_folder(folder: Path) -> None:
    hint = "save a model there with save_pretrained(DIR), or name the Hub id with model=… "
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(
            "is not a folder",
            field="model.path",
            value=folder,
            valid=_HF_FORMAT,
            hint=near_matches(folder.name, siblings) or hint,
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            "is not a model: it holds no config.json",
            field="model.path",
            value=folder,
            valid=_HF_FORMAT,
            hint=hint,
        )


def load_config(folder: Path) -> Any:
    """Return the transformers config of a local model folder.

    Raises:
        UserError: transformers does not support it, or config.json is invalid.
    """
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"its config.json cannot be used: {str(error).splitlines()[0]}",
            field="model.path",
            value=folder,
            valid="a decoder-only model that transformers knows without remote code",
        ) from error
