"""The machine that a process runs on, as records describe it."""

import os
import platform
from pathlib import Path

import torch
from pydantic import Field

from hyperfitting.runtime.strict_model import StrictModel


class Machine(StrictModel):
    """What can change the last bits of a number, besides package versions and device."""

    cpu: str = Field(description="model of the CPU")
    cores: int = Field(description="CPU cores that the process may use")
    threads: int = Field(description="CPU threads that torch uses")
    system: str = Field(description="operating system and architecture")


def describe_machine() -> Machine:
    """Return the machine, with the number of threads as it is now."""
    return Machine(
        cpu=_cpu_model(),
        cores=_usable_cores(),
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.machine()}",
    )


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or "unknown")
