"""Where the time of a train step and of decoding goes, by kind of operation."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.profiler import profile

from benchmarks.decoding import BATCH_SIZE, GREEDY, contexts, embedded_base, embedded_model
from benchmarks.timing import Result, Timing, seconds
from benchmarks.training import BLOCKS, config, sequences
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.runtime.device import setup_torch
from hyperfitting.store.artifact import Store
from hyperfitting.training.activation_cache import CacheLocation
from hyperfitting.training.step import build_train_state, train_step

SEQUENCES, LENGTH, MAX_NEW_TOKENS = 8, 256, 32
_KINDS = {
    "matrix products": (
        "aten::mm",
        "aten::addmm",
        "aten::addmm_",
        "aten::bmm",
        "mkl::_mkl_linear",
        "mkldnn::_linear_pointwise",
    ),
    "attention": ("aten::_scaled_dot_product",),
    "compiled": ("## Call CompiledFxGraph",),
    "optimizer": ("aten::_fused_adam_",),
    "softmax": ("aten::_log_softmax", "aten::exp"),
}
"""Prefixes of operation names, by kind."""
_OTHER = "other operations"


def run() -> Iterator[Result]:
    """Yield the profile of each job; the ratio is the fraction of matrix products."""
    setup_torch(config(LENGTH).hardware)
    yield profile_train_step("full", "full tuning")
    yield profile_train_step("late_stage", f"the last {BLOCKS} blocks from the activation cache")
    yield profile_decoding()


def profile_train_step(tuning: str, description: str) -> Result:
    """Profile a train step."""
    cfg = config(LENGTH, f"tuning={tuning}", f"trainer.batch_size={SEQUENCES}")
    tokens = sequences(SEQUENCES, LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        location = CacheLocation(Store(Path(folder)), {"sequences": "benchmark"})
        state = build_train_state(cfg.training, embedded_base(), tokens, location)
        state.model.train()
        batch, rows = torch.as_tensor(tokens, dtype=torch.long), np.arange(SEQUENCES)
        return profile_job(
            f"{tuning}_update",
            lambda: train_step(state, batch, rows),
            f"{description}, {SEQUENCES} x {LENGTH}",
        )


def profile_decoding() -> Result:
    """Profile greedy decoding, with the forward pass of the contexts."""
    model, prompts = embedded_model(), contexts()
    return profile_job(
        "decode",
        lambda: continue_texts(model, prompts, MAX_NEW_TOKENS, GREEDY, BATCH_SIZE),
        f"greedy decoding, {BATCH_SIZE} texts by {MAX_NEW_TOKENS} tokens",
    )


def profile_job(name: str, job: Callable[[], object], description: str) -> Result:
    """Profile a job after two rounds of warm-up."""
    durations = [seconds(job, 1).median for _ in range(4)][2:]
    with profile() as profiled:
        job()
    totals = dict.fromkeys([*_KINDS, _OTHER], 0.0)
    for event in profiled.key_averages():
        kind = next((k for k, prefixes in _KINDS.items() if event.key.startswith(prefixes)), _OTHER)
        totals[kind] += event.self_cpu_time_total / 1e6
    total = sum(totals.values())
    return Result(
        f"profile_{name}_products",
        totals["matrix products"] / total,
        f"fraction of matrix products in {description}",
        Timing(durations),
        Timing(durations),
        {f"{kind}, fraction": duration / total for kind, duration in totals.items()},
    )
