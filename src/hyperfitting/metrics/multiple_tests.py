"""p-values of many tests, adjusted to bound the probability of any false rejection."""

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's step-down method (Holm, 1979), in the given order.

    Rejecting those below a level bounds the probability of any false rejection by that level,
    whatever the dependence between the tests.

    Args:
        p_values: of all tests of the family.
    """
    n, adjusted, highest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(n), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (n - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
