"""Where the time of a train step and of decoding goes on this device."""

import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.findings import Finding
from benchmarks.gpu.lab import CONTEXT_LEN, GREEDY, Lab
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.training.step import train_step

N_LISTED = 8
"""Kernels of a finding."""
KINDS = {
    "attention": ("flash", "fmha", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "::mm", "::addmm", "::bmm", "linear"),
    "optimizer": ("adam", "multi_tensor"),
    "fused": ("triton",),
    "copies": ("memcpy", "memset", "copy"),
}
"""What the names of kernels contain, by kind; the first that matches counts."""


def kernels(lab: Lab) -> Iterator[Finding]:
    """List the kernels that take the most time, and how much of the time the device is busy."""
    cases = [("bfloat16", True), ("bfloat16", False), ("tf32", True)]
    for precision, compiled in cases if lab.on_gpu else [("float32", False)]:
        yield _train_kernels(lab, precision, compiled)
    for dtype in ("bfloat16", "float32"):
        yield _decode_kernels(lab, dtype)


def _train_kernels(lab: Lab, precision: str, compiled: bool) -> Finding:
    cfg = lab.config(f"trainer.precision={precision}", f"hardware.compile={compiled}")
    tokens = lab.tokens("medium", lab.shapes.batch_size)
    state = lab.train_state("medium", "float32", cfg, tokens)
    batch, rows = torch.as_tensor(tokens, dtype=torch.long), np.arange(len(tokens))

    def steps() -> None:
        for _ in range(lab.shapes.rounds):
            train_step(state, batch, rows)

    return _profiled(
        lab, f"train step x {lab.shapes.rounds}, {precision}" + ", compiled" * compiled, steps
    )


def _decode_kernels(lab: Lab, dtype: str) -> Finding:
    model = lab.model("medium", dtype)
    contexts = lab.tokens("medium", lab.shapes.n_texts, CONTEXT_LEN)
    new_tokens = min(32, lab.shapes.max_new_tokens // 2)
    return _profiled(
        lab,
        f"greedy, {len(contexts)} x {new_tokens}, {dtype}",
        lambda: continue_texts(model, contexts, new_tokens, GREEDY, len(contexts)),
    )


def _profiled(lab: Lab, case: str, job: Callable[[], object]) -> Finding:
    """Return the profile of a job that is repeated: once to warm up, once timed, once profiled."""
    job()
    lab.synchronize()
    start = time.perf_counter()
    job()
    lab.synchronize()
    seconds = time.perf_counter() - start
    activity = ProfilerActivity.CUDA if lab.on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        job()
        lab.synchronize()
    device = DeviceType.CUDA if lab.on_gpu else DeviceType.CPU
    events = [event for event in profiled.key_averages() if event.device_type == device]
    times = {
        event.key: (event.self_device_time_total if lab.on_gpu else event.self_cpu_time_total) / 1e3
        for event in events
    }  # ms
    kernel_ms = sum(times.values())
    longest = sorted(times, key=times.__getitem__, reverse=True)[:N_LISTED]
    return Finding(
        case,
        {
            "ms": 1e3 * seconds,
            "kernel_ms": kernel_ms,
            "busy": kernel_ms / (1e3 * seconds),  # far below 1: the device waits for the host
            "n_kernels": sum(event.count for event in events),
        }
        | ms_by_kind(times)
        | {name[:60]: times[name] for name in longest},
    )


def ms_by_kind(times: Mapping[str, float]) -> dict[str, float]:
    """Return the milliseconds of each of `KINDS`, and of all other kernels.

    Args:
        times: milliseconds by the name of the kernel.
    """
    by_kind = dict.fromkeys((*KINDS, "other"), 0.0)
    for name, ms in times.items():
        matches = (k for k, parts in KINDS.items() if any(p in name.lower() for p in parts))
        by_kind[next(matches, "other")] += ms
    return {f"{kind}_ms": ms for kind, ms in by_kind.items()}
