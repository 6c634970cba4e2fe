"""How fast artifacts are built: from what earlier builds took, else from a matrix product.

Each manifest records the seconds of its build and the estimated FLOPs. The median throughput of the
most recent builds of the same kind and a similar size predicts the next one, without any that of
builds of a less similar size; without these too, the measured speed of a matrix product in the
precision of the build and a typical utilization do.
"""

import functools
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from hyperfitting.config import RunConfig
from hyperfitting.errors import UserError
from hyperfitting.runtime.device import resolve_device
from hyperfitting.runtime.distributed import num_processes
from hyperfitting.runtime.numerics import matmul_precision
from hyperfitting.store.artifact import Step
from hyperfitting.store.manifest import MANIFEST

_MAX_BUILDS = 12
"""Most recent builds of a kind that count."""
_SIMILAR = (10.0, 100.0)
"""Builds with up to this many times more or fewer FLOPs are comparable; the second number counts
where there are none of the first."""
_UTILIZATION = {
    "tuned": 0.6,
    "validation": 0.6,
    "token_stats": 0.6,
    "base_loglikelihoods": 0.6,
    "continuations": 0.2,
    "chat_answers": 0.1,
}
"""Typical fraction of a matrix product's throughput that a kind of build reaches."""
_DEFAULT_UTILIZATION = 0.5
_DISTRIBUTED = ("tuned", "validation", "activation_cache")
"""Kinds that all processes of a run build together, in the training precision."""
_TYPICAL_SECONDS = {"model": 30.0, "documents": 10.0, "sequences": 2.0, "evaluation_texts": 2.0}
"""Duration of builds whose FLOPs are not counted."""
_MATRIX_SIZE = {"cuda": 8192, "mps": 4096}
"""Rows of square matrices whose product takes a GPU's full speed, by device type; smaller ones are
bound by memory and launches."""
_CPU_MATRIX_SIZE = 512
_N_WARMUP, _N_MEASURED = 3, 5
"""Products before the measurement (clocks, libraries, caches), and products measured."""


@dataclass(frozen=True)
class DeviceSpec:
    """The devices that a run is planned for."""

    device_type: str
    """`cpu`, `cuda` or `mps`."""
    count: int
    """Processes that train one model, each on a device of its own, or all on the CPU."""
    memory_bytes: float
    """For each process."""
    flops_per_second: float | None
    """Throughput of a matrix product; none: to be measured, on this machine."""
    train_precision: str = "float32"
    """Of matrix products in training: `tf32`, or the dtype of their operands."""
    eval_precision: str = "float32"
    """Of matrix products in evaluation and decoding."""

    @property
    def is_local(self) -> bool:
        """Whether the devices are this machine's; else those of a machine that is planned for."""
        return self.flops_per_second is None


def device_spec(cfg: RunConfig) -> DeviceSpec:
    """Return the devices that a config selects, or describes for a plan.

    Raises:
        UserError: this machine has no such device.
    """
    hardware, precision, dtype = cfg.hardware, cfg.trainer.precision, cfg.model.dtype
    # without autocast the weights' dtype decides
    precisions = (dtype if precision == "float32" else precision, dtype)
    if hardware.plan_gpu_memory_gb and hardware.plan_gpu_tflops:
        if hardware.num_processes is None:
            raise UserError(
                "is all GPUs of this machine; the plan is for others",
                field="hardware.num_processes",
                value=None,
                valid="how many GPUs there are, with hardware.plan_gpu_memory_gb",
                hint="hardware.num_processes=8",
            )
        return DeviceSpec(
            "cuda",
            hardware.num_processes,
            hardware.plan_gpu_memory_gb * 1e9,
            hardware.plan_gpu_tflops * 1e12,
            *precisions,
        )
    device, count = resolve_device(hardware), num_processes(hardware)
    if device.type == "cuda":
        memory = float(torch.cuda.mem_get_info(device)[1])
        return DeviceSpec("cuda", count, memory, None, *precisions)
    return DeviceSpec(device.type, count, psutil.virtual_memory().total / count, None, *precisions)


class Throughput:
    """Predicts how long builds take.

    Args:
        store: folder of the store whose manifests count.
        spec: the devices.
    """

    def __init__(self, store: Path, spec: DeviceSpec) -> None:
        self._store, self._spec = store, spec
        self._builds: dict[str, list[tuple[float, float]]] = {}

    def seconds(self, step: Step) -> float:
        """Return how long building an artifact will take."""
        kind = step.artifact.kind
        if step.flops is None:
            return _TYPICAL_SECONDS.get(kind, 0.0)
        flops = step.flops()
        for ratio in _SIMILAR:
            speeds = [
                built / seconds
                for built, seconds in self._recorded(kind)
                if flops / ratio <= built <= flops * ratio
            ]
            if speeds:
                return flops / statistics.median(speeds[:_MAX_BUILDS])
        utilization = _UTILIZATION.get(kind, _DEFAULT_UTILIZATION)
        devices = self._spec.count if kind in _DISTRIBUTED else 1
        return flops / (utilization * self.matmul_flops_per_second(kind) * devices)

    def matmul_flops_per_second(self, kind: str) -> float:
        """Return the throughput of a large matrix product, in the precision of a kind of build."""
        spec = self._spec
        if spec.flops_per_second is not None:
            return spec.flops_per_second
        precision = spec.train_precision if kind in _DISTRIBUTED else spec.eval_precision
        return measure_matmul(spec.device_type, precision)

    def _recorded(self, kind: str) -> list[tuple[float, float]]:
        """Return FLOPs and seconds of the builds of a kind; none if another machine is planned."""
        if not self._spec.is_local:
            return []
        if kind not in self._builds:
            self._builds[kind] = list(_read_builds(self._store, kind))
        return self._builds[kind]


def _read_builds(store: Path, kind: str) -> Iterator[tuple[float, float]]:
    """Yield FLOPs and seconds of the artifacts of a kind, most recent first."""
    paths = store.glob(f"{kind}/*/{MANIFEST}")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):
            manifest = json.loads(path.read_text("utf-8"))
            if manifest["flops"] and manifest["seconds"]:
                yield float(manifest["flops"]), float(manifest["seconds"])


@functools.cache
def measure_matmul(device_type: str, precision: str) -> float:
    """Return the median FLOP/s of large matrix products; measured once in a process.

    Args:
        device_type: `cpu`, `cuda` or `mps`.
        precision: `tf32` (float32 with TF32 products on CUDA), or the dtype of the matrices.
    """
    n = _MATRIX_SIZE.get(device_type, _CPU_MATRIX_SIZE)
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    # random numbers: a GPU draws less power, and clocks higher, for constant ones
    a = torch.randn(n, n, device=device_type).to(dtype)
    product = torch.empty_like(a)
    seconds = []
    with matmul_precision(torch.device(device_type), precision):
        for _ in range(_N_WARMUP + _N_MEASURED):
            start = time.perf_counter()
            torch.mm(a, a, out=product)
            float(product[0, 0])  # reading a value waits for the device
            seconds.append(time.perf_counter() - start)
    return float(2 * n**3 / statistics.median(seconds[_N_WARMUP:]))
