"""Greedy decoding against transformers' `generate`, and the overhead of the citation blocker."""

import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from benchmarks.contenders import Round, contending, in_turn
from benchmarks.timing import Result, Timing, seconds
from benchmarks.training import STORE, config, sequences
from hyperfitting.data.tokenization import token_text_in_context
from hyperfitting.decoding.citation_blocker import CitationBlocker, NgramIndex
from hyperfitting.decoding.config import CitationBlockerConfig, DecodeConfig
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.models.base import BaseModel, base_model
from hyperfitting.models.loading import load
from hyperfitting.runtime.device import setup_torch
from hyperfitting.store.artifact import Store

BATCH_SIZE, CONTEXT_LEN, MAX_NEW_TOKENS, ROUNDS = 32, 32, 96, 3
BLOCKER_NEW_TOKENS, BLOCKER_PAIRS = 24, 12
GREEDY = DecodeConfig("greedy", stop_at_eos=True, seed=0)
"""EOS is not forbidden, as in `generate`; a text that ends is truncated after decoding."""


def contexts(n: int = BATCH_SIZE) -> NDArray[np.int32]:
    """Return the beginnings of real texts (n, CONTEXT_LEN)."""
    return sequences(n, 256)[:, :CONTEXT_LEN]


def embedded_base() -> BaseModel:
    """Return the default model, converted once."""
    base = base_model(config(256).model, Store(STORE))
    base.ensure()
    return base


def embedded_model() -> PreTrainedModel:
    """Return the default model, loaded."""
    return load(embedded_base()).eval()


def hyperfitting_greedy() -> Round:
    """Return rounds of our greedy decoding of texts."""
    setup_torch(config(256).hardware)
    return our_rounds(embedded_model(), contexts(), MAX_NEW_TOKENS)


def transformers_greedy() -> Round:
    """Return rounds of `generate` on the same texts."""
    return generate_rounds(embedded_model(), contexts(), MAX_NEW_TOKENS)


def our_rounds(model: PreTrainedModel, prompts: NDArray[np.int32], n_new: int) -> Round:
    """Return rounds of our greedy decoding in one batch, with the stats of each step."""
    return _timed(lambda: continue_texts(model, prompts, n_new, GREEDY, len(prompts)).tokens)


def generate_rounds(model: PreTrainedModel, prompts: NDArray[np.int32], n_new: int) -> Round:
    """Return rounds of `generate`, well configured: greedy, with a cache, no processors."""
    input_ids = torch.as_tensor(prompts, dtype=torch.long)  # (B, T)

    def generate() -> list[list[int]]:
        with torch.inference_mode():
            output_ids: torch.Tensor = model.generate(
                input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=n_new,
                do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True,
            )  # fmt: skip
        tokens: list[list[int]] = output_ids[:, input_ids.shape[1] :].tolist()
        return tokens

    return _timed(generate)


def _timed(decode: Callable[[], list[list[int]]]) -> Round:
    def run_round() -> dict[str, Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = decode()
        return {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "tokens": tokens,
        }

    return run_round


def rounds_in_turn(
    ours: Callable[[], Round], theirs: Callable[[], Round]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], float]:
    """Return the rounds of both, and the fraction of the prompts with the same tokens.

    Near ties, kernels may choose either token: a few prompts may differ.
    """
    with contending((ours, ()), (theirs, ())) as contenders:
        our_rounds, their_rounds = in_turn(contenders, ROUNDS)
    pairs = zip(our_rounds[0]["tokens"], their_rounds[0]["tokens"], strict=True)
    same_tokens = float(np.mean([our == their[: len(our)] for our, their in pairs]))
    assert same_tokens > 0.95, f"only {same_tokens:.0%} have the same tokens"
    return our_rounds, their_rounds, same_tokens


def timing(rounds: list[dict[str, Any]], key: str = "seconds") -> Timing:
    """Return one measurement of all rounds."""
    return Timing([measured[key] for measured in rounds])


def run() -> Iterator[Result]:
    """Yield every comparison of this file."""
    yield decode_vs_generate()
    yield blocker_overhead()


