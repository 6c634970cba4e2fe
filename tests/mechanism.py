"""A tiny base model with a tuned one, and texts, for the tests of the mechanism's measures."""

import numpy as np
import torch
from transformers import PreTrainedModel

from hyperfitting.mechanism.texts import Texts
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load


def model_pair(base: BaseModel, scale: float = 0.05) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return the base model, and one whose matrices and norms are perturbed."""
    models = load(base).eval(), load(base).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return models


def make_texts(lengths: tuple[int, ...] = (24, 24, 9, 17, 24), seed: int = 0) -> Texts:
    """Return texts of two datasets, of printable bytes."""
    tokens = np.random.default_rng(seed).integers(32, 127, (len(lengths), max(lengths)), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = 0
    return Texts(
        tokens,
        np.array(lengths),
        [
            [chr(token) for token in row[:n]]
            for row, n in zip(tokens.tolist(), lengths, strict=True)
        ],
        ["news"] * 3 + ["fiction"] * (len(lengths) - 3),
    )
