"""Correctness of training on this device: reproducible, resumable, exact in memory and kernels."""

import hashlib
import itertools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.findings import Finding
from benchmarks.gpu.lab import Lab
from hyperfitting.config import RunConfig
from hyperfitting.progress import MetricsRow
from hyperfitting.runtime import preemption
from hyperfitting.runtime.device import setup_torch
from hyperfitting.training.loss import chunked_cross_entropy
from hyperfitting.training.step import train_step
from hyperfitting.training.train import LAST_FILE, train

OPTIMIZERS = {
    "adam": "float32", "adamw": "float32", "adam_8bit": "bfloat16", "adam_bf16": "bfloat16",
}  # fmt: skip
"""With the dtype of the weights."""
_ATTENTION = ("flash", "efficient", "cudnn", "math")


def precisions(lab: Lab) -> list[str]:
    """Return the training precisions to check on this device."""
    return ["float32", "tf32", "bfloat16"] if lab.on_gpu else ["float32"]


def same_run_twice(lab: Lab) -> Iterator[Finding]:
    """Train twice: same weights and losses, bit by bit."""
    for precision, tuning in itertools.product(precisions(lab), ("full", "late_stage")):
        cfg = _config(lab, f"trainer.precision={precision}", *_tuning(tuning))
        runs = [_train(lab, cfg, "float32", f"twice-{precision}-{tuning}-{i}") for i in range(2)]
        yield Finding(
            f"{tuning}, {precision}",
            {"loss": runs[0][0][-1]["train/loss"]},
            runs[0] == runs[1],
            "the same rows and weights",
        )


def sigterm_and_resume(lab: Lab) -> Iterator[Finding]:
    """Send SIGTERM in the second epoch and go on: as without it, for every optimizer."""
    for optimizer, dtype in OPTIMIZERS.items():
        cfg = _config(lab, f"optimizer={optimizer}", "optimizer.lr=1e-4", f"model.dtype={dtype}")
        whole = _train(lab, cfg, dtype, f"whole-{optimizer}")
        resumed = _train(lab, cfg, dtype, f"resumed-{optimizer}", sigterm_after=3)
        yield Finding(optimizer, {"loss": whole[0][-1]["train/loss"]}, whole == resumed, "the same")


def activation_cache(lab: Lab) -> Iterator[Finding]:
    """Train the last blocks with the cache and without: the same losses, up to its dtype."""
    losses = {}
    for dtype in ("off", "float32", "bfloat16"):
        cfg = _config(lab, *_tuning("late_stage"), f"trainer.activation_cache={dtype}")
        rows, _ = _train(lab, cfg, "float32", f"cache-{dtype}")
        losses[dtype] = np.array([row["train/loss"] for row in rows if "epoch" not in row])
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 1e-2)):
        difference = float(np.abs(losses[dtype] / losses["off"] - 1).max())
        yield Finding(
            dtype, {"largest_relative_difference": difference}, difference < tolerance,
            f"below {tolerance}",
        )  # fmt: skip


def chunked_loss(lab: Lab) -> Iterator[Finding]:
    """Compare loss, gradients and memory of the chunked loss with those of whole logits."""
    large = lab.shapes.large
    n = lab.shapes.batch_size * lab.shapes.seq_len
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        torch.manual_seed(0)
        states = torch.randn(n, large["hidden_size"], device=lab.device, dtype=dtype)
        weight = torch.randn(large["vocab_size"], large["hidden_size"], device=lab.device) / 50
        targets = torch.randint(len(weight), (n,), device=lab.device)
        inputs = states, weight.to(dtype), targets
        expected, whole_memory = _loss_and_gradients(lab, _whole_logits_loss, *inputs)
        actual, chunked_memory = _loss_and_gradients(lab, _chunked_loss, *inputs)
        errors = [float((b - a).norm() / a.norm()) for a, b in zip(expected, actual, strict=True)]
        yield Finding(
            f"{n} x {len(weight)}, {str(dtype).removeprefix('torch.')}",
            {"largest_relative_error": max(errors)}
            | {f"whole_{key}": value for key, value in whole_memory.items()}
            | {f"chunked_{key}": value for key, value in chunked_memory.items()},
            max(errors) < tolerance,
            f"an error below {tolerance}",
        )


