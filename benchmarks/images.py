"""Greedy completion of digits against transformers' `generate`."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, PreTrainedModel

from benchmarks.contenders import Round
from benchmarks.decoding import generate_rounds, our_rounds, rounds_in_turn, timing
from benchmarks.timing import Result
from benchmarks.training import config
from hyperfitting.models.random_init import initialized_model
from hyperfitting.runtime.device import setup_torch

N_IMAGES, N_PIXELS, CONTEXT_LEN, N_COLORS = 512, 64, 17, 17


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
    """Return rounds of our greedy decoding of images."""
    setup_torch(config(N_PIXELS).hardware)
    return our_rounds(model(), contexts(), N_PIXELS + 1 - CONTEXT_LEN)


def transformers_greedy() -> Round:
    """Return rounds of `generate` on the same images."""
    return generate_rounds(model(), contexts(), N_PIXELS + 1 - CONTEXT_LEN)


def run() -> Iterator[Result]:
    """Yield the comparison."""
    ours, theirs, same_tokens = rounds_in_turn(hyperfitting_greedy, transformers_greedy)
    our_timing, their_timing = timing(ours), timing(theirs)
    yield Result(
        "image_completion_vs_generate",
        their_timing.median / our_timing.median,
        f"greedy, {N_IMAGES} images of {N_PIXELS} pixels completed from their first quarter, times "
        "faster than transformers' generate, the size of imagegpt_digits",
        our_timing,
        their_timing,
        {
            "cpu_seconds": timing(ours, "cpu_seconds").median,
            "cpu_seconds_of_generate": timing(theirs, "cpu_seconds").median,
            "images_with_the_same_tokens": same_tokens,
        },
    )
