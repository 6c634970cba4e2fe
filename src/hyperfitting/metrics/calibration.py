"""Calibration of multiple-choice answers, and the temperature that restores it.

The probability of a choice is the softmax of the choices' log-likelihoods. All functions take
logits (N, C); a question with fewer choices is padded with -inf.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

BINS = 10
"""Bins of equal width of the expected calibration error (Guo et al., 2017, use 15; fewer questions
need fewer)."""
_LOG_TEMPERATURES = (-5.0, 5.0)
"""Range of the fitted temperature's logarithm."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Calibration:
    """How well confidence predicts accuracy; nothing here has a unit but the temperature."""

    ece: float = field(metadata={"description": f"expected calibration error, {BINS} bins"})
    brier: float = field(
        metadata={"description": "Brier score summed over the choices: 0 is best, 2 worst"}
    )
    confidence: float = field(metadata={"description": "mean probability of the chosen answer"})
    temperature: float | None = field(
        metadata={
            "description": "fitted by log-likelihood on the questions of even index; null: fewer "
            "than 4 questions"
        }
    )
    ece_held_out: float | None = field(
        metadata={"description": "expected calibration error of the other half, as it is"}
    )
    ece_scaled: float | None = field(
        metadata={"description": "of the other half, at the fitted temperature"}
    )


def calibration(logits: Floats, gold: Ints) -> Calibration:
    """Return the calibration of answers, before and after fitting a temperature.

    Args:
        logits: (N, C) log-likelihoods of the choices.
        gold: (N,) index of the right one.
    """
    p = np.exp(log_softmax(logits, axis=1))
    temperature = held_out = scaled = None
    if len(gold) >= 4:
        temperature = fit_temperature(logits[::2], gold[::2])
        held_out = expected_calibration_error(p[1::2], gold[1::2])
        rescaled = np.exp(log_softmax(logits[1::2] / temperature, axis=1))
        scaled = expected_calibration_error(rescaled, gold[1::2])
    return Calibration(
        expected_calibration_error(p, gold),
        float(brier_scores(p, gold).mean()),
        float(p.max(1).mean()),
        temperature,
        held_out,
        scaled,
    )


def expected_calibration_error(p: Floats, gold: Ints) -> float:
    """Return the mean gap of accuracy and confidence, weighted by bin (Naeini et al., 2015).

    Args:
        p: (N, C) probabilities; the most likely choice is the answer.
        gold: (N,).
    """
    confidence, correct = p.max(1), p.argmax(1) == gold
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)  # (low, high]
    gaps = np.bincount(bins, correct - confidence, BINS)
    return float(np.abs(gaps).sum() / len(gold))


def brier_scores(p: Floats, gold: Ints) -> Floats:
    """Return (N,) squared distances (Brier, 1950) of (N, C) probabilities from the answers."""
    right = np.arange(p.shape[1]) == gold[:, None]  # (N, C)
    scores: Floats = ((p - right) ** 2).sum(1)
    return scores


def fit_temperature(logits: Floats, gold: Ints) -> float:
    """Return the temperature of highest log-likelihood of the right answers (Guo et al., 2017)."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        log_p = log_softmax(logits / np.exp(log_temperature), axis=1)
        return float(-log_p[np.arange(len(gold)), gold].mean())

    fitted = minimize_scalar(loss, bounds=_LOG_TEMPERATURES, method="bounded")
    return float(np.exp(fitted.x))
