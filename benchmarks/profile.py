"""Where the time of a full update and of a decoding step goes, by kind of operation."""

import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.profiler import profile

from benchmarks.decoding import BATCH, GREEDY, contexts
from benchmarks.timing import Result, Timing, seconds
from benchmarks.training import BLOCKS, STORE, config, sequences
from hyperfitting import models
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.progress import silent
from hyperfitting.store import Store
from hyperfitting.training.learner import Learner
from hyperfitting.training.trunk import KeptIn, trunk_of

SEQUENCES, LENGTH, NEW = 8, 256, 32
_KINDS = {
    "products": (
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


def run() -> Iterator[Result]:
    """Yield the profile of each job; the ratio is the share of matrix products."""
    models.prepare(config(LENGTH).hardware)
    yield update("full", "full tuning")
    yield update("late_stage", f"the last {BLOCKS} blocks from the trunk cache")
    yield decode()


def update(tuning: str, what: str) -> Result:
    """Profile an update."""
    cfg = config(LENGTH, f"tuning={tuning}", f"trainer.batch_size={SEQUENCES}")
    learner = Learner.new(cfg, models.base_model(cfg.model, Store(STORE)))
    tokens = sequences(SEQUENCES, LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        kept_in = KeptIn(Store(folder), {"of": "bench"})
        learner.trunk = trunk_of(cfg, learner.model, tokens, kept_in, silent)
        learner.model.train()
        batch, rows = torch.as_tensor(tokens, dtype=torch.long), np.arange(SEQUENCES)
        return shares(
            f"{tuning}_update",
            lambda: learner.update(batch, rows),
            f"{what}, {SEQUENCES} x {LENGTH}",
        )


def decode() -> Result:
    """Profile greedy decoding, with the contexts' first pass."""
    model = models.load(models.base_model(config(LENGTH).model, Store(STORE))).eval()
    given = contexts()
    return shares(
        "decode",
        lambda: continue_texts(model, given, NEW, GREEDY, BATCH),
        f"greedy decoding, {BATCH} texts by {NEW} tokens",
    )


def shares(name: str, job: Callable[[], object], what: str) -> Result:
    """Profile a job that has run three times."""
    took = [seconds(job, 1).median for _ in range(4)][2:]
    with profile() as profiled:
        job()
    found = dict.fromkeys([*_KINDS, "other operations"], 0.0)
    for one in profiled.key_averages():
        kind = next((k for k, starts in _KINDS.items() if one.key.startswith(starts)), None)
        found[kind or "other operations"] += one.self_cpu_time_total / 1e6
    total = sum(found.values())
    return Result(
        f"profile_{name}_products",
        found["products"] / total,
        f"share of matrix products in {what}",
        Timing(took),
        Timing(took),
        {f"{kind}, share": time / total for kind, time in found.items()},
    )
