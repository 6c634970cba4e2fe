"""Forward passes over given texts: how well a model predicts them, and how sharply."""

from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from hyperfitting.metrics.distribution import Sharpness, sharpness
from hyperfitting.progress import Advance

MEASURES = tuple(field.name for field in fields(Sharpness))


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    texts: NDArray[np.int32],
    batch_size: int,
    advance: Advance | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Return the mean of each measure of sharpness over the tokens of each text.

    The first token of a text is given, not predicted.

    Args:
        model: a causal language model in evaluation mode.
        texts: (N, T) token ids, T at least 2.
        batch_size: texts in one forward pass.
        advance: told of every token.

    Returns:
        For each of `MEASURES` (losses and entropies in nats) an array (N,).

    Raises:
        FloatingPointError: the model's logits hold NaN or infinity.
    """
    device = next(model.parameters()).device
    rows: list[dict[str, Any]] = []
    for start in range(0, len(texts), batch_size):
        batch = torch.as_tensor(
            texts[start : start + batch_size], dtype=torch.long, device=device
        )  # (B, T)
        logits = model(input_ids=batch, use_cache=False).logits  # (B, T, V)
        for text, scores in zip(batch, logits, strict=True):  # one at a time: (T, V) is large
            found = sharpness(scores[:-1], text[1:])
            rows.append({name: value.double().mean().item() for name, value in vars(found).items()})
        if advance:
            advance(batch.numel())
    return {name: np.array([row[name] for row in rows]) for name in MEASURES}
