"""MAUVE: how close the distribution of a model's texts is to that of real ones.

The measure of Pillutla et al. (2021), by its authors' package, from features that any model gives.
It compares sets, so it has no value a text and no interval; with fewer than a few hundred texts it
is biased and noisy, and only values from equally many texts compare.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hyperfitting.errors import UserError

SEEDS = 5
"""Clusterings averaged: one alone moves the value by several hundredths."""
LEAST = 100
"""Texts below which the clusters hold too little to say anything (a tenth as many clusters)."""


def check_installed() -> None:
    """Say what is missing, before anything is computed.

    Raises:
        UserError: the authors' package is not installed.
    """
    if importlib.util.find_spec("mauve") is None:
        raise UserError(
            "the package mauve-text, which measures it, is not installed",
            field="evaluation.mauve",
            value="on",
            hint="pip install 'hyperfitting[mauve]', or evaluation.mauve=null",
        )


def mauve(texts: NDArray[np.float32], real: NDArray[np.float32]) -> float:
    """Return the MAUVE of some texts against real ones, the mean over `SEEDS` clusterings.

    Args:
        texts: (N, H) features of a model's texts.
        real: (M, H) features of real texts.

    Returns:
        From 0 to 1 (the same distribution); NaN with fewer than `LEAST` texts on a side.
    """
    if min(len(texts), len(real)) < LEAST:
        return float("nan")
    from mauve import compute_mauve

    with _quiet():
        found = [
            compute_mauve(p_features=real, q_features=texts, seed=seed, verbose=False).mauve
            for seed in range(SEEDS)
        ]
    return float(np.mean(found))


@contextmanager
def _quiet() -> Iterator[None]:
    """Let nothing reach stderr: the C++ clustering warns at the package's own settings."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