def _whole_logits_loss(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(states, weight).float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def _chunked_loss(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return chunked_cross_entropy(states, weight, None, targets)


def _loss_and_gradients(
    lab: Lab, loss_of: Callable[..., Tensor], states: Tensor, weight: Tensor, targets: Tensor
) -> tuple[list[Tensor], dict[str, float]]:
    """Return the loss and both gradients on the CPU, and the memory that they take."""
    inputs = states.clone().requires_grad_(), weight.clone().requires_grad_()
    with lab.peak_memory() as memory:
        loss = loss_of(*inputs, targets)
        gradients = torch.autograd.grad(loss, inputs)
    return [tensor.detach().float().cpu() for tensor in (loss, *gradients)], memory


def attention_kernels(lab: Lab) -> Iterator[Finding]:
    """Name the attention kernel of a train step, for every precision and two lengths."""
    for precision, length in itertools.product(precisions(lab), (64, lab.shapes.seq_len)):
        cfg = _config(lab, f"trainer.precision={precision}", f"dataset.seq_len={length}")
        tokens = lab.tokens("small", lab.shapes.batch_size, length)
        state = lab.train_state("small", "float32", cfg, tokens)
        batch, rows = torch.as_tensor(tokens, dtype=torch.long), np.arange(len(tokens))
        train_step(state, batch, rows)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            train_step(state, batch, rows)
            lab.synchronize()
        ops = {event.key for event in profiled.key_averages() if "attention" in event.key}
        found = {k for k in _ATTENTION if any(k in op for op in ops)}
        yield Finding(
            f"{precision}, grouped queries, length {length}",
            {"kernels": " ".join(sorted(found)) or "none fused"},
            not lab.on_gpu or (bool(found) and "math" not in found),
            "a fused kernel",
        )


def out_of_memory(lab: Lab) -> Iterator[Finding]:
    """Limit the GPU's memory so that only micro-batches fit: the same loss, in smaller steps."""
    if not lab.on_gpu:
        yield Finding("needs a GPU")
        return
    n = 8 * lab.shapes.batch_size
    cfg = _config(lab, f"trainer.batch_size={n}")
    tokens = lab.tokens("small", n)
    batch, rows = torch.as_tensor(tokens, dtype=torch.long), np.arange(n)
    losses: list[list[float]] = []
    peaks: list[int] = []
    for micro_batch_size in (n, n // 4, None):
        state = lab.train_state("small", "float32", cfg, tokens)
        state.micro_batch_size = micro_batch_size or n
        if micro_batch_size is None:
            total = torch.cuda.get_device_properties(lab.device).total_memory
            torch.cuda.set_per_process_memory_fraction((sum(peaks) / 2) / total, lab.device)
        else:
            torch.cuda.reset_peak_memory_stats(lab.device)
        losses.append([float(train_step(state, batch, rows)) for _ in range(2)])
        peaks.append(torch.cuda.max_memory_reserved(lab.device))
        size = state.micro_batch_size
        del state
        torch.cuda.set_per_process_memory_fraction(1.0, lab.device)
        torch.cuda.empty_cache()
    difference = float(np.abs(np.array(losses[2]) / losses[0] - 1).max())
    yield Finding(
        f"batch {n} x {lab.shapes.seq_len}",
        {"micro_batch_size": size, "largest_relative_difference": difference},
        size < n and difference < 1e-4,
        "smaller micro-batches, and the same losses",
    )


def _tuning(name: str) -> list[str]:
    return [f"tuning={name}", *(["tuning.last_blocks=2"] if name.startswith("late") else [])]


def _config(lab: Lab, *overrides: str) -> RunConfig:
    return lab.config(
        "trainer.epochs=2", "optimizer.lr=1e-4", "trainer.val_prompts=2",
        "trainer.val_prompt_len=8", "trainer.val_max_new_tokens=8", *overrides,
    )  # fmt: skip


def _train(
    lab: Lab, cfg: RunConfig, dtype: str, name: str, sigterm_after: int | None = None
) -> tuple[list[MetricsRow], str]:
    """Train the small model; return the rows, and a hash of the trained weights.

    Args:
        lab: where.
        cfg: the training.
        dtype: of the weights.
        name: of the folder.
        sigterm_after: rows after which SIGTERM is received, once; training then resumes.
    """
    setup_torch(cfg.hardware)
    work = lab.folder / name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    data = lab.sequences("small", 2 * lab.shapes.batch_size)  # two steps an epoch

    def rows(stop_after: int | None) -> list[MetricsRow]:
        seen = []
        location = lab.cache_location(f"small-{dtype}")
        for row in train(cfg.training, data, lab.base("small", dtype), work, location):
            seen.append(row)
            if len(seen) == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
        return seen

    if sigterm_after is not None:
        replaced = preemption.install_handlers()
        try:
            rows(sigterm_after)
            raise RuntimeError("SIGTERM did not end the training")
        except preemption.Preempted:
            preemption.install_handlers()  # forgets the signal
        finally:
            for signum, handler in replaced.items():
                signal.signal(signum, handler)
    found = rows(None), _weights_hash(work / LAST_FILE)
    shutil.rmtree(work)
    return found


def _weights_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(name.encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
