"""Memory of this machine: how much is free, and what the allocator does with freed blocks."""

import ctypes
import gc
import sys

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8  # malloc.h
_LARGE_BLOCK = 2**20
"""Bytes from which on a block is worth a system call."""


def retain_freed() -> None:
    """Make glibc's malloc keep freed memory for the next tensor of that size.

    On a CPU torch frees every activation; by default glibc returns large blocks to the system at
    once, and the system zeroes each page before it hands it out again: a fifth to a third of the
    time of a training step. The process then stays as large as its peak. No effect without glibc.
    """
    # an arena of its own is too small for what autograd's thread frees
    _mallopt({_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})


def release_freed() -> None:
    """Make glibc's malloc return large blocks to the system as soon as they are freed.

    For sharded training: all-gather buffers come and go in sizes that fragment a heap that is
    kept, and the process grows to twice its live memory (docs/scale.md).
    """
    _mallopt({_M_MMAP_MAX: 2**16, _M_MMAP_THRESHOLD: _LARGE_BLOCK, _M_TRIM_THRESHOLD: _LARGE_BLOCK})


def _mallopt(settings: dict[int, int]) -> None:
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        for name, value in settings.items():
            mallopt(name, value)


def collect_unreferenced() -> None:
    """Free models that are only in reference cycles (hooks, FSDP), and the GPU memory they held."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can be allocated on a device without swapping."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return int(psutil.virtual_memory().available)
