"""How CUDA computes the train step: by deterministic kernels, and with TF32 products if configured.

Both are switches of the whole process, and set for a train step only: decoding and evaluation run
with torch's defaults. A CPU has neither switch. Also the accumulation dtype of a device.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from hyperfitting.errors import UserError

_WITHOUT_FLOAT64 = ("mps",)
_NOT_DETERMINISTIC = " does not have a deterministic implementation"


@contextmanager
def training_numerics(device: torch.device, deterministic: bool, precision: str) -> Iterator[None]:
    """Compute as a training is configured to, inside this context.

    Args:
        device: of the model.
        deterministic: only kernels that give the same result every time.
        precision: `tf32` for TF32 matrix products of float32 tensors.

    Raises:
        UserError: an operation has no deterministic kernel.
    """
    with ExitStack() as stack:
        if device.type == "cuda" and deterministic:
            stack.enter_context(_deterministic_algorithms())
        stack.enter_context(matmul_precision(device, precision))
        yield


@contextmanager
def matmul_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Compute matrix products of float32 tensors on a GPU in TF32 if that is the precision."""
    if device.type != "cuda" or precision != "tf32":
        yield
        return
    # not `torch.backends.cuda.matmul.fp32_precision`: that alone makes torch's readers of the
    # older settings raise
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_precision(device: torch.device, precision: str) -> None:
    """Refuse TF32 on a device without it.

    Raises:
        UserError: it is no GPU, or one older than Ampere.
    """
    if precision != "tf32" or (device.type == "cuda" and torch.cuda.is_tf32_supported()):
        return
    raise UserError(
        f"the device ({device}) has no TF32, a format of NVIDIA GPUs from Ampere on",
        field="trainer.precision",
        value=precision,
        valid="float32, bfloat16 or float16 on this device",
    )


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for sums on a device: float64, or float32 where it has no float64 (MPS)."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def float64_device(device: torch.device) -> torch.device:
    """Return a device if it has float64, else the CPU."""
    return torch.device("cpu") if device.type in _WITHOUT_FLOAT64 else device


def prepare_deterministic_libraries() -> None:
    """Set the environment by which cuBLAS and NCCL are deterministic, before they are loaded."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault(
        "NCCL_ALGO", "^NVLS,NVLSTree"
    )  # sums inside the switch have no fixed order


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    """Use deterministic kernels only; attention's are flash, memory-efficient and math."""
    options: Any = torch.utils.deterministic  # its attribute has no type
    fills = options.fill_uninitialized_memory
    options.fill_uninitialized_memory = False
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    prepare_deterministic_libraries()  # without it, torch refuses every matrix product
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        operation, message, _ = str(error).partition(_NOT_DETERMINISTIC)
        if not message:
            raise
        raise UserError(
            f"this model needs {operation}, of which there is no deterministic kernel",
            field="hardware.deterministic",
            value=True,
            valid="false for this model on a GPU",
        ) from error
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=only_warned)
        options.fill_uninitialized_memory = fills
