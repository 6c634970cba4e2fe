"""Intervals by resampling texts, for many numbers at once: by layer, and of ratios."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.record.mechanism import LayerCurve

Floats = NDArray[np.float64]
_SEED = 0


class Resampling:
    """Bootstrap resamples of N texts, the same for everything that is computed of them.

    Args:
        n_texts: N.
        resamples: B.
    """

    def __init__(self, n_texts: int, resamples: int) -> None:
        self._n = n_texts
        shares = np.full(n_texts, 1 / n_texts)
        random = np.random.default_rng(_SEED)
        self.counts: Floats = random.multinomial(n_texts, shares, resamples).astype(np.float64)
        """(B, N) how often each text was drawn."""

    def ratio(self, numerators: ArrayLike, denominators: ArrayLike) -> Estimate | None:
        """Return the sum of some numbers over that of others, such as counts, with its interval.

        Args:
            numerators: (N,) one of each text.
            denominators: (N,)

        Returns:
            None if all denominators are 0.
        """
        a, b = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
        n_valued = int((b > 0).sum())
        if n_valued == 0:
            return None
        with np.errstate(invalid="ignore"):  # a resample without any
            resampled = (self.counts @ a) / (self.counts @ b)
        ci95 = _interval(resampled) if n_valued > 1 else None
        return Estimate(float(a.sum() / b.sum()), ci95, n_valued)

    def mean(self, values: ArrayLike) -> Estimate | None:
        """Return the mean of one value of each text (N,); texts without one (NaN) are left out."""
        x = np.asarray(values, np.float64)
        return self.ratio(np.nan_to_num(x), ~np.isnan(x))

    def curve(self, layers: Sequence[str], values: ArrayLike) -> LayerCurve:
        """Return the mean at each layer of one value of each text. ``values``: (P, N)."""
        return curve_of(layers, [self.mean(row) for row in np.asarray(values, np.float64)])

    def squared_norms(self, gram: Floats) -> Floats:
        """Return the squared norms (B,) of resampled sums, relative to that of the whole sum.

        Two draws of one text are not two texts: their inner product would be its squared norm, and
        the resampled norms too large. So the products are those of distinct texts, and each draw
        counts its own squared norm once (a bootstrap of the U-statistic).

        Args:
            gram: (N, N) inner products of the texts' terms.
        """
        own = np.diag(gram)
        between = ((self.counts @ gram) * self.counts).sum(1) - np.square(self.counts) @ own
        norms: Floats = between * self._n / max(self._n - 1, 1) + self.counts @ own
        norms /= gram.sum()
        return norms


def curve_of(layers: Sequence[str], estimates: Sequence[Estimate | None]) -> LayerCurve:
    """Return estimates by layer; the curve has intervals if each of them has one."""
    intervals = [estimate.ci95 for estimate in estimates if estimate is not None]
    has_intervals = len(intervals) == len(estimates) and all(intervals)
    return LayerCurve(
        layers=list(layers),
        mean=[None if estimate is None else estimate.mean for estimate in estimates],
        ci95=[ci95 for ci95 in intervals if ci95 is not None] if has_intervals else None,
    )


def estimate(value: float, resampled: Floats, n: int) -> Estimate | None:
    """Return a number with the interval of its resampled values (B,); none for a single text.

    None if it is not defined, such as the CKA of three tokens.
    """
    if not np.isfinite(value):
        return None
    return Estimate(value, _interval(resampled) if n > 1 else None, n)


def _interval(resampled: Floats) -> tuple[float, float] | None:
    defined = resampled[np.isfinite(resampled)]
    if len(defined) == 0:
        return None
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)
