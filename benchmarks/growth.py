"""Scaling of a gradient, the activation cache and decoding, one dimension at a time."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.decoding import GREEDY, contexts
from benchmarks.timing import Result, Timing, seconds
from benchmarks.training import STORE, config, sequences
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.models import trainable
from hyperfitting.models.base import base_model
from hyperfitting.models.loading import load
from hyperfitting.progress import no_op
from hyperfitting.runtime.device import setup_torch
from hyperfitting.store.artifact import Store
from hyperfitting.training.activation_cache import CacheLocation, build_activation_cache
from hyperfitting.training.loss import NextTokenLoss

REPEATS = 3
DEPTHS = (10, 20, 30)
Job = Callable[[], object]


def run() -> Iterator[Result]:
    """Yield one result per dimension: how the time per unit of size grows."""
    cfg = config(256)
    setup_torch(cfg.hardware)
    base = base_model(cfg.model, Store(STORE))
    base.ensure()
    model = load(base)
    yield scaling("gradient", "batch", {n: gradient(model, n, 128) for n in (1, 2, 4, 8)})
    yield scaling("gradient", "length", {n: gradient(model, 4, n) for n in (64, 128, 256, 512)})
    yield scaling(
        "gradient", "depth", {n: truncated(gradient(model, 4, 128), model, n) for n in DEPTHS}
    )
    yield scaling(
        "activation_cache", "sequences", {n: activation_cache(model, n) for n in (8, 16, 32)}
    )
    model.eval()
    yield scaling("decode", "batch", {n: decode(model, n, 48) for n in (1, 4, 16, 32, 64)})
    yield scaling("decode", "max_new_tokens", {n: decode(model, 16, n) for n in (24, 48, 96, 192)})
    yield scaling(
        "decode", "depth", {n: truncated(decode(model, 16, 48), model, n) for n in DEPTHS}
    )


def scaling(name: str, dimension: str, jobs: dict[int, Job]) -> Result:
    """Time jobs by size, interleaved; the ratio is that of the time per unit, largest to smallest.

    Args:
        name: of what is timed.
        dimension: whose size varies.
        jobs: by size.
    """
    measured: dict[int, list[float]] = {size: [] for size in jobs}
    for job in jobs.values():
        job()  # warm up
    for _ in range(REPEATS):
        for size, job in jobs.items():
            measured[size] += seconds(job, 1).seconds
    smallest, largest = min(jobs), max(jobs)
    timings = {size: Timing(values) for size, values in measured.items()}
    per_unit = {size: timing.median / size for size, timing in timings.items()}
    return Result(
        f"growth_{name}_by_{dimension}",
        per_unit[largest] / per_unit[smallest],
        f"seconds of {name} per unit of {dimension}, at {largest} over at {smallest} (1 is linear)",
        timings[largest],
        timings[smallest],
        {
            "by_size": {
                str(size): {
                    "seconds": timing.median,
                    "over_linear": per_unit[size] / per_unit[smallest],
                }
                for size, timing in timings.items()
            }
        },
    )


def gradient(model: PreTrainedModel, batch: int, length: int) -> Job:
    """Return a job of one forward and backward pass through the whole model."""
    tokens = torch.as_tensor(sequences(batch, length), dtype=torch.long)  # (B, T)
    loss = NextTokenLoss(model)

    def job() -> None:
        model.zero_grad()
        loss(tokens).backward()

    return job


def truncated(job: Job, model: PreTrainedModel, depth: int) -> Job:
    """Return a job that runs with the model's first blocks only."""

    def truncated_job() -> None:
        n_layers = model.config.num_hidden_layers
        model.config.num_hidden_layers = depth
        try:
            job()
        finally:
            model.config.num_hidden_layers = n_layers

    return truncated_job


def activation_cache(model: PreTrainedModel, n: int) -> Job:
    """Return a job that builds the activation cache of ``n`` sequences of 128 tokens."""
    cfg = config(128, "tuning=late_stage").training
    tokens = sequences(n, 128)

    def job() -> None:
        trainable.select_trainable(model, cfg.tuning)
        with tempfile.TemporaryDirectory() as folder:
            location = CacheLocation(Store(Path(folder)), {})
            build_activation_cache(cfg, model, "float32", tokens, location, no_op)
        model.requires_grad_(True)

    return job


def decode(model: PreTrainedModel, batch: int, max_new_tokens: int) -> Job:
    """Return a job of greedy decoding of ``batch`` contexts."""
    prompts = contexts(batch)
    return lambda: continue_texts(model, prompts, max_new_tokens, GREEDY, batch)
