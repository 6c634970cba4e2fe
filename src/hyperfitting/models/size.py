"""Model sizes and forward FLOPs, counted from the transformers config alone.

FLOPs are counted as in Kaplan et al. (2020): two per parameter and token in the forward pass, plus
attention's two matrix products. Embedding tables are looked up, not multiplied.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from hyperfitting.models import layers
from hyperfitting.models.base import BaseModel
from hyperfitting.runtime.files import write_json
from hyperfitting.store.artifact import Step, Store

VERSION = 1
_FILE = "size.json"


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts and dimensions of a decoder."""

    n_params: int
    """All parameters, tied ones once."""
    n_block_params: int
    """Parameters of the transformer blocks."""
    n_head_params: int
    """Parameters of the output layer (LM head)."""
    n_blocks: int
    hidden_size: int


def model_size(base: BaseModel, store: Store) -> ModelSize:
    """Return a model's size, from the store if it has been counted before.

    Its weights are neither read nor downloaded.

    Raises:
        UserError: its transformers config cannot be used.
    """

    def build(work: Path) -> None:
        write_json(work / _FILE, asdict(count_size(base.transformers_config())))

    artifact = store.artifact("model_size", version=VERSION, config={}, inputs={"model": base.id})
    Step(artifact, build).ensure()
    return ModelSize(**json.loads(artifact.file(_FILE).read_text("utf-8")))


def count_size(config: Any) -> ModelSize:
    """Return the size of a model with this transformers config (built on the meta device)."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    blocks = list(layers.find_blocks(model) or ())
    return ModelSize(
        n_params=sum(p.numel() for p in model.parameters()),
        n_block_params=sum(p.numel() for block in blocks for p in block.parameters()),
        n_head_params=sum(p.numel() for p in head.parameters()) if head is not None else 0,
        n_blocks=len(blocks),
        hidden_size=int(config.hidden_size),
    )


def forward_flops(size: ModelSize, n_texts: int, length: int) -> float:
    """Return the FLOPs of one forward pass over ``n_texts`` texts of ``length`` tokens."""
    attention = 4 * size.n_blocks * size.hidden_size * length / 2
    return n_texts * length * (2 * (size.n_block_params + size.n_head_params) + attention)
