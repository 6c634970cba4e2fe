"""How a rank ends, by the calls that it makes; `test_failing_ranks` runs real ranks."""

import logging
import signal
from typing import Any
from unittest.mock import MagicMock

import pytest

from hyperfitting.errors import UserError
from hyperfitting.runtime import distributed, preemption
from hyperfitting.runtime.distributed import DistContext
from hyperfitting.training import worker
from hyperfitting.training.worker import TrainingTask, run_worker_rank


class Exited(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """A process group of two without processes; leaving it with `exit_now` raises `Exited`."""
    group = MagicMock()
    for name in ("init_process_group", "destroy_process_group", "exit_now"):
        monkeypatch.setattr(distributed, name, getattr(group, name))
    group.exit_now.side_effect = Exited
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(distributed, "_workers_train", False)
    return group


def test_rank_0_releases_the_others_only_if_they_wait_for_it(torchrun: MagicMock) -> None:
    with distributed.workers_training():
        pass
    distributed.finish(0)
    torchrun.init_process_group().broadcast_object.assert_called_once_with(None)
    torchrun.destroy_process_group.assert_called_once_with()

    torchrun.reset_mock()
    with pytest.raises(OSError, match="disk"), distributed.workers_training():
        raise OSError("disk full")
    with pytest.raises(Exited):
        distributed.finish(3)
    torchrun.exit_now.assert_called_once_with(3)
    torchrun.init_process_group.assert_not_called()
    torchrun.destroy_process_group.assert_not_called()


@pytest.mark.parametrize(
    "error", [RuntimeError("it broke"), UserError("it broke"), preemption.Preempted(signal.SIGTERM)]
)
def test_a_worker_that_fails_leaves_its_process_group_as_it_is(
    torchrun: MagicMock, monkeypatch: pytest.MonkeyPatch, error: BaseException,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    torchrun.init_process_group().broadcast_object.side_effect = error
    for name in ("ignore_signals", "signal.signal"):
        monkeypatch.setattr(f"hyperfitting.runtime.preemption.{name}", lambda *_: None)
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(logging, "disable", lambda _: None)
    with pytest.raises(Exited):
        run_worker_rank()
    torchrun.exit_now.assert_called_once_with(1)
    torchrun.destroy_process_group.assert_not_called()
    assert ("it broke" in capsys.readouterr().err) == isinstance(error, Exception)


@pytest.mark.parametrize(("world_size", "fails"), [(1, True), (2, False), (2, True)])
def test_a_rank_that_fails_does_not_wait_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, world_size: int, fails: bool
) -> None:
    """Freeing GPU memory waits for all its kernels: for NCCL's those of the other ranks."""
    freed = MagicMock()
    monkeypatch.setattr(worker, "load_sequences", lambda _: None)
    error = RuntimeError("it broke")
    monkeypatch.setattr(worker, "train", MagicMock(side_effect=error if fails else [()]))
    monkeypatch.setattr("hyperfitting.runtime.memory.collect_unreferenced", freed)
    task: Any = TrainingTask(*[MagicMock()] * 5)
    try:
        list(task.run(DistContext(0, world_size)))
    except RuntimeError as raised:
        assert raised is error
    assert freed.called == (world_size == 1 or not fails)
