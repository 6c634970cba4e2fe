"""Which texts a judge prefers, apart from length and position: a logistic regression.

A length-controlled win rate is what the win rate would be between texts of one length (Dubois et
al., 2024, "Length-Controlled AlpacaEval"): log-odds that the first text wins

    a + b tanh(d / s) + c p

with d the first text's length minus the second's, s the standard deviation of d, and p = 1/2 if the
first is on the left, else -1/2. A tie is half a win. The win rate is sigmoid(a): length and
position equal. The same coefficients of all items, and no term for an item's difficulty. A weak
normal prior (standard deviation 10 of a, 2.5 of b and c; Gelman et al., 2008) keeps the estimates
finite for a judge that always takes the longer text, or always the left one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.preference.bootstrap import Codes, Floats, Statistic, two_way_intervals

RESAMPLES = 1000
PRIOR_SD = (10.0, 2.5, 2.5)
_ITERATIONS = 30
_MAX_LOG_ODDS, _MAX_STEP = 30.0, 2.0


@dataclass(frozen=True)
class Wins:
    """Judgments of one pair of systems, N of them."""

    scores: Floats
    """1: the first text wins, 0: the second; 1/2: a tie."""
    length_difference: Floats
    """Characters of the first text minus those of the second."""
    first_is_left: NDArray[np.bool_]
    items: Codes
    """Item of each judgment, 0 to the number of items - 1."""


@dataclass(frozen=True)
class WinEstimates:
    """Win rates of the first system, and what else moves the judge."""

    win_rate: Estimate
    length_controlled: Estimate
    length_effect: Estimate
    """b: log-odds of a win for a text that is much longer."""
    position_effect: Estimate
    """c: log-odds of a win on the left minus those on the right."""


def estimate_wins(wins: Wins, seed: int) -> WinEstimates:
    """Return the win rates with 95% bootstrap intervals over items.

    Args:
        wins: one judgment or more.
        seed: of the resampling.
    """
    scale = wins.length_difference.std() or 1.0
    length = np.tanh(wins.length_difference / scale)
    position = wins.first_is_left - 0.5
    x = np.stack([np.ones_like(length), length, position], axis=1)  # (N, 3)

    def statistic(weights: Floats) -> Floats:
        raw = weights @ wins.scores / weights.sum(axis=1)  # (B,)
        fit = fit_logistic(x, wins.scores, weights, PRIOR_SD)  # (B, 3)
        return np.column_stack([raw, 1 / (1 + np.exp(-fit[:, 0])), fit[:, 1:]])

    return WinEstimates(*item_estimates(statistic, wins.items, seed))


def item_estimates(statistic: Statistic, items: Codes, seed: int) -> list[Estimate]:
    """Return statistics of weighted judgments with 95% bootstrap intervals over items.

    Args:
        statistic: from weights of the judgments (B, N) to (B, S).
        items: (N,) item of each judgment, 0 to the number of items - 1.
        seed: of the resampling.
    """
    values = statistic(np.ones((1, len(items))))[0]
    one_annotator = np.zeros_like(items)
    intervals = two_way_intervals(statistic, items, one_annotator, RESAMPLES, seed)
    n = int(items.max()) + 1
    return [Estimate(float(v), ci, n) for v, ci in zip(values, intervals, strict=True)]


def fit_logistic(x: Floats, y: ArrayLike, weights: Floats, prior_sd: ArrayLike) -> Floats:
    """Return coefficients of logistic regressions, one for each row of weights: (B, P).

    Newton's method on the posterior mode; the same data with other weights are fitted together.

    Args:
        x: (N, P) predictors, the intercept included.
        y: (N,) outcomes from 0 to 1.
        weights: (B, N) of the observations.
        prior_sd: (P,) standard deviation of each coefficient's normal prior, its mean 0.
    """
    y, precision = np.asarray(y, dtype=np.float64), np.asarray(prior_sd, dtype=np.float64) ** -2.0
    products = (x[:, :, None] * x[:, None, :]).reshape(len(x), -1)  # (N, P * P)
    coefficients = np.zeros((len(weights), x.shape[1]))
    for _ in range(_ITERATIONS):
        log_odds = np.clip(coefficients @ x.T, -_MAX_LOG_ODDS, _MAX_LOG_ODDS)  # (B, N)
        p = 1 / (1 + np.exp(-log_odds))
        gradient = (weights * (y - p)) @ x - precision * coefficients  # (B, P)
        curvature = (weights * p * (1 - p)) @ products  # (B, P * P)
        curvature = curvature.reshape(*gradient.shape, -1) + np.diag(precision)
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        coefficients = coefficients + np.clip(step, -_MAX_STEP, _MAX_STEP)
    return coefficients
