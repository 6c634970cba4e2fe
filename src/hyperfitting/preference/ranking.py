"""Strengths of systems from paired comparisons: Bradley-Terry with ties (Davidson, 1970).

    P(i beats j) = s_i / (s_i + s_j + 2 v sqrt(s_i s_j)),  P(tie) = 2 v sqrt(s_i s_j) / (the same)

fitted by Newman's iteration (2023, JMLR 24) in evalica.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hyperfitting.errors import UserError
from hyperfitting.preference.bootstrap import Codes, Interval, two_way_intervals
from hyperfitting.preference.items import Choice

Floats = NDArray[np.float64]
_OUTCOMES: tuple[Choice, ...] = ("equal", "first", "second")
"""In the order of `evalica.Winner`: draw, X, Y. "Both bad" is a tie."""
_TOLERANCE = 1e-8
_LIMIT, _RESAMPLE_LIMIT = 100_000, 1000
"""Iterations; a resample that is all but separated would take very many."""


class Comparisons:
    """Judgments of pairs of systems, aggregated by pair and outcome."""

    def __init__(self, pairs: Sequence[tuple[str, str]], choices: Sequence[Choice]) -> None:
        self.systems = sorted({system for pair in pairs for system in pair})
        index = {system: i for i, system in enumerate(self.systems)}
        rows = [
            (index[a], index[b], _OUTCOMES.index(choice if choice in _OUTCOMES else "equal"))
            for (a, b), choice in zip(pairs, choices, strict=True)
        ]
        kinds, codes = np.unique(np.array(rows, dtype=np.intp), axis=0, return_inverse=True)
        self._first, self._second, self._outcome = kinds.T
        self._codes = np.zeros((len(rows), len(kinds)))  # one-hot (N, T)
        self._codes[np.arange(len(rows)), codes.ravel()] = 1

    def fit(self, weights: Floats, limit: int = _LIMIT) -> tuple[Floats, float]:
        """Return the log strengths (S,), their mean 0, and v; NaN where there is no estimate.

        It exists if, of any two groups of systems, each has won or tied against the other once.

        Args:
            weights: (T,) judgments of each pair and outcome.
            limit: of the iterations.
        """
        import evalica

        if not self._is_connected(weights):
            return np.full(len(self.systems), np.nan), np.nan
        winners = [evalica.WINNERS[outcome] for outcome in self._outcome]
        result = evalica.newman(
            self._first.tolist(),
            self._second.tolist(),
            winners,
            weights=weights.tolist(),
            tolerance=_TOLERANCE,
            limit=limit,
        )
        strengths = result.scores.reindex(range(len(self.systems))).to_numpy(dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(strengths)
        return logs - logs.mean(), float(result.v)

    def _is_connected(self, weights: Floats) -> bool:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        counted = weights > 0
        first, second, outcome = (
            values[counted] for values in (self._first, self._second, self._outcome)
        )
        not_lost = [(first[outcome != 2], second[outcome != 2])]
        not_lost.append((second[outcome != 1], first[outcome != 1]))
        rows, columns = (np.concatenate(ends) for ends in zip(*not_lost, strict=True))
        n = len(self.systems)
        graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(n, n))
        return int(connected_components(graph, connection="strong")[0]) == 1

    def log_strengths(self, weights: Floats) -> Floats:
        """Return the log strengths (B, S) under weights of the judgments (B, N)."""
        return np.array([self.fit(row, _RESAMPLE_LIMIT)[0] for row in weights @ self._codes])

    def intervals(
        self, items: Codes, annotators: Codes, resamples: int, seed: int
    ) -> list[Interval]:
        """Return the interval of each log strength; arguments as of `two_way_intervals`."""
        return two_way_intervals(self.log_strengths, items, annotators, resamples, seed)

    def totals(self) -> Floats:
        """Return the judgments of each pair and outcome (T,), all of weight 1."""
        return np.asarray(self._codes.sum(axis=0))


def require_evalica() -> None:
    """Refuse to go on without evalica.

    Raises:
        UserError: it is not installed.
    """
    try:
        import evalica  # noqa: F401
    except ImportError as error:
        raise UserError(
            "Bradley-Terry strengths need the package evalica, which is not installed",
            hint="pip install 'hyperfitting[preference]'",
        ) from error
