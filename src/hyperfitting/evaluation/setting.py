"""What every evaluation step needs: lazily loaded models, texts, decoding, the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.evaluation.config import EvaluationConfig
from hyperfitting.models.loading import ModelState
from hyperfitting.progress import ProgressReporter
from hyperfitting.runtime import memory
from hyperfitting.runtime.config import HardwareConfig
from hyperfitting.store.artifact import Artifact, Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LazyModel:
    """A model that is loaded on first use and kept until it is released."""

    def __init__(self, state: ModelState, device: torch.device, device_map: str | None) -> None:
        self.state, self._device, self._device_map = state, device, device_map
        self._model: PreTrainedModel | None = None

    def __call__(self) -> PreTrainedModel:
        """Return the model on its device, in evaluation mode."""
        if self._model is None:
            self._model = self.state.load(self._device, self._device_map)
        return self._model

    def release(self) -> None:
        """Free the model's memory."""
        self._model = None
        if self._device_map is not None:  # accelerate's hooks are in reference cycles with layers
            memory.collect_unreferenced()

    @property
    def label(self) -> str:
        """Its name in progress bars."""
        return "the base model" if self.state.is_base else "the tuned model"


@dataclass(frozen=True)
class Setting:
    """What all models of a run are evaluated on, and how."""

    evaluation: EvaluationConfig
    decode: DecodeConfig
    hardware: HardwareConfig
    texts: Mapping[str, Artifact]
    """Evaluation texts by dataset."""
    sequences: Artifact
    """Training sequences, for the citation blocker."""
    store: Store
    progress: ProgressReporter
    other_sequences: tuple[Artifact, ...] = ()
    """Training sequences of the run that a task vector comes from."""

    @property
    def trained_on(self) -> list[Artifact]:
        """All training sequences that evaluation texts must not be in."""
        return [self.sequences, *self.other_sequences]
