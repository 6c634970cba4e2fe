"""Randomly initialized models of any architecture, with a byte tokenizer; for tests."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from hyperfitting.errors import UserError
from hyperfitting.models.config import ModelConfig
from hyperfitting.store.artifact import Step, Store

VERSION = 2


def initialization_step(cfg: ModelConfig, store: Store) -> Step:
    """Return the step that initializes `model.architecture`, always with the same weights."""

    def build(work: Path) -> None:
        config = transformers_config(cfg)
        try:
            model = initialized_model(config)
        except (ValueError, TypeError, KeyError) as error:
            raise _invalid(cfg, error) from error
        model.save_pretrained(work)
        byte_tokenizer().save_pretrained(work)

    artifact = store.artifact(
        "model",
        version=VERSION,
        config={"source": "random", "architecture": dict(cfg.architecture or {})},
        inputs={},
    )
    return Step(artifact, build)


def initialized_model(config: Any) -> transformers.PreTrainedModel:
    """Return a model of a transformers config, always with the same random float32 weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def transformers_config(cfg: ModelConfig) -> Any:
    """Return the transformers config of `model.architecture`.

    Raises:
        UserError: transformers knows no such model type, or refuses its fields.
    """
    fields = {"vocab_size": len(byte_tokenizer()), **(cfg.architecture or {})}
    try:
        return transformers.AutoConfig.for_model(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise _invalid(cfg, error) from error


def _invalid(cfg: ModelConfig, error: Exception) -> UserError:
    return UserError(
        f"transformers cannot build it: {error}",
        field="model.architecture",
        value=dict(cfg.architecture or {}),
        hint="model_type=llama with hidden_size, num_hidden_layers, …",
    )


def byte_tokenizer() -> Any:
    """Return a tokenizer whose tokens are the 256 bytes; it has no BOS, EOS or padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    # without merges a split into words changes no token, and costs two thirds of the time
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
