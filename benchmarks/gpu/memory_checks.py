"""Peak memory of training against the plan."""

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.gpu.findings import Finding
from benchmarks.gpu.lab import Lab
from hyperfitting.store.artifact import Store
from hyperfitting.training.memory import FRAMEWORK_BYTES, estimate_memory
from hyperfitting.training.step import train_step

CASES = {
    "full, float32": ("float32", []),
    "full, bfloat16 autocast": ("float32", ["trainer.precision=bfloat16"]),
    "full, bfloat16 weights, adam_8bit": ("bfloat16", ["optimizer=adam_8bit"]),
    "full, checkpointed": ("float32", ["hardware.activation_checkpointing=true"]),
    "last 2 blocks": ("float32", ["tuning=late_stage", "tuning.last_blocks=2"]),
    "lora": ("float32", ["tuning=lora"]),
}
_TOLERANCE = 0.15


def peak_memory(lab: Lab) -> Iterator[Finding]:
    """Compare the memory that tensors take at the peak with the plan's estimate."""
    for case, (dtype, overrides) in CASES.items():
        cfg = lab.config(f"model.dtype={dtype}", "hardware.compile=false", *overrides)
        tokens = lab.tokens("medium", lab.shapes.n_scored)
        base = lab.base("medium", dtype)
        store = Store(lab.folder / "store")
        estimate = estimate_memory(
            cfg.training, tokens.shape, base, store, lab.device.type, lab.memory_bytes
        )
        planned = (estimate.peak - FRAMEWORK_BYTES[lab.device.type]) / 1e9
        with lab.peak_memory() as memory:
            state = lab.train_state("medium", dtype, cfg, tokens)
            rows = np.arange(lab.shapes.batch_size)
            batch = torch.as_tensor(tokens[rows], dtype=torch.long)
            for _ in range(2):
                train_step(state, batch, rows)
        del state
        peak = memory.get("peak_gb")
        error = None if peak is None else planned / peak - 1
        yield Finding(
            case,
            {"planned_gb": planned, **memory, **({} if error is None else {"error": error})},
            None if error is None else abs(error) < _TOLERANCE,
            f"an error of at most {_TOLERANCE:.0%}",
        )
