"""Copies between host and device that do not wait for the device.

A plain copy waits until a GPU has done all that is enqueued, which then idles until the host has
launched the next kernel. Copies from and to pinned memory are enqueued like kernels.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on a device; on the CPU it shares the memory."""
    if device.type != "cuda":
        return torch.from_numpy(array).to(device)
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)


def rows_to_device(array: NDArray[Any], rows: NDArray[np.int64], device: torch.device) -> Tensor:
    """Return rows (B, …) of an array (N, …), such as a memory-mapped one, on a device."""
    is_cuda = device.type == "cuda"
    shape = len(rows), *array.shape[1:]
    host = torch.empty(shape, dtype=_torch_dtype(array), pin_memory=is_cuda)
    np.take(array, rows, axis=0, out=host.numpy(), mode="clip")  # "raise" would use a buffer
    return host.to(device, non_blocking=is_cuda)


def memmap_to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return a memory-mapped array (N, …) on a device, copied row by row: it may exceed the RAM."""
    copy = torch.empty(array.shape, dtype=_torch_dtype(array), device=device)
    for index in range(len(array)):
        copy[index] = rows_to_device(array, np.array([index]), device)[0]
    return copy


def _torch_dtype(array: NDArray[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype


class HostScalar:
    """A number that a device computes, copied to the host when it is done.

    Args:
        scalar: 0-dimensional.
    """

    def __init__(self, scalar: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._scalar = scalar
        if scalar.is_cuda:
            self._scalar = torch.empty((), dtype=scalar.dtype, pin_memory=True)
            self._scalar.copy_(scalar, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(scalar.device))

    def read(self) -> float:
        """Return the number; waits for it, but not for what was enqueued after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._scalar)
