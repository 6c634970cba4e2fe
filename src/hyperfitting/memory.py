"""The memory of this machine: how much is free, and how freed memory is used again."""

import ctypes
import sys

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h


def keep_freed() -> None:
    """Have the C library keep memory that was freed, for the next tensor of its size.

    Torch frees every activation on a CPU, glibc gives large blocks back to the system at once, and
    the system clears each page before it gives it out again: a fifth to a third of the time of a
    training step. The process then stays as large as it once was. Elsewhere than on glibc nothing
    happens.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(
            _M_ARENA_MAX, 1
        )  # an arena of its own is too small for what autograd's thread frees
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def free(device: torch.device) -> int:
    """Return how many bytes can be had on a device, without swapping."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    return int(psutil.virtual_memory().available)
