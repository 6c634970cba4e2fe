"""MAUVE: how close the distribution of a model's texts is to that of reference texts.

Pillutla et al. (2021), by the authors' package, from features of any model. It compares sets, so it
has no value per text and no interval. With fewer than a few hundred texts it is biased and noisy;
compare only values from equal numbers of texts.
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
"""Clusterings averaged: a single one moves the value by several hundredths."""
MIN_TEXTS = 100
"""Fewer texts leave too few clusters (a tenth as many) for the value to mean anything."""


def check_installed() -> None:
    """Refuse a config that measures MAUVE without the package, before anything is computed.

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


def mauve(texts: NDArray[np.float32], references: NDArray[np.float32]) -> float:
    """Return the MAUVE of a model's texts, averaged over `SEEDS` clusterings.

    Args:
        texts: (N, H) features of the model's texts.
        references: (M, H) features of the reference texts.

    Returns:
        From 0 to 1 (the same distribution); NaN with fewer than `MIN_TEXTS` texts on a side.
    """
    if min(len(texts), len(references)) < MIN_TEXTS:
        return float("nan")
    from mauve import compute_mauve

    with _silent_stderr():
        values = [
            compute_mauve(p_features=references, q_features=texts, seed=seed, verbose=False).mauve
            for seed in range(SEEDS)
        ]
    return float(np.mean(values))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard stderr, also of C++: the clustering warns about the package's own settings."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("w") as devnull:
            os.dup2(devnull.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