def decode_vs_generate() -> Result:
    """Compare greedy decoding of texts with `generate`."""
    ours, theirs, same_tokens = rounds_in_turn(hyperfitting_greedy, transformers_greedy)
    our_timing, their_timing = timing(ours), timing(theirs)
    return Result(
        "decode_vs_generate",
        their_timing.median / our_timing.median,
        f"greedy, {BATCH_SIZE} contexts of {CONTEXT_LEN} tokens continued by {MAX_NEW_TOKENS}, "
        "times faster than transformers' generate, smollm2_135m",
        our_timing,
        their_timing,
        {
            "tokens_per_second": BATCH_SIZE * MAX_NEW_TOKENS / our_timing.median,
            "texts_with_the_same_tokens": same_tokens,
        },
    )


def blocker_overhead() -> Result:
    """Compare the steps of greedy decoding with and without the blocker."""
    training_data = sequences(2000, 256)
    index_seconds = seconds(lambda: NgramIndex(training_data, 5), 5)
    tracemalloc.start()
    NgramIndex(training_data, 5)
    index_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    setup_torch(config(256).hardware)
    base = embedded_base()
    model = load(base).eval()
    prompts = training_data[:BATCH_SIZE, :CONTEXT_LEN]
    # the model is not trained on these sequences: its own continuations are inserted, so that
    # matches are at least as frequent as after hyperfitting
    unconstrained = continue_texts(model, prompts, BLOCKER_NEW_TOKENS, GREEDY, BATCH_SIZE).tokens
    training_data[:BATCH_SIZE, CONTEXT_LEN : CONTEXT_LEN + BLOCKER_NEW_TOKENS] = unconstrained
    token_text = token_text_in_context(base.tokenizer())
    blocker = CitationBlocker(training_data, CitationBlockerConfig(True), token_text)

    def step_seconds(blocker: CitationBlocker | None) -> list[float]:
        """Return the duration of each step, in seconds."""
        ends = [time.perf_counter()]

        def advance(n: int, **shown: float) -> None:
            ends.append(time.perf_counter())

        continue_texts(model, prompts, BLOCKER_NEW_TOKENS, GREEDY, BATCH_SIZE, advance, blocker)
        return list(np.diff(ends))

    step_seconds(blocker)  # warm up
    with_blocker: list[list[float]] = []
    without_blocker: list[list[float]] = []
    for pair in range(BLOCKER_PAIRS):  # alternate the order within pairs
        for is_blocked in (True, False) if pair % 2 else (False, True):
            durations = with_blocker if is_blocked else without_blocker
            durations.append(step_seconds(blocker if is_blocked else None))
    step_ratios = np.array(with_blocker) / np.array(without_blocker)  # (pairs, steps)
    blocked, unblocked = (
        Timing([sum(r) for r in durations]) for durations in (with_blocker, without_blocker)
    )
    vocab_size = model.config.vocab_size
    blocker_seconds = blocker_only(blocker, training_data, vocab_size).median
    return Result(
        "blocker_overhead",
        float(np.median(step_ratios)),
        f"greedy decoding with the citation blocker over without, batch {BATCH_SIZE}, smollm2_135m "
        f"(median over {BLOCKER_PAIRS} pairs of {BLOCKER_NEW_TOKENS} steps)",
        blocked,
        unblocked,
        {
            "quartiles_of_step_ratios": np.quantile(step_ratios, [0.25, 0.75]).tolist(),
            "index_2000x256_seconds": index_seconds.median,
            "index_2000x256_peak_megabytes": index_peak / 1e6,
            "blocker_fraction": blocker_seconds / unblocked.median,
        },
    )


def blocker_only(
    blocker: CitationBlocker, training_data: NDArray[np.int32], vocab_size: int
) -> Timing:
    """Time the blocker's calls of one decoding, without a model."""
    texts = training_data[:BATCH_SIZE, : CONTEXT_LEN + BLOCKER_NEW_TOKENS]
    input_ids = torch.as_tensor(texts, dtype=torch.long)
    scores = torch.zeros(BATCH_SIZE, vocab_size)

    def all_steps() -> None:
        for step in range(BLOCKER_NEW_TOKENS):
            blocker(input_ids[:, : CONTEXT_LEN + step], scores, CONTEXT_LEN)

    return seconds(all_steps, 20)
