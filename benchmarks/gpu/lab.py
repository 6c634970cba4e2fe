"""What the checks share: the device, randomly initialized models of real shapes, and configs."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import psutil
import torch
import transformers
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

from hyperfitting.config import RunConfig, conf_dir, from_hydra, register
from hyperfitting.data.sequences import Sequences
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import ModelState
from hyperfitting.models.random_init import byte_tokenizer
from hyperfitting.runtime.device import setup_torch
from hyperfitting.store.artifact import Store
from hyperfitting.training.activation_cache import CacheLocation
from hyperfitting.training.step import TrainState, build_train_state

CONTEXT_LEN = 32
"""Tokens of the contexts that are continued."""
GREEDY = DecodeConfig("greedy", seed=0)


def _llama(
    hidden: int, mlp: int, blocks: int, heads: tuple[int, int], vocab: int
) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": blocks, "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1], "vocab_size": vocab, "max_position_embeddings": 4096,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def _imagegpt(hidden: int, blocks: int, heads: int, colors: int, side: int) -> dict[str, Any]:
    return {
        "model_type": "imagegpt", "n_embd": hidden, "n_layer": blocks, "n_head": heads,
        "vocab_size": colors + 1, "n_positions": side**2,
    }  # fmt: skip


@dataclass(frozen=True)
class Shapes:
    """Architectures and sizes of all checks."""

    small: Mapping[str, Any]
    """For checks of correctness; grouped-query attention."""
    medium: Mapping[str, Any]
    """For speed: TinyLlama 1.1B."""
    large: Mapping[str, Any]
    """Llama 3.1 8B, with its vocabulary."""
    image: Mapping[str, Any]
    """ImageGPT-Large."""
    n_images: int = 128
    """Images that are completed."""
    batch_size: int = 8
    seq_len: int = 256
    n_texts: int = 100
    """Texts that are continued."""
    max_new_tokens: int = 224
    n_scored: int = 300
    last_blocks: int = 5
    """Trained blocks of the speed checks with `tuning=late_stage`."""
    rounds: int = 3
    steps: int = 5
    """Optimizer steps of a round."""


REAL = Shapes(
    small=_llama(576, 1536, 8, (9, 3), 49152),
    medium=_llama(2048, 5632, 22, (32, 4), 32000),
    large=_llama(4096, 14336, 32, (32, 8), 128256),
    image=_imagegpt(1536, 48, 16, 512, 32),
)
TINY = Shapes(
    small=_llama(64, 128, 3, (4, 2), 512),
    medium=_llama(64, 128, 4, (4, 2), 512),
    large=_llama(64, 128, 4, (4, 2), 1024),
    image=_imagegpt(32, 2, 2, 16, 4), n_images=4,
    batch_size=4, seq_len=32, n_texts=6, max_new_tokens=12, n_scored=8,
    last_blocks=2, rounds=1, steps=2,
)  # fmt: skip


@dataclass(frozen=True)
class Lab:
    """Where the checks run."""

    device: torch.device
    shapes: Shapes
    folder: Path
    """Empty at first; models, stores and trainings of the checks are written here."""

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.type == "cuda"

    def config(self, *overrides: str) -> RunConfig:
        """Return the paper's protocol at these shapes, with overrides.

        Args:
            overrides: of groups (`tuning=lora`) and of values (`trainer.epochs=2`).
        """
        sizes = (
            f"dataset.seq_len={self.shapes.seq_len}",
            f"trainer.batch_size={self.shapes.batch_size}",
            f"hardware.device={self.device}",
        )
        groups = tuple(override for override in overrides if "." not in override.split("=")[0])
        values = [*sizes, *(override for override in overrides if override not in groups)]
        cfg = _compose(groups).copy()
        for override in OverridesParser.create().parse_overrides(values):
            OmegaConf.update(cfg, override.key_or_group, override.value())
        return from_hydra(cfg)

    def base(self, shape: str, dtype: str = "float32") -> BaseModel:
        """Return a randomly initialized base model, written once.

        Args:
            shape: `small`, `medium` or `large`.
            dtype: of its weights.
        """
        folder = self.folder / f"{shape}-{dtype}"
        if not folder.exists():
            _write_random_model(self, shape, dtype, folder)
        return BaseModel(f"{shape}:{dtype}", shape, dtype, lambda: folder, str(folder))

    def model(self, shape: str, dtype: str = "float32") -> PreTrainedModel:
        """Return such a model on the device, in evaluation mode."""
        return ModelState(self.base(shape, dtype)).load(self.device)

    def tokens(
        self, shape: str, n: int, length: int | None = None, seed: int = 0
    ) -> NDArray[np.int32]:
        """Return random token sequences (n, length) of a model's vocabulary."""
        vocab = getattr(self.shapes, shape)["vocab_size"]
        size = (n, length or self.shapes.seq_len)
        return np.random.default_rng(seed).integers(0, vocab, size, dtype=np.int32)

    def sequences(self, shape: str, n_train: int, n_val: int = 4) -> Sequences:
        """Return random training and validation sequences."""
        return Sequences(self.tokens(shape, n_train), self.tokens(shape, n_val, seed=1))

    def cache_location(self, name: str) -> CacheLocation:
        """Return where the activation caches of a model are stored."""
        return CacheLocation(Store(self.folder / "store"), {"model": name})

    def train_state(
        self, shape: str, dtype: str, cfg: RunConfig, tokens: NDArray[np.int32]
    ) -> TrainState:
        """Return the state before the first step of a training on the device."""
        setup_torch(cfg.hardware)
        location = self.cache_location(f"{shape}-{dtype}-{len(tokens)}")
        state = build_train_state(cfg.training, self.base(shape, dtype), tokens, location)
        state.model.train()
        return state

    @property
    def memory_bytes(self) -> float:
        """The memory of the device."""
        if not self.on_gpu:
            return float(psutil.virtual_memory().total)
        return float(torch.cuda.get_device_properties(self.device).total_memory)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    @contextmanager
    def peak_memory(self) -> Iterator[dict[str, float]]:
        """Measure the peak of the GPU memory that tensors take inside this context, beyond before.

        Yields:
            A dict that holds `peak_gb` (1e9 bytes) afterwards; empty on a CPU.
        """
        measured: dict[str, float] = {}
        if not self.on_gpu:
            yield measured
            return
        release(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        yield measured
        self.synchronize()
        measured["peak_gb"] = (torch.cuda.max_memory_allocated(self.device) - before) / 1e9


@cache
def _compose(groups: tuple[str, ...]) -> DictConfig:
    """Return the paper's protocol with these choices of groups."""
    register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra.compose("config", overrides=["preset=paper", "model=tiny", *groups])


def release(device: torch.device) -> None:
    """Free what the checks before have left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()


def _write_random_model(lab: Lab, shape: str, dtype: str, folder: Path) -> None:
    """Write a model whose greedy decoding does not repeat one token forever."""
    config = transformers.AutoConfig.for_model(**getattr(lab.shapes, shape))
    torch.manual_seed(0)
    with torch.device(lab.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=2 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
