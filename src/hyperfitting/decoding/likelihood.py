"""Forward passes over given texts: how well a model predicts them, and how sharply."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from hyperfitting.metrics.distribution import Sharpness, sharpness
from hyperfitting.progress import Advance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURES = tuple(field.name for field in fields(Sharpness))


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    texts: NDArray[np.int32],
    batch_size: int,
    advance: Advance | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Return each measure of sharpness at every token of each text but its first.

    The first token of a text is given, not predicted.

    Args:
        model: a causal language model in evaluation mode.
        texts: (N, T) token ids, T at least 2.
        batch_size: texts in one forward pass.
        advance: told of every token.

    Returns:
        For each of `MEASURES` (losses and entropies in nats) an array (N, T - 1).

    Raises:
        FloatingPointError: the model's logits hold NaN or infinity.
    """
    device = next(model.parameters()).device
    n, length = texts.shape
    found = {name: np.empty((n, length - 1)) for name in MEASURES}
    for start in range(0, n, batch_size):
        batch = torch.as_tensor(
            texts[start : start + batch_size], dtype=torch.long, device=device
        )  # (B, T)
        logits = model(input_ids=batch, use_cache=False).logits  # (B, T, V)
        for offset, (text, scores) in enumerate(zip(batch, logits, strict=True)):
            # one at a time: (T, V) is large
            for name, value in vars(sharpness(scores[:-1], text[1:])).items():
                found[name][start + offset] = value.cpu().numpy()
        if advance:
            advance(batch.numel())
    return found


@torch.inference_mode()
def likeliest(
    model: PreTrainedModel, text: NDArray[np.int32], k: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the ``k`` likeliest next tokens after each token of a text but its last.

    Args:
        model: a causal language model in evaluation mode.
        text: (T,) token ids.
        k: how many; at most as many as there are tokens.

    Returns:
        Their ids (T - 1, k), the likeliest first, and their probabilities (T - 1, k).
    """
    device = next(model.parameters()).device
    given = torch.as_tensor(text[None, :-1], dtype=torch.long, device=device)
    logits = model(input_ids=given, use_cache=False).logits[0].float()  # (T - 1, V)
    mass, ids = torch.softmax(logits, -1).topk(min(k, logits.shape[-1]), dim=-1)
    return ids.int().cpu().numpy(), mass.cpu().numpy()


@torch.inference_mode()
def features(
    model: PreTrainedModel,
    texts: list[list[int]],
    batch_size: int,
    advance: Advance | None = None,
) -> NDArray[np.float32]:
    """Return the model's last hidden state at the last token of each text, for MAUVE.

    Args:
        model: a causal language model in evaluation mode.
        texts: N lists of token ids, none empty.
        batch_size: texts in one forward pass.
        advance: told of every text.

    Returns:
        (N, H).
    """
    device = next(model.parameters()).device
    found: list[NDArray[np.float32]] = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        longest = max(map(len, batch))
        # what comes after a token does not change its state, so any padding will do
        padded = torch.tensor(
            [text + [0] * (longest - len(text)) for text in batch], device=device
        )  # (B, T)
        states = model(input_ids=padded, use_cache=False, output_hidden_states=True).hidden_states
        last = torch.tensor([len(text) - 1 for text in batch], device=device)
        rows = torch.arange(len(batch), device=device)
        found.append(states[-1][rows, last].float().cpu().numpy())  # (B, H)
        if advance:
            advance(len(batch))
    return np.concatenate(found)
