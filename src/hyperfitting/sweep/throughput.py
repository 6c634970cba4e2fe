"""How fast artifacts are built: from what earlier builds took, else from a matrix product.

Each manifest records the seconds of its build and the estimated FLOPs. The median throughput of the
most recent builds of the same kind and a similar size predicts the next one; without any, the
measured speed of a matrix product and a typical utilization do.
"""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from hyperfitting.runtime.config import HardwareConfig
from hyperfitting.runtime.device import resolve_device
from hyperfitting.runtime.distributed import num_processes
from hyperfitting.store.artifact import Step
from hyperfitting.store.manifest import MANIFEST

_MAX_BUILDS = 12
"""Most recent builds of a kind that count."""
_SIMILAR = 10.0
"""Builds with up to this many times more or fewer FLOPs are comparable."""
_UTILIZATION = {
    "tuned": 0.6,
    "validation": 0.6,
    "token_stats": 0.6,
    "base_loglikelihoods": 0.6,
    "continuations": 0.2,
}
"""Typical fraction of a matrix product's throughput that a kind of build reaches."""
_DEFAULT_UTILIZATION = 0.5
_DISTRIBUTED = ("tuned", "validation", "activation_cache")
"""Kinds that all processes of a run build together."""
_TYPICAL_SECONDS = {"model": 30.0, "documents": 10.0, "sequences": 2.0, "evaluation_texts": 2.0}
"""Duration of builds whose FLOPs are not counted."""


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


def device_spec(hardware: HardwareConfig) -> DeviceSpec:
    """Return the devices that a config selects, or describes for a plan.

    Raises:
        UserError: this machine has no such device.
    """
    if hardware.plan_gpu_memory_gb and hardware.plan_gpu_tflops:
        return DeviceSpec(
            "cuda",
            hardware.num_processes or 1,
            hardware.plan_gpu_memory_gb * 1e9,
            hardware.plan_gpu_tflops * 1e12,
        )
    device, count = resolve_device(hardware), num_processes(hardware)
    if device.type == "cuda":
        return DeviceSpec("cuda", count, float(torch.cuda.mem_get_info(device)[1]), None)
    return DeviceSpec(device.type, count, psutil.virtual_memory().total / count, None)


class Throughput:
    """Predicts how long builds take.

    Args:
        store: folder of the store whose manifests count.
        spec: the devices.
    """

    def __init__(self, store: Path, spec: DeviceSpec) -> None:
        self._store, self._spec = store, spec
        self._builds: dict[str, list[tuple[float, float]]] = {}
        self._matmul = spec.flops_per_second

    def seconds(self, step: Step) -> float:
        """Return how long building an artifact will take."""
        kind = step.artifact.kind
        if step.flops is None:
            return _TYPICAL_SECONDS.get(kind, 0.0)
        flops = step.flops()
        speeds = [
            built / seconds
            for built, seconds in self._recorded(kind)
            if flops / _SIMILAR <= built <= flops * _SIMILAR
        ]
        if speeds:
            return flops / statistics.median(speeds[:_MAX_BUILDS])
        utilization = _UTILIZATION.get(kind, _DEFAULT_UTILIZATION)
        devices = self._spec.count if kind in _DISTRIBUTED else 1
        return flops / (utilization * self.matmul_flops_per_second() * devices)

    def matmul_flops_per_second(self) -> float:
        """Return the throughput of a large float32 matrix product on the device."""
        if self._matmul is None:
            self._matmul = _measure_matmul(self._spec.device_type)
        return self._matmul

    def _recorded(self, kind: str) -> list[tuple[float, float]]:
        """Return FLOPs and seconds of the builds of a kind; none if another machine is planned."""
        if self._spec.flops_per_second is not None:
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


def _measure_matmul(device_type: str, n: int = 1024, repetitions: int = 5) -> float:
    """Return the best FLOP/s of several n x n matrix products."""
    a = torch.ones(n, n, device=device_type)
    best = 0.0
    for _ in range(repetitions):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the device
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best
