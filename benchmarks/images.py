"""Greedy completion of digits against transformers' `generate`."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, PreTrainedModel

from benchmarks.contenders import Round, contending, in_turn
from benchmarks.decoding import GREEDY
from benchmarks.timing import Result, Timing
from benchmarks.training import config
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.models.random_init import initialized_model
from hyperfitting.runtime.device import setup_torch

N_IMAGES, N_PIXELS, CONTEXT_LEN, N_COLORS, ROUNDS = 512, 64, 17, 17, 3


def model() -> PreTrainedModel:
    """Return an ImageGPT of the size of model=imagegpt_digits, with random weights."""
    return initialized_model(
        AutoConfig.for_model(
            "imagegpt", n_embd=128, n_layer=4, n_head=4, n_positions=N_PIXELS,
            vocab_size=N_COLORS + 1,
        )
    ).eval()  # fmt: skip


def contexts() -> NDArray[np.int32]:
    """Return SOS and the first quarter of random images, (N_IMAGES, CONTEXT_LEN)."""
    pixels = np.random.default_rng(0).integers(N_COLORS, size=(N_IMAGES, CONTEXT_LEN))
    pixels[:, 0] = N_COLORS
    return pixels.astype(np.int32)


def hyperfitting_greedy() -> Round:
    """Return rounds of our greedy decoding in one batch too, with the stats of each step."""
    setup_torch(config(N_PIXELS).hardware)
    ours, prompts, length = model(), contexts(), N_PIXELS + 1 - CONTEXT_LEN
    return _timed(lambda: continue_texts(ours, prompts, length, GREEDY, N_IMAGES).tokens)


def transformers_greedy() -> Round:
    """Return rounds of `generate`, all images in one batch, with a cache and no processors."""
    theirs, input_ids = model(), torch.as_tensor(contexts(), dtype=torch.long)

    def generate() -> list[list[int]]:
        with torch.inference_mode():
            output_ids: torch.Tensor = theirs.generate(
                input_ids, attention_mask=torch.ones_like(input_ids),
                max_new_tokens=N_PIXELS + 1 - CONTEXT_LEN, do_sample=False, eos_token_id=None,
                pad_token_id=0, use_cache=True,
            )  # fmt: skip
        tokens: list[list[int]] = output_ids[:, CONTEXT_LEN:].tolist()
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


def run() -> Iterator[Result]:
    """Yield the comparison; both give the same tokens."""
    with contending((hyperfitting_greedy, ()), (transformers_greedy, ())) as contenders:
        ours, theirs = in_turn(contenders, ROUNDS)
    pairs = zip(ours[0]["tokens"], theirs[0]["tokens"], strict=True)
    same_tokens = float(np.mean([our == their for our, their in pairs]))
    assert same_tokens > 0.95, f"only {same_tokens:.0%} of the images are the same"
    our_timing, their_timing = (Timing([r["seconds"] for r in rounds]) for rounds in (ours, theirs))
    our_cpu, their_cpu = (Timing([r["cpu_seconds"] for r in rounds]) for rounds in (ours, theirs))
    yield Result(
        "image_completion_vs_generate",
        their_timing.median / our_timing.median,
        f"greedy, {N_IMAGES} images of {N_PIXELS} pixels completed from their first quarter, times "
        "faster than transformers' generate, the size of imagegpt_digits",
        our_timing,
        their_timing,
        {
            "cpu_seconds": our_cpu.median,
            "cpu_seconds_of_generate": their_cpu.median,
            "images_with_the_same_tokens": same_tokens,
        },
    )
