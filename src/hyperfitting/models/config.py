"""The config groups `model` and `tuning`: which pre-trained model, and which of its parameters."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from hyperfitting.fields import (
    RECORD,
    above_zero,
    at_least,
    id_config,
    in_range,
    one_of,
    refuse_unused,
    required,
    setting,
)

SOURCES = ("hub", "local", "gguf", "random", "pretraining")
DTYPES = ("float32", "bfloat16", "float16")
_INITIALIZED = ("random", "pretraining")
_LORA = ("lora", "late_stage_lora")
_LATE = ("late_stage", "late_stage_lora")
METHODS = ("none", "full", "late_stage", "lora", "late_stage_lora")


@dataclass
class PretrainingConfig:
    """How a small image model is pre-trained, on packaged images that nothing else uses."""

    images: str = setting(MISSING, enters="model")
    """Name of the packaged images, as `dataset.path`."""
    height: int = setting(MISSING, enters="model")
    """Rows of an image."""
    width: int = setting(MISSING, enters="model")
    """Pixels of a row."""
    colors: int = setting(512, enters="model")
    """Colors of the palette: those that occur if they are so few, else clusters by k-means."""
    n_train: int = setting(MISSING, enters="model")
    """Images to train on."""
    n_val: int = setting(MISSING, enters="model")
    """Images to validate on; the weights of the epoch of lowest validation loss are kept."""
    epochs: int = setting(20, enters="model")
    """Passes over the images."""
    batch_size: int = setting(32, enters="model")
    """Images per optimizer step."""
    lr: float = setting(1e-3, enters="model")
    """Learning rate of AdamW."""
    weight_decay: float = setting(0.1, enters="model")
    """Weight decay of AdamW."""
    dropout: bool = setting(True, enters="model")
    """Keep the architecture's dropout."""
    seed: int = setting(0, enters="model")
    """Order of the images, and dropout."""

    def __post_init__(self) -> None:
        for name in ("height", "width", "n_train", "n_val", "epochs", "batch_size"):
            at_least(f"model.pretraining.{name}", getattr(self, name), 1)
        at_least("model.pretraining.colors", self.colors, 2)
        at_least("model.pretraining.seed", self.seed, 0)
        above_zero("model.pretraining.lr", self.lr)
        at_least("model.pretraining.weight_decay", self.weight_decay, 0)


@dataclass
class ModelConfig:
    """Which pre-trained model, and where it comes from."""

    name: str = setting(MISSING, enters=RECORD)
    """Short name for tables and W&B."""
    source: str = setting("hub", enters="model")
    """`hub` (Hugging Face Hub), `local` (a folder in Hugging Face format), `gguf` (a GGUF file,
    converted once), `random` (initialized from `architecture`, byte tokenizer; for tests),
    `pretraining` (an image model, initialized from `architecture` and trained here, once)."""
    path: str | None = setting(None, enters="model")
    """Hub id; or folder for `local` and `gguf`."""
    revision: str | None = setting(None, enters="model", read_by=("hub",))
    """Branch, tag or commit."""
    package: str | None = setting(None, enters="model", read_by=("gguf",))
    """Installed Python package that contains the file, instead of `path`."""
    gguf_file: str | None = setting(None, enters="model", read_by=("gguf",))
    """File name in that folder."""
    architecture: dict[str, Any] | None = setting(None, enters="model", read_by=_INITIALIZED)
    """`model_type` and the fields of its transformers config."""
    pretraining: PretrainingConfig | None = setting(None, enters="model", read_by=("pretraining",))
    """On which images, and how."""
    dtype: str = setting("float32", enters="model")
    """Dtype of the weights: `float32`, `bfloat16`, `float16`. Train in float32: an update of 1e-6
    is below the spacing of bfloat16."""

    def __post_init__(self) -> None:
        one_of("model.source", self.source, SOURCES)
        one_of("model.dtype", self.dtype, DTYPES)
        if self.source == "hub":
            required("model.path", self.path, "the model's id on the Hub", "model.path=gpt2")
        elif self.source == "local":
            required("model.path", self.path, "the model's folder", "model=local model.path=DIR")
        elif self.source in _INITIALIZED:
            if self.source == "pretraining":
                required("model.pretraining", self.pretraining, "on what", "model=imagegpt_digits")
            required("model.architecture", self.architecture, "what to initialize", "model=tiny")
        else:
            required("model.gguf_file", self.gguf_file, "the file's name", "model.gguf_file=x.gguf")
            required("model.path", self.path or self.package, "the file's folder", "model.path=DIR")
        refuse_unused(self, "model", "source")


@dataclass
class TuningConfig:
    """Which parameters are trained."""

    method: str = setting("full", enters="tuned")
    """`none` (base model only), `full` (all parameters, as in the paper), `late_stage` (the last
    `last_blocks` blocks and the final norm), `lora` (low-rank adapters on every linear layer of
    every block; Hu et al., 2022), `late_stage_lora` (on the last `last_blocks` blocks; Li et al.,
    ICML 2026)."""
    last_blocks: int = setting(5, enters="tuned", read_by=_LATE)
    """Number of trailing transformer blocks that are trained."""
    lora_rank: int = setting(16, enters="tuned", read_by=_LORA)
    """Rank of an adapter."""
    lora_alpha: int = setting(32, enters="tuned", read_by=_LORA)
    """An adapter's output is scaled by `lora_alpha / lora_rank`."""
    lora_dropout: float = setting(0.0, enters="tuned", read_by=_LORA)
    """Dropout before an adapter; needs `trainer.dropout`."""

    def __post_init__(self) -> None:
        one_of("tuning.method", self.method, METHODS)
        at_least("tuning.last_blocks", self.last_blocks, 1)
        at_least("tuning.lora_rank", self.lora_rank, 1)
        above_zero("tuning.lora_alpha", self.lora_alpha)
        in_range("tuning.lora_dropout", self.lora_dropout, 0, 0.99)
        refuse_unused(self, "tuning", "method")

    @property
    def is_lora(self) -> bool:
        """Whether adapters are trained instead of the model's own parameters."""
        return self.method in _LORA

    @property
    def is_late(self) -> bool:
        """Whether only the last blocks are trained, so that their inputs never change."""
        return self.method in _LATE

    def trained_dtype(self, dtype: str) -> str:
        """Return the dtype of the trained parameters, for a model of a dtype."""
        return "float32" if self.is_lora else dtype

    def dtype_config(self, dtype: str) -> dict[str, str]:
        """Return what enters ids if the trained parameters have another dtype than the model."""
        trained = self.trained_dtype(dtype)
        return {} if trained == dtype else {"trained_dtype": trained}

    def id_config(self) -> dict[str, Any]:
        """Return the method and the fields that it reads."""
        return id_config(self, "tuned", "method")
