"""Training speed and memory against HF Trainer, and against a large matrix product."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hydra
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.contenders import Round, contending, in_turn, peak_memory
from benchmarks.hf_trainer import build_trainer
from benchmarks.timing import Result, Timing
from hyperfitting.config import RunConfig, conf_dir, from_hydra, register
from hyperfitting.data import packaged
from hyperfitting.data.tokenization import DocumentTokenizer
from hyperfitting.models import trainable
from hyperfitting.models.base import base_model
from hyperfitting.models.loading import load
from hyperfitting.progress import Advance, ProgressReporter, no_op
from hyperfitting.runtime.device import setup_torch
from hyperfitting.store.artifact import Store
from hyperfitting.training.activation_cache import CacheLocation
from hyperfitting.training.step import TrainState, build_train_state, train_step

SHAPES = ((8, 128), (8, 256))
ROUNDS = 3
STEPS = {"full": 2, "late_stage": 5}
BLOCKS = 5
EPOCHS = 20
STORE = "outputs/store"


def config(length: int, *overrides: str) -> RunConfig:
    """Return the paper's protocol on the embedded model: 2,000 sequences, 20 epochs."""
    register()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        base_overrides = ["preset=paper", f"dataset.seq_len={length}"]
        if "tuning=late_stage" in overrides:
            base_overrides.append(f"tuning.last_blocks={BLOCKS}")
        return from_hydra(hydra.compose("config", overrides=[*base_overrides, *overrides]))


def sequences(n: int, length: int) -> NDArray[np.int32]:
    """Return real text as token sequences (n, length)."""
    base = base_model(config(length).model, Store(STORE))
    base.ensure()
    tokenizer = DocumentTokenizer(base)
    stream: list[int] = []
    for scene in packaged.read("shakespeare"):
        stream += tokenizer(scene)
        if len(stream) >= n * length:
            break
    return np.array(stream[: n * length], dtype=np.int32).reshape(n, length)


def our_trainer(batch: int, length: int, tuning: str) -> Round:
    """Return rounds of our train steps, with a large matrix product after each."""
    cfg = config(length, f"tuning={tuning}", f"trainer.batch_size={batch}")
    setup_torch(cfg.hardware)
    base = base_model(cfg.model, Store(STORE))
    base.ensure()
    steps = STEPS[tuning]
    tokens = sequences(steps * batch, length)
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        location = CacheLocation(Store(folder), {"sequences": "benchmark"})
        state = build_train_state(cfg.training, base, tokens, location, progress=timed(measured))
        if state.activation_cache is not None:
            state.activation_cache.activations[:].sum()  # read into memory: the file is deleted
    flops_per_token = {"full": full_flops, "late_stage": late_stage_flops}[tuning](state, length)
    state.model.train()

    def run_round() -> dict[str, Any]:
        seconds = []
        for step in range(steps):
            rows = np.arange(step * batch, (step + 1) * batch)
            start = time.perf_counter()
            float(train_step(state, torch.as_tensor(tokens[rows], dtype=torch.long), rows))
            seconds.append(time.perf_counter() - start)
        measured.setdefault("training_memory", peak_memory())  # before the matrix product
        flops_per_second = flops_per_token * batch * length / np.array(seconds)
        fractions = (flops_per_second / matmul_flops_per_second()).tolist()
        return {"seconds": seconds, "matmul_fraction": fractions, **measured}

    return run_round


def timed(measured: dict[str, Any]) -> ProgressReporter:
    """Return a reporter that records the seconds per token of the activation cache."""

    @contextmanager
    def reporter(task: str, total: int, unit: str) -> Iterator[Advance]:
        start = time.perf_counter()
        with no_op(task, total, unit) as advance:
            yield advance
        measured["cache_seconds_per_token"] = (time.perf_counter() - start) / total

    return reporter


def full_flops(state: TrainState, length: int) -> float:
    """Return the FLOPs per token of full tuning (Chowdhery et al., 2022, App. B).

    Six for each parameter, and attention's two products forward and twice that backward.
    """
    config = state.model.config
    n = sum(p.numel() for p in state.model.parameters())
    return float(6 * n + 12 * config.num_hidden_layers * config.hidden_size * length)


def late_stage_flops(state: TrainState, length: int) -> float:
    """Return the same for the last blocks, and an output layer whose weights are frozen."""
    config = state.model.config
    n = sum(p.numel() for p in state.trained.values())
    head = state.model.get_output_embeddings().weight.numel()
    return float(6 * n + 4 * head + 12 * BLOCKS * config.hidden_size * length)


