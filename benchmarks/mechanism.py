"""Layer geometry of both models against the token statistics of both, on the same texts."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from benchmarks.decoding import embedded_model
from benchmarks.timing import Result, interleaved
from benchmarks.training import config, sequences
from hyperfitting.evaluation.forward import compute_token_stats
from hyperfitting.mechanism.config import MechanismConfig
from hyperfitting.mechanism.geometry import compute_geometry
from hyperfitting.mechanism.texts import Texts
from hyperfitting.runtime.device import setup_torch

TEXTS, LENGTH, BATCH_SIZE, ROUNDS = 72, 256, 8, 3


def run() -> Iterator[Result]:
    """Yield the comparison; the two models are equal, which changes no operation."""
    setup_torch(config(LENGTH).hardware)
    models = embedded_model(), embedded_model()
    tokens = sequences(TEXTS, LENGTH)
    texts = Texts(tokens, np.full(TEXTS, LENGTH), [[""] * LENGTH] * TEXTS, ["a"] * TEXTS)
    geometry = partial(compute_geometry, *models, texts, MechanismConfig(["geometry"]), BATCH_SIZE)
    ours, peer = interleaved(
        geometry, lambda: [compute_token_stats(m, tokens, BATCH_SIZE) for m in models], ROUNDS
    )
    yield Result(
        "geometry_vs_token_stats",
        ours.median / peer.median,
        f"layer geometry of two models on {TEXTS} texts of {LENGTH} tokens, over the time of the "
        "token statistics of both, smollm2_135m",
        ours,
        peer,
        {},
    )
