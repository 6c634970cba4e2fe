"""Where the time of a train step and of decoding goes on this device."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.findings import Finding
from benchmarks.gpu.lab import CONTEXT_LEN, GREEDY, Lab
from benchmarks.gpu.training_checks import precisions
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.training.step import train_step

N_LISTED = 8
"""Kernels of a finding."""


def kernels(lab: Lab) -> Iterator[Finding]:
    """List the kernels that take the most time, and how much of the time they take."""
    for precision in precisions(lab):
        for compiled in (False, True) if lab.on_gpu else (False,):
            yield _train_kernels(lab, precision, compiled)
    for dtype in ("float32", "bfloat16"):
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
        lab, f"{lab.shapes.rounds} train steps, {precision}" + ", compiled" * compiled, steps
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
    times = {
        event.key: (event.self_device_time_total if lab.on_gpu else event.self_cpu_time_total) / 1e3
        for event in profiled.key_averages()
        if event.device_type == device
    }  # ms
    longest = sorted(times, key=times.__getitem__, reverse=True)[:N_LISTED]
    return Finding(
        case,
        {"ms": 1e3 * seconds, "kernel_ms": sum(times.values())}
        | {name[:60]: times[name] for name in longest},
    )
