"""The base model of a run: resolved from its config, available as a local Hugging Face folder.

Every source ends as such a folder (safetensors, config.json, tokenizer): downloaded from the Hub,
given by the user, or converted or initialized into the store. No remote code is run.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hyperfitting.errors import UserError
from hyperfitting.models import gguf, hub, random_init
from hyperfitting.models.config import ModelConfig
from hyperfitting.models.folder import check_folder, load_config
from hyperfitting.models.image_format import ImageFormat, PixelTokenizer, read_image_format
from hyperfitting.progress import ProgressReporter, no_op
from hyperfitting.store.artifact import Step, Store
from hyperfitting.store.hashing import fingerprint

IMAGE_MODEL_TYPE = "imagegpt"
# (transformers has no auto class for images; this one loads, initializes and counts them alike)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[IMAGE_MODEL_TYPE] = "ImageGPTForCausalImageModeling"
_MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")


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
    location: str
    """Where its files come from: `repo@commit` on the Hub, or a folder."""
    read_config: Callable[[], Any] | None = None
    """Returns its transformers config before `ensure`; none: reads it from the folder."""
    step: Step | None = None
    """Converts or initializes it in the store; none for Hub models and local folders."""

    @classmethod
    def local(cls, name: str, folder: Path, dtype: str = "float32") -> "BaseModel":
        """Return the model saved in a folder; its id is a hash of the folder's files."""
        files = {p.name: p for p in folder.iterdir() if p.suffix in _MODEL_SUFFIXES}
        return cls(f"{fingerprint(files)}:{dtype}", name, dtype, lambda: folder, str(folder))

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

    def image_format(self) -> ImageFormat | None:
        """Return the size and palette of its images; None: it is a model of text.

        Raises:
            UserError: its `preprocessor_config.json` names no palette or size.
        """
        return read_image_format(self.folder())

    def tokenizer(self) -> Any:
        """Return its tokenizer; that of an image model writes colors.

        Raises:
            UserError: the folder has none, or one with ids that the model has no embedding for.
        """
        image_format = self.image_format()
        if image_format is not None:
            return PixelTokenizer(image_format)
        folder = self.folder()
        n_embeddings = load_config(folder).get_text_config().vocab_size
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                "the folder holds no tokenizer that transformers can read",
                field="model.path",
                value=folder,
                hint="save one beside the model, with tokenizer.save_pretrained(DIR)",
            ) from error
        # an added [PAD] often has no embedding, and needs none: nothing is padded with it
        unused = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        unused -= {tokenizer.bos_token_id, tokenizer.eos_token_id}
        n_ids = max(set(tokenizer.get_vocab().values()) - unused, default=-1) + 1
        if n_ids > n_embeddings:  # fewer are usual: embeddings are padded to a round number
            raise UserError(
                f"its tokenizer has ids up to {n_ids - 1}, its embedding only {n_embeddings} rows",
                field="model.path",
                value=folder,
                valid=f"a tokenizer of at most {n_embeddings} tokens",
                hint="the tokenizer that the model was trained with, or "
                "model.resize_token_embeddings and save_pretrained",
            )
        return tokenizer

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
        config = self.transformers_config()
        longest = getattr(config, "max_position_embeddings", None)
        if longest and config.model_type == IMAGE_MODEL_TYPE:
            longest += 1  # SOS and all pixels: the last is predicted, and never an input
        if longest and 0 < longest < length:  # XLNet's -1 is no limit
            raise UserError(
                f"longer than the context of {self.name}",
                field=field,
                value=length,
                valid=f"at most {longest} tokens",
            )


def base_model(cfg: ModelConfig, store: Store, progress: ProgressReporter = no_op) -> BaseModel:
    """Resolve a config to its model: only the id is determined, nothing is built or downloaded.

    (A model that is pre-trained here is resolved by `training.pretraining`.)

    Raises:
        UserError: there is no such model, or resolving it needs network or access that is missing.
    """
    if cfg.source == "hub":
        return _hub_model(cfg, progress)
    if cfg.source == "local":
        folder = Path(str(cfg.path)).expanduser().absolute()
        check_folder(folder)
        return BaseModel.local(cfg.name, folder, cfg.dtype)
    if cfg.source == "gguf":
        step = gguf.conversion_step(cfg, store, progress)
        return store_model(cfg, step, lambda: gguf.transformers_config(cfg))
    if cfg.source != "random":
        raise ValueError(f"a model of source {cfg.source!r} is resolved by `resolve_model`")
    step = random_init.initialization_step(cfg, store)
    return store_model(cfg, step, lambda: random_init.transformers_config(cfg))


def _hub_model(cfg: ModelConfig, progress: ProgressReporter) -> BaseModel:
    repo = str(cfg.path)
    commit = hub.resolve_commit("model", repo, cfg.revision)
    return BaseModel(
        f"{repo}@{commit}:{cfg.dtype}",
        cfg.name,
        cfg.dtype,
        lambda: hub.download_model(repo, commit, progress),
        f"{repo}@{commit}",
        lambda: load_config(hub.download_config(repo, commit)),
    )


def store_model(cfg: ModelConfig, step: Step, config_before: Callable[[], Any]) -> BaseModel:
    """Return a model of the store, whose transformers config is known before it is built."""
    artifact, config_once = step.artifact, cache(config_before)  # (a GGUF header takes seconds)

    def read_config() -> Any:
        return load_config(artifact.folder) if artifact.exists else copy.deepcopy(config_once())

    return BaseModel(
        f"{artifact.id}:{cfg.dtype}",
        cfg.name,
        cfg.dtype,
        artifact.path,
        str(artifact.folder),
        read_config,
        step,
    )
