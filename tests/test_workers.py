"""The environment of a sweep's worker processes: CPU threads and GPUs."""

import os
from pathlib import Path

import pytest
import torch

from hyperfitting.runtime import device, processes
from hyperfitting.runtime.config import HardwareConfig
from hyperfitting.runtime.processes import child_environment, visible_gpus
from hyperfitting.sweep.workers import warn_of_shared_gpus, worker_environments


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine with four GPUs, as far as torch tells."""
    monkeypatch.setattr(processes, "_CUDA_DRIVERS", (tmp_path,))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_each_worker_has_a_gpu_of_its_own(gpus: pytest.MonkeyPatch) -> None:
    assert visible_gpus() == ["0", "1", "2", "3"]
    environments = worker_environments(3)
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["0", "1", "2"]
    assert worker_environments(1) == [{}]  # a single one has them all


def test_workers_divide_the_gpus_that_are_visible_by_whatever_name(
    gpus: pytest.MonkeyPatch,
) -> None:
    gpus.setattr(torch.cuda, "device_count", lambda: 2)
    gpus.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937, MIG-c7ee")
    environments = worker_environments(2)
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["GPU-8932f937", "MIG-c7ee"]


def test_a_warning_says_that_workers_share_gpus(
    gpus: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    environments = worker_environments(5)
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["0", "1", "2", "3", "0"]
    assert "5 workers share 4 GPUs" in caplog.text


@pytest.mark.parametrize(("n_jobs", "expected"), [(-1, True), (2, True), (1, False)])
def test_a_warning_says_that_the_processes_of_joblib_share_a_gpu(
    gpus: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, n_jobs: int, expected: bool
) -> None:
    warn_of_shared_gpus(n_jobs)
    assert ("hydra/launcher=workers" in caplog.text) is expected


def test_without_a_driver_workers_divide_the_cores_only(
    gpus: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpus.setattr(processes, "_CUDA_DRIVERS", (tmp_path / "missing",))
    for name in processes.THREAD_VARIABLES:
        gpus.delenv(name, raising=False)
    cores = max(1, (os.cpu_count() or 1) // 2)
    expected = dict.fromkeys(processes.THREAD_VARIABLES, str(cores))
    assert worker_environments(2) == [expected, expected]


def test_the_environment_of_children_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "before")
    monkeypatch.delenv("ADDED", raising=False)
    with child_environment({"KEPT": "inside", "ADDED": "inside"}):
        assert (os.environ["KEPT"], os.environ["ADDED"]) == ("inside", "inside")
    assert os.environ["KEPT"] == "before"
    assert "ADDED" not in os.environ


@pytest.mark.parametrize(("name", "expected"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_a_gpu_chosen_by_index_becomes_the_current_one(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: list[str]
) -> None:
    """Else streams, graph capture and random numbers would be those of GPU 0."""
    current: list[str] = []
    monkeypatch.setattr(device, "resolve_device", lambda _: torch.device(name))
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: current.append(str(chosen)))
    device.setup_torch(HardwareConfig(device=name))
    assert current == expected


def test_idle_openmp_threads_sleep_soon_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    processes.limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    processes.limit_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    processes.limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "3000"
