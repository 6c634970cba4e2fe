"""FSDP2 on one device: the same losses as without it."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks.gpu.findings import Finding
from benchmarks.gpu.lab import Lab
from hyperfitting.models.layers import blocks
from hyperfitting.training.optimizer import build_optimizer
from hyperfitting.training.step import TrainState, train_step

N_STEPS = 3
_TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
"""Of losses. In bfloat16 FSDP computes hidden states and norms too, which autocast does not."""


def one_rank(lab: Lab) -> Iterator[Finding]:
    """Train with the model sharded over a single rank, and plainly."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if lab.on_gpu else "gloo",
        init_method=f"file://{lab.folder / 'rendezvous'}",
        rank=0,
        world_size=1,
    )
    try:
        for precision, tolerance in _TOLERANCES.items():
            plain, sharded = (_losses(lab, precision, is_sharded) for is_sharded in (False, True))
            difference = float(np.abs(sharded / plain - 1).max())
            yield Finding(
                f"{precision}, {N_STEPS} steps", {"largest_relative_difference": difference},
                difference < tolerance, f"below {tolerance}",
            )  # fmt: skip
    finally:
        dist.destroy_process_group()


def _losses(lab: Lab, precision: str, is_sharded: bool) -> np.ndarray:
    cfg = lab.config(
        f"trainer.precision={precision}", "optimizer.lr=1e-4", "hardware.compile=false"
    )
    tokens = lab.tokens("small", lab.shapes.batch_size)
    state = lab.train_state("small", "float32", cfg, tokens)
    if is_sharded:
        _shard(state, precision)
        state.optimizer = build_optimizer(cfg.optimizer, list(state.trained.values()))
    batch, rows = torch.as_tensor(tokens, dtype=torch.long), np.arange(len(tokens))
    return np.array([float(train_step(state, batch, rows)) for _ in range(N_STEPS)])


def _shard(state: TrainState, precision: str) -> None:
    """Shard the blocks, and the rest of the model, as several ranks do."""
    mesh = init_device_mesh(state.model.device.type, (1,))
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*blocks(state.model), state.model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    state.trained = dict(state.model.named_parameters())
