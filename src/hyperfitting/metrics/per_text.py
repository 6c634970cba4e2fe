"""Metrics as functions of scoring inputs: one value per text (N,), NaN where a text has none."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hyperfitting.metrics import bleu, distribution
from hyperfitting.metrics.inputs import Floats, ScoringInputs

PerText = Callable[[ScoringInputs], Floats]
LONG_OVERLAP = 10
"""Tokens above which an overlap counts as long (Carlsson et al., Figure 3)."""


def row_means(rows: NDArray[Any]) -> Floats:
    """Return the mean of each row (N, T) over its numbers; NaN for a row of NaNs only."""
    rows = rows.astype(np.float64)
    present = ~np.isnan(rows)
    count = present.sum(axis=1)
    total = np.where(present, rows, 0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def of_continuations(function: Callable[..., float], *args: int) -> PerText:
    """Return the metric that applies a function of token ids (T,) to each continuation."""
    return lambda inputs: np.array(
        [function(tokens, *args) for tokens in inputs.continuations], dtype=np.float64
    )


def while_generating(name: str) -> PerText:
    """Return the mean of a statistic over the decoding steps."""
    return lambda inputs: row_means(inputs.step_stats[name])


def on_references(name: str) -> PerText:
    """Return the mean of a statistic over the positions of the reference texts."""
    return lambda inputs: row_means(inputs.token_stats[name])


def context_loss(inputs: ScoringInputs) -> Floats:
    """Return the mean loss on the contexts of the reference texts."""
    return row_means(inputs.token_stats["loss"][:, : inputs.context_len - 1])


def base_loss(inputs: ScoringInputs) -> Floats:
    """Return the mean loss of the continuations under the base model."""
    return row_means(inputs.base_loglikelihoods["loss"])


def base_rank_over(k: int) -> PerText:
    """Return the share of the chosen tokens that the base model ranks below its top k."""

    def share(inputs: ScoringInputs) -> Floats:
        ranks = inputs.base_loglikelihoods["rank"].astype(float)
        return row_means(np.where(np.isnan(ranks), np.nan, ranks > k))

    return share


def self_bleu(inputs: ScoringInputs) -> Floats:
    """Return `bleu.self_bleu` of the continuations."""
    return _nonempty(inputs, bleu.self_bleu(inputs.units, inputs.bleu_n))


def dataset_bleu(inputs: ScoringInputs) -> Floats:
    """Return `bleu.dataset_bleu` of the continuations."""
    return _nonempty(inputs, bleu.dataset_bleu(inputs.units, inputs.corpus, inputs.bleu_n))


def overlap(inputs: ScoringInputs) -> Floats:
    """Return the length of the longest run shared with the training sequences."""
    return _nonempty(inputs, inputs.overlap.length)


def overlap_is_long(inputs: ScoringInputs) -> Floats:
    """Return whether that length is over `LONG_OVERLAP`."""
    return _nonempty(inputs, inputs.overlap.length > LONG_OVERLAP)


def top1_agreement(inputs: ScoringInputs) -> Floats:
    """Return `distribution.top1_agreement` with the base model on the reference texts."""
    return distribution.top1_agreement(inputs.token_stats["top1"], inputs.base_token_stats["top1"])


def of_patching(name: str) -> PerText:
    """Return what activation patching measured, where it did."""
    return lambda inputs: np.asarray(inputs.patching[name], dtype=np.float64)


def _nonempty(inputs: ScoringInputs, values: ArrayLike) -> Floats:
    """Return values (N,) with NaN for continuations that are empty."""
    empty = [len(text) == 0 for text in inputs.units]
    return np.where(empty, np.nan, np.asarray(values, dtype=np.float64))
