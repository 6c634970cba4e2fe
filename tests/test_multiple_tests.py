"""Adjusted p-values."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperfitting.metrics.multiple_tests import holm


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_the_closed_test_with_bonferroni(p_values: list[float]) -> None:
    """A hypothesis is rejected if every set of hypotheses that contains it is (Marcus 1976)."""
    numbers = range(len(p_values))
    subsets = [s for n in numbers for s in combinations(numbers, n + 1)]
    expected = [
        max(min(1, len(s) * min(p_values[k] for k in s)) for s in subsets if i in s)
        for i in numbers
    ]
    assert holm(p_values) == pytest.approx(expected)


def test_holm_of_no_tests_is_empty() -> None:
    assert holm([]) == []


def test_holm_of_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
