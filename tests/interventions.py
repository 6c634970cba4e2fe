"""Tuned models and what is derived from them, for tests of interventions."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hyperfitting.mechanism.intervention_config import InterventionConfig
from hyperfitting.mechanism.interventions import (
    intervention_state,
    intervention_step,
)
from hyperfitting.models.base import BaseModel
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.loading import ModelState, load
from hyperfitting.models.trainable import select_trainable
from hyperfitting.progress import no_op
from hyperfitting.store.artifact import Step, Store

CPU = torch.device("cpu")
ALL_PARTS = ["embedding", "blocks", "final_norm", "output"]
"""Together the whole model."""


def tuned_state(
    base: BaseModel, store: Store, tuning: TuningConfig | None = None, seed: int = 0
) -> ModelState:
    """A tuning that moves every trained parameter at random."""
    tuning = tuning or TuningConfig("full")
    generator = torch.Generator().manual_seed(seed)

    def build(work: Path) -> None:
        trained = select_trainable(load(base), tuning)
        save_file(
            {
                name: (p + 0.1 * torch.randn(p.shape, generator=generator)).detach()
                for name, p in trained.items()
            },
            work / "last.safetensors",
        )

    artifact = store.artifact(
        "tuned",
        version=1,
        config={"tuning": tuning.id_config(), "seed": seed},
        inputs={"model": base.id, "sequences": "0" * 16},
    )
    Step(artifact, build).ensure()
    return ModelState(base, tuning, artifact, "last.safetensors")


def weights_of(state: ModelState) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in state.load(CPU).named_parameters()}


def derived(
    cfg: InterventionConfig, tuned: ModelState, store: Store, other: ModelState | None = None
) -> dict[str, Tensor]:
    step = intervention_step(cfg, tuned, other, store, no_op)
    step.ensure()
    return weights_of(intervention_state(cfg, tuned.base, step))


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Return whether all weights have the same bits: 0 and -0 differ."""
    return first.keys() == second.keys() and all(
        torch.equal(*(w[name].contiguous().view(torch.uint8) for w in (first, second)))
        for name in first
    )


def stitch(*parts: str, **fields: Any) -> InterventionConfig:
    return InterventionConfig("stitch", list(parts), **fields)