def matmul_flops_per_second(size: int = 4096, repeats: int = 3) -> float:
    """Return the FLOP/s of a large float32 matrix product in this process."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = a @ b
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / float(np.median(seconds))


def hf_trainer(batch: int, length: int, tuning: str) -> Round:
    """Return rounds of HF Trainer."""
    cfg, steps = config(length), STEPS[tuning]
    base = base_model(cfg.model, Store(STORE))
    base.ensure()
    model = load(base)
    if tuning != "full":
        trainable.select_trainable(model, config(length, f"tuning={tuning}").tuning)
    starts: list[float] = []
    ends: list[float] = []
    trainer = build_trainer(
        model, sequences(steps * batch, length).tolist(), batch, steps + 1,
        lambda _: starts.append(time.perf_counter()), lambda _: ends.append(time.perf_counter()),
        output_dir=tempfile.mkdtemp(), use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip

    def run_round() -> dict[str, Any]:
        starts.clear()
        ends.clear()
        trainer.train()
        # the first step of a call allocates the optimizer's state
        return {"seconds": [end - start for start, end in zip(starts, ends, strict=True)][1:]}

    return run_round


def _concatenate(rounds: list[dict[str, Any]], name: str) -> list[float]:
    return [value for measured in rounds for value in measured[name]]


def run() -> Iterator[Result]:
    """Yield every comparison of this file: of both shapes, the one that is worse for us.

    Memory is compared at the shape that needs more of it.
    """
    by_key: dict[str, list[Result]] = {}
    for batch, length in SHAPES:
        for result in compare(batch, length):
            by_key.setdefault(result.key, []).append(result)
    for key, results in by_key.items():
        worst = min(results, key=lambda result: result.ratio)
        if key == "train_full_memory_vs_trainer":
            worst = results[-1]
        for (batch, length), result in zip(SHAPES, results, strict=True):
            worst.more[f"at {batch}x{length}"] = result.ratio
        yield worst


def compare(batch: int, length: int) -> Iterator[Result]:
    """Yield the comparisons at one shape."""
    shape = f"batch {batch} x {length}, smollm2_135m"
    with contending(
        (our_trainer, (batch, length, "full")),
        (hf_trainer, (batch, length, "full")),
        (our_trainer, (batch, length, "late_stage")),
    ) as contenders:
        full, peer, late = in_turn(contenders, ROUNDS)
    ours, theirs, ours_late = (
        Timing(_concatenate(rounds, "seconds")) for rounds in (full, peer, late)
    )
    yield Result(
        "train_full_vs_trainer",
        theirs.median / ours.median,
        f"full tuning, times faster than HF Trainer, {shape}",
        ours,
        theirs,
        {"tokens_per_second": batch * length / ours.median},
    )
    our_memory = full[0]["training_memory"]
    their_memory = max(measured["peak_memory"] for measured in peer)
    yield Result(
        "train_full_memory_vs_trainer",
        our_memory / their_memory,
        f"full tuning, peak memory of the process over HF Trainer's, {shape}",
        ours,
        theirs,
        {"our_gigabytes": our_memory / 1e9, "their_gigabytes": their_memory / 1e9},
    )
    fractions = _concatenate(full, "matmul_fraction")
    yield Result(
        "train_full_of_matmul",
        float(np.median(fractions)),
        f"full tuning, model FLOP/s over those of a 4096^3 float32 matrix product, {shape}",
        ours,
        theirs,
        {"fractions": fractions},
    )
    cache_seconds = late[0]["cache_seconds_per_token"] * batch * length
    yield Result(
        "train_late_stage_vs_trainer_full",
        theirs.median / (ours_late.median + cache_seconds / EPOCHS),
        f"the last {BLOCKS} blocks from the activation cache, times faster than HF Trainer on all, "
        f"the computation of the cache divided by {EPOCHS} epochs, {shape}",
        ours_late,
        theirs,
        {
            "cache_seconds_per_batch": cache_seconds,
            "matmul_fraction": float(np.median(_concatenate(late, "matmul_fraction"))),
            "tokens_per_second": batch * length / ours_late.median,
        },
    )
    with contending(
        (our_trainer, (batch, length, "late_stage")), (hf_trainer, (batch, length, "late_stage"))
    ) as contenders:
        late, frozen = in_turn(contenders, ROUNDS)
    ours, theirs = (Timing(_concatenate(rounds, "seconds")) for rounds in (late, frozen))
    yield Result(
        "train_late_stage_vs_trainer_frozen",
        theirs.median / ours.median,
        f"the last {BLOCKS} blocks from the activation cache, from epoch 2 on, times faster than "
        f"HF Trainer with the other blocks frozen, {shape}",
        ours,
        theirs,
        {},
    )
