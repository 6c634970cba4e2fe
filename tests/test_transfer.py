"""Copies between host and device: the same values, and on CUDA through pinned memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hyperfitting.runtime.transfer import (
    HostScalar,
    memmap_to_device,
    rows_to_device,
    to_device,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.int64])
def test_rows_of_a_memory_mapped_array(tmp_path: Path, dtype: type) -> None:
    array = np.arange(60).reshape(5, 4, 3).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    rows = np.array([3, 0, 3])
    assert np.array_equal(rows_to_device(mapped, rows, CPU).numpy(), array[rows])
    assert np.array_equal(memmap_to_device(mapped, CPU).numpy(), array)
    assert np.array_equal(to_device(array[1:3], CPU).numpy(), array[1:3])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of torch's CUDA, which this machine may lack."""
    called: list[str] = []
    real_empty, real_copy = torch.empty, Tensor.copy_

    def empty(*shape: int, pin_memory: bool, **options: Any) -> Tensor:
        called.append(f"empty pinned={pin_memory}")
        return real_empty(*shape, **options)

    def pin(tensor: Tensor) -> Tensor:
        called.append("pin")
        return tensor

    def to(tensor: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
        called.append(f"to {device} non_blocking={non_blocking}")
        return tensor

    def copy(tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        called.append(f"copy non_blocking={non_blocking}")
        return real_copy(tensor, source)

    class Event:
        def record(self, stream: str) -> None:
            called.append(f"record {stream}")

        def synchronize(self) -> None:
            called.append("synchronize")

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "copy_", copy)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    return called


def test_copies_to_a_gpu_are_pinned_and_enqueued(calls: list[str]) -> None:
    to_device(np.arange(3), CUDA)
    assert calls == ["pin", "to cuda non_blocking=True"]
    calls.clear()
    rows_to_device(np.arange(6).reshape(3, 2), np.array([1]), CUDA)
    assert calls == ["empty pinned=True", "to cuda non_blocking=True"]


def test_a_scalar_is_copied_when_it_is_computed_and_waited_for_when_read(calls: list[str]) -> None:
    class OnCuda(Tensor):
        is_cuda = True
        __torch_function__ = torch._C._disabled_torch_function_impl

    scalar = HostScalar(torch.tensor(2.5).as_subclass(OnCuda))
    assert calls == ["empty pinned=True", "copy non_blocking=True", "record stream"]
    assert scalar.read() == 2.5
    assert calls[3:] == ["synchronize"]
    assert HostScalar(torch.tensor(1.5)).read() == 1.5
    assert len(calls) == 4  # nothing of the kind on a CPU
