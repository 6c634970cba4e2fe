"""The memory of this machine: how much is free, and how freed memory is used again."""

import ctypes
import sys

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8  # malloc.h
_LARGE = 2**20
"""Bytes of a block that is worth a call to the system."""


def keep_freed() -> None:
    """Have the C library keep memory that was freed, for the next tensor of its size.

    Torch frees every activation on a CPU, glibc gives large blocks back to the system at once, and
    the system clears each page before it gives it out again: a fifth to a third of the time of a
    training step. The process then stays as large as it once was. Elsewhere than on glibc nothing
    happens.
    """
    # an arena of its own is too small for what autograd's thread frees
    _mallopt({_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})


def return_freed() -> None:
    """Have the C library give large blocks back to the system as soon as they are freed.

    What processes bring together of their shards comes and goes, in sizes that leave gaps in what
    is kept: a process then grows to twice what it holds (docs/scale.md).
    """
    _mallopt({_M_MMAP_MAX: 2**16, _M_MMAP_THRESHOLD: _LARGE, _M_TRIM_THRESHOLD: _LARGE})


def _mallopt(settings: dict[int, int]) -> None:
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        for name, value in settings.items():
            mallopt(name, value)


def free(device: torch.device) -> int:
    """Return how many bytes can be had on a device, without swapping."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    return int(psutil.virtual_memory().available)
