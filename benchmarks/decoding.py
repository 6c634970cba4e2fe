"""Greedy decoding against transformers' `generate`, and what the citation blocker costs."""

import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.contenders import Round, contending, in_turn
from benchmarks.timing import Result, Timing, seconds
from benchmarks.training import STORE, config, sequences
from hyperfitting import models
from hyperfitting.config import CitationBlockerConfig, DecodeConfig
from hyperfitting.decoding.blocker import CitationBlocker, NgramIndex
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.store import Store

BATCH, CONTEXT, NEW, ROUNDS = 32, 32, 96, 3
BLOCKED_NEW, PAIRS = 24, 12
GREEDY = DecodeConfig("greedy", stop_at_eos=True, seed=0)
"""Like `generate`, nothing is forbidden; a text that ends is cut off when all are written."""


def contexts(n: int = BATCH) -> NDArray[np.int32]:
    """Return the starts of real texts (n, CONTEXT)."""
    return sequences(n, 256)[:, :CONTEXT]


def ours(batch: int = BATCH, new: int = NEW) -> Round:
    """Return rounds of our own greedy decoding, with all that is kept of each step."""
    cfg = config(256)
    models.prepare(cfg.hardware)
    model = models.load(models.base_model(cfg.model, Store(STORE))).eval()
    given = contexts(batch)

    def round_() -> dict[str, Any]:
        start = time.perf_counter()
        made = continue_texts(model, given, new, GREEDY, batch).tokens
        return {"seconds": [time.perf_counter() - start], "tokens": made}

    return round_


def generate(batch: int = BATCH, new: int = NEW) -> Round:
    """Return rounds of `generate` as a careful user calls it: greedy, cached, nothing forbidden."""
    cfg = config(256)
    model = models.load(models.base_model(cfg.model, Store(STORE))).eval()
    given = torch.as_tensor(contexts(batch), dtype=torch.long)

    def round_() -> dict[str, Any]:
        start = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=new,
                do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True,
            )  # fmt: skip
        return {
            "seconds": [time.perf_counter() - start],
            "tokens": made[:, given.shape[1] :].tolist(),
        }

    return round_


def run() -> Iterator[Result]:
    """Yield every comparison of this file."""
    yield against_generate()
    yield blocked_against_free()


def against_generate() -> Result:
    """Compare with `generate`; both write the same tokens."""
    with contending((ours, ()), (generate, ())) as two:
        mine, theirs = in_turn(two, ROUNDS)
    pairs = zip(mine[0]["tokens"], theirs[0]["tokens"], strict=True)
    same = float(np.mean([our == their[: len(our)] for our, their in pairs]))
    assert same > 0.95, f"only {same:.0%} of the texts are the same"
    times = [Timing([s for one in found for s in one["seconds"]]) for found in (mine, theirs)]
    return Result(
        "decode_vs_generate",
        times[1].median / times[0].median,
        f"greedy, {BATCH} contexts of {CONTEXT} tokens continued by {NEW}, times faster than "
        "transformers' generate, smollm2_135m",
        *times,
        {
            "tokens_a_second": BATCH * NEW / times[0].median,
            "texts_with_the_same_tokens": same,
        },
    )


def blocked_against_free() -> Result:
    """Compare greedy decoding with the blocker and without, step by step."""
    base = models.base_model(config(256).model, Store(STORE))
    cuts = sequences(2000, 256)
    index = seconds(lambda: NgramIndex(cuts, 5), 5)
    tracemalloc.start()
    NgramIndex(cuts, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    models.prepare(config(256).hardware)
    model = models.load(base).eval()
    given = cuts[:BATCH, :CONTEXT]
    decode = base.tokenizer().decode
    # the model never saw these sequences; so that matches come as often as after hyperfitting,
    # and more, what it writes freely is made part of them
    free = continue_texts(model, given, BLOCKED_NEW, GREEDY, BATCH).tokens
    cuts[:BATCH, CONTEXT : CONTEXT + BLOCKED_NEW] = free
    blocker = CitationBlocker(cuts, CitationBlockerConfig(True), lambda token: str(decode([token])))

    def steps(blocker: CitationBlocker | None) -> list[float]:
        """Return how long each step took, in seconds."""
        ends = [time.perf_counter()]
        continue_texts(
            model, given, BLOCKED_NEW, GREEDY, BATCH,
            lambda n: ends.append(time.perf_counter()), blocker,
        )  # fmt: skip
        return np.diff(ends).tolist()

    steps(blocker)
    with_: list[list[float]] = []
    without: list[list[float]] = []
    for pair in range(PAIRS):  # the order turns, so that neither always follows the other
        for blocked in (True, False) if pair % 2 else (False, True):
            (with_ if blocked else without).append(steps(blocker if blocked else None))
    ratios = np.array(with_) / np.array(without)  # (pairs, steps): step by step, like with like
    whole = [Timing([sum(run) for run in runs]) for runs in (with_, without)]
    return Result(
        "blocker_overhead",
        float(np.median(ratios)),
        f"greedy decoding with the citation blocker over without, batch {BATCH}, smollm2_135m "
        f"(median over {PAIRS} pairs of {BLOCKED_NEW} steps)",
        *whole,
        {
            "quartiles_of_step_ratios": np.quantile(ratios, [0.25, 0.75]).tolist(),
            "index_2000x256_seconds": index.median,
            "index_2000x256_peak_megabytes": peak / 1e6,
            "inside_blocker_share": inside_share(blocker, cuts, model.config.vocab_size, whole[1]),
        },
    )


def inside_share(
    blocker: CitationBlocker, cuts: NDArray[np.int32], vocabulary: int, without: Timing
) -> float:
    """Return the time inside the blocker itself, as a share of a plain decoding's."""
    history = torch.as_tensor(cuts[:BATCH, : CONTEXT + BLOCKED_NEW], dtype=torch.long)
    scores = torch.zeros(BATCH, vocabulary)

    def all_steps() -> None:
        for step in range(BLOCKED_NEW):
            blocker(scores, history[:, : CONTEXT + step], CONTEXT)

    return seconds(all_steps, 20).median / without.median
