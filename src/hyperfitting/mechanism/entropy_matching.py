"""The temperature at which a model's mean entropy is a given one (Li et al., ICML 2026)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq
from torch import Tensor

from hyperfitting.errors import UserError
from hyperfitting.evaluation.forward import for_each_batch
from hyperfitting.metrics.distribution import entropy
from hyperfitting.progress import Advance
from hyperfitting.runtime.numerics import accumulation_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-3
"""Nats, by which the mean entropy at the temperature that is returned may miss the target."""
_LOWEST, _HIGHEST = 0.02, 50.0
_N_GRID = 25
"""Temperatures of a pass: neighbors of the first differ by 39%, those of the second by 1.4%."""
N_PASSES = 2
"""Forward passes over the texts that a search takes."""
MeanEntropies = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def mean_entropies(
    model: PreTrainedModel,
    texts: Sequence[NDArray[np.int32]],
    temperatures: NDArray[np.float64],
    batch_size: int,
    advance: Advance | None = None,
) -> NDArray[np.float64]:
    """Return the mean entropy of a model's predictions at several temperatures, in one pass.

    Teacher-forced: at every token of the texts but the first, given the true tokens before it. A
    softmax over the vocabulary is computed at each temperature; no logits are stored.

    Args:
        model: a causal language model in evaluation mode.
        texts: (N, T) token ids of each dataset, T at least 2; one T for all.
        temperatures: (K,) by which the logits are divided.
        batch_size: texts per forward pass.
        advance: reports tokens.

    Returns:
        (K,) nats.
    """
    per_text: list[NDArray[np.float64]] = []
    for tokens in texts:
        entropies = np.empty((len(tokens), len(temperatures)))

        def compute(
            rows: slice, logits: Tensor, _: Tensor, entropies: NDArray[np.float64] = entropies
        ) -> None:
            for row, scores in enumerate(logits, rows.start):
                for column, temperature in enumerate(temperatures):
                    log_p = (scores.float() / temperature).log_softmax(-1)  # (T - 1, V)
                    of_tokens = entropy(log_p).to(accumulation_dtype(log_p.device))
                    entropies[row, column] = of_tokens.mean().item()

        for_each_batch(model, tokens, batch_size, compute, advance)
        per_text.append(entropies)
    means: NDArray[np.float64] = np.concatenate(per_text).mean(axis=0)
    return means


def matching_temperature(entropies_at: MeanEntropies, target: float) -> float:
    """Return the temperature at which the mean entropy is a target, within `TOLERANCE`.

    The mean entropy rises with the temperature (its derivative is the mean variance of the logits
    over T^3), so there is one. A first pass over a wide grid brackets it; a second over a grid in
    the bracket is interpolated monotonically, and Brent's method finds the root.

    Args:
        entropies_at: returns the mean entropies (K,) at temperatures (K,).
        target: mean entropy, in nats.

    Raises:
        UserError: no temperature from 0.02 to 50 has that entropy.
    """
    temperatures = np.geomspace(_LOWEST, _HIGHEST, _N_GRID)
    entropies = entropies_at(temperatures)
    if not entropies[0] <= target <= entropies[-1]:
        raise UserError(
            f"no temperature from {_LOWEST:g} to {_HIGHEST:g} gives the entropy {target:.4f}: it "
            f"is between {entropies[0]:.4f} and {entropies[-1]:.4f} nats there",
            field="decode.control.method",
            value="entropy_matched",
            hint="another checkpoint or training: this entropy is that of (almost) one token, or "
            "of all tokens alike",
        )
    upper = int(np.clip(np.searchsorted(entropies, target), 1, _N_GRID - 1))
    temperatures = np.geomspace(temperatures[upper - 1], temperatures[upper], _N_GRID)
    # (rounding may leave two neighbors equal; the interpolant needs no strict rise)
    curve = PchipInterpolator(temperatures, entropies_at(temperatures) - target)
    low, high = temperatures[[0, -1]]
    if curve(low) >= 0:  # the target is at an end of the bracket, up to rounding
        return float(low)
    if curve(high) <= 0:
        return float(high)
    return float(brentq(curve, low, high, xtol=1e-9))


def temperature_of(
    model: PreTrainedModel,
    texts: Sequence[NDArray[np.int32]],
    target: float,
    batch_size: int,
    advance: Advance | None = None,
) -> float:
    """Return the temperature at which a model's mean entropy on texts is ``target`` nats."""
    with torch.inference_mode():
        return matching_temperature(
            lambda temperatures: mean_entropies(model, texts, temperatures, batch_size, advance),
            target,
        )
