"""A fixed change of a model's next-token logits: a temperature and a bias.

Part of the model that is evaluated, so that its predictions on texts, their entropy and its
continuations all follow it, whatever the decoding strategy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperfitting.store.artifact import Artifact

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FILE = "logit_transform.safetensors"


@dataclass(frozen=True)
class LogitTransform:
    """``logits / temperature + bias``."""

    temperature: float = 1.0
    bias: Tensor | None = None
    """(V,), float32; none: no bias."""

    def save(self, folder: Path) -> None:
        """Write it into the folder of an artifact."""
        tensors = {"temperature": torch.tensor(self.temperature, dtype=torch.float64)}
        if self.bias is not None:
            tensors["bias"] = self.bias.float().contiguous()
        save_file(tensors, folder / _FILE)

    @classmethod
    def read(cls, artifact: Artifact) -> LogitTransform:
        """Return the transform in an artifact.

        Raises:
            DamagedArtifactError: the artifact is damaged or not built.
        """
        tensors = load_file(artifact.file(_FILE))
        return cls(float(tensors["temperature"]), tensors.get("bias"))

    def apply(self, logits: Tensor) -> Tensor:
        """Return the transformed logits (..., V), in float32; float32 ones are modified in place.

        A temperature keeps the order of the tokens.
        """
        logits = logits.float()
        if self.temperature != 1:
            logits /= self.temperature
        if self.bias is not None:
            logits += self.bias.to(logits.device)
        return logits

    def attach(self, model: PreTrainedModel) -> None:
        """Have a model return transformed logits, from every forward pass; not for training."""
        bias = None if self.bias is None else self.bias.to(model.device)
        transform = LogitTransform(self.temperature, bias)

        def transform_output(_: Any, __: Any, output: Any) -> Any:
            output.logits = transform.apply(output.logits)
            return output

        model.register_forward_hook(transform_output)
