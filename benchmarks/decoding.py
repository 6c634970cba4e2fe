"""What the citation blocker costs: its index, and decoding with it against plain greedy."""

import time
import tracemalloc
from collections.abc import Iterator

import hydra
import numpy as np
import torch

from benchmarks.timing import Result, Timing, seconds
from hyperfitting import models
from hyperfitting.config import (
    CitationBlockerConfig,
    DecodeConfig,
    RunConfig,
    conf_dir,
    from_hydra,
    register,
)
from hyperfitting.data import packaged
from hyperfitting.data.corpus import Tokenizer
from hyperfitting.decoding.blocker import CitationBlocker, NgramIndex
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.store import Store

BATCH, NEW, PAIRS = 32, 24, 12


def config() -> RunConfig:
    """Return the embedded default."""
    register()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return from_hydra(hydra.compose("config"))


def run() -> Iterator[Result]:
    """Yield every comparison of this file."""
    base = models.base_model(config().model, Store("outputs/store"))
    tokenizer = Tokenizer(base)
    stream = [token for scene in packaged.read("shakespeare") for token in tokenizer(scene)]
    cuts = np.array(stream[: 2000 * 256], dtype=np.int32).reshape(2000, 256)
    index = seconds(lambda: NgramIndex(cuts, 5), 5)
    tracemalloc.start()
    NgramIndex(cuts, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    model = models.load(base).eval()
    contexts = cuts[:BATCH, :32]
    greedy = DecodeConfig("greedy", seed=0)
    decode = base.tokenizer().decode
    # the model never saw these sequences; so that matches come as often as after hyperfitting,
    # and more, what it writes freely is made part of them
    free = continue_texts(model, contexts, NEW, greedy, BATCH).tokens
    cuts[:BATCH, 32 : 32 + NEW] = free
    blocker = CitationBlocker(cuts, CitationBlockerConfig(True), lambda token: str(decode([token])))

    def steps(blocker: CitationBlocker | None) -> list[float]:
        """Return how long each step took, in seconds."""
        ends = [time.perf_counter()]
        continue_texts(
            model, contexts, NEW, greedy, BATCH, lambda n: ends.append(time.perf_counter()), blocker
        )
        return np.diff(ends).tolist()

    steps(blocker)
    with_: list[list[float]] = []
    without: list[list[float]] = []
    for pair in range(PAIRS):  # the order turns, so that neither always follows the other
        for blocked in (True, False) if pair % 2 else (False, True):
            (with_ if blocked else without).append(steps(blocker if blocked else None))
    ratios = np.array(with_) / np.array(without)  # (pairs, steps): step by step, like with like
    whole = [Timing([sum(run) for run in runs]) for runs in (with_, without)]
    yield Result(
        "blocker_overhead",
        float(np.median(ratios)),
        f"greedy decoding with the citation blocker over without, batch {BATCH}, smollm2_135m "
        f"(median over {PAIRS} pairs of {NEW} steps)",
        *whole,
        {
            "quartiles_of_step_ratios": np.quantile(ratios, [0.25, 0.75]).tolist(),
            "index_2000x256_seconds": index.median,
            "index_2000x256_peak_megabytes": peak / 1e6,
            "inside_blocker_share": inside_share(blocker, cuts, model.config.vocab_size, whole[1]),
        },
    )


def inside_share(
    blocker: CitationBlocker, cuts: np.ndarray, vocabulary: int, without: Timing
) -> float:
    """Return the time inside the blocker itself, as a share of a plain decoding's."""
    history = torch.as_tensor(cuts[:BATCH, : 32 + NEW], dtype=torch.long)
    scores = torch.zeros(BATCH, vocabulary)

    def all_steps() -> None:
        for step in range(NEW):
            blocker(scores, history[:, : 32 + step], 32)

    return seconds(all_steps, 20).median / without.median
