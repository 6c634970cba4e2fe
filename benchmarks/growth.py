"""How cost grows: of an update, of the trunk cache and of decoding, one dimension at a time."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.decoding import GREEDY, contexts
from benchmarks.timing import Result, Timing, seconds
from benchmarks.training import STORE, config, sequences
from hyperfitting import models, parameters
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.progress import silent
from hyperfitting.store import Store
from hyperfitting.training.loss import NextTokenLoss
from hyperfitting.training.trunk import KeptIn, trunk_of

REPEATS = 3
Job = Callable[[], object]


def run() -> Iterator[Result]:
    """Yield one result a dimension: how the time for each unit of size grows."""
    models.prepare(config(256).hardware)
    model = models.load(models.base_model(config(256).model, Store(STORE)))
    yield curve("gradient", "batch", {n: gradient(model, n, 128) for n in (1, 2, 4, 8)})
    yield curve("gradient", "length", {n: gradient(model, 4, n) for n in (64, 128, 256, 512)})
    yield curve("gradient", "depth", {n: cut(gradient(model, 4, 128), model, n) for n in DEPTHS})
    yield curve("trunk", "sequences", {n: trunk(model, n) for n in (8, 16, 32)})
    model.eval()
    yield curve("decode", "batch", {n: decode(model, n, 48) for n in (1, 4, 16, 32, 64)})
    yield curve("decode", "new_tokens", {n: decode(model, 16, n) for n in (24, 48, 96, 192)})
    yield curve("decode", "depth", {n: cut(decode(model, 16, 48), model, n) for n in DEPTHS})


DEPTHS = (10, 20, 30)


def curve(what: str, by: str, jobs: dict[int, Job]) -> Result:
    """Time jobs in turn, and return how much more the largest costs for each unit of size."""
    found: dict[int, list[float]] = {size: [] for size in jobs}
    for job in jobs.values():
        job()
    for _ in range(REPEATS):
        for size, job in jobs.items():
            found[size] += seconds(job, 1).seconds
    first, last = min(jobs), max(jobs)
    timings = {size: Timing(all_) for size, all_ in found.items()}
    once = timings[first].median / first
    return Result(
        f"growth_{what}_by_{by}",
        timings[last].median / last / once,
        f"seconds of {what} for each unit of {by}, at {last} over at {first} (1 is linear)",
        timings[last],
        timings[first],
        {
            "by": {
                str(size): {"seconds": one.median, "over_linear": one.median / size / once}
                for size, one in timings.items()
            }
        },
    )


def gradient(model: PreTrainedModel, batch: int, length: int) -> Job:
    """Return one forward and backward pass through all of a model."""
    tokens = torch.as_tensor(sequences(batch, length), dtype=torch.long)
    loss = NextTokenLoss(model)

    def job() -> None:
        model.zero_grad()
        loss(tokens).backward()

    return job


def cut(job: Job, model: PreTrainedModel, depth: int) -> Job:
    """Return a job as it is with the first blocks only."""

    def shallow() -> None:
        whole = model.config.num_hidden_layers
        model.config.num_hidden_layers = depth
        try:
            job()
        finally:
            model.config.num_hidden_layers = whole

    return shallow


def trunk(model: PreTrainedModel, n: int) -> Job:
    """Return the making of the trunk cache for ``n`` sequences of 128 tokens."""
    cfg = config(128, "tuning=late_stage")
    tokens = sequences(n, 128)

    def job() -> None:
        parameters.select_trainable(model, cfg.tuning)
        with tempfile.TemporaryDirectory() as folder:
            cfg.store = folder
            trunk_of(cfg, model, tokens, KeptIn(Store(Path(folder)), {}), silent)
        model.requires_grad_(True)

    return job


def decode(model: PreTrainedModel, batch: int, new: int) -> Job:
    """Return greedy decoding of ``batch`` texts by ``new`` tokens."""
    given: np.ndarray = contexts(batch)
    return lambda: continue_texts(model, given, new, GREEDY, batch)
