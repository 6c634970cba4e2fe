"""Choosing the torch device, and setting torch up for it."""

import torch
import transformers

from hyperfitting.errors import UserError
from hyperfitting.runtime import memory, numerics, processes
from hyperfitting.runtime.config import HardwareConfig


def setup_torch(hardware: HardwareConfig) -> torch.device:
    """Set up torch for a run, before anything is computed, and return the device to use.

    Raises:
        UserError: this machine has no such device.
    """
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)
    device = resolve_device(hardware)
    if processes.is_distributed():
        memory.release_freed()
    elif device.type == "cpu":  # else a model that passes through host memory would stay there
        memory.retain_freed()
    if device.type == "cuda":
        if device.index is not None:  # streams, graphs and random numbers are the current device's
            torch.cuda.set_device(device)
        if hardware.deterministic:
            numerics.prepare_deterministic_libraries()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    return device


def resolve_device(hardware: HardwareConfig) -> torch.device:
    """Return the device that `hardware.device` names; `auto`: CUDA, else MPS, else the CPU.

    Raises:
        UserError: this machine has no such device.
    """
    if hardware.device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is not None and accelerator.type in ("cuda", "mps"):
            return accelerator
        return torch.device("cpu")
    try:
        device = torch.device(hardware.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            "this machine has no such device (or this torch was built without it)",
            field="hardware.device",
            value=hardware.device,
            valid="auto, cpu" + (", cuda" if torch.cuda.is_available() else ""),
        ) from error
    return device


def describe_device(device: torch.device) -> str:
    """Return a device for records, with the name of the GPU: `cuda:0 (NVIDIA H100 80GB HBM3)`."""
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"
