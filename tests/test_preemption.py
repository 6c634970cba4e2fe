"""Preemption signals: a checkpoint after the step, and the same numbers after resuming."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from hyperfitting.runtime import preemption
from hyperfitting.training import train as train_module
from hyperfitting.training.config import TrainingConfig
from hyperfitting.training.step import train_step
from tests.cli import Fork, below, hyperfit, start
from tests.conftest import sweep_numbers, tiny_model
from tests.training import cfg, run_training

__all__ = ["cfg"]


@pytest.fixture
def signals() -> Any:
    """Install the command line's handlers for one test."""
    replaced = {signum: signal.getsignal(signum) for signum in preemption.SIGNALS}
    preemption.install_handlers()
    yield
    preemption._requested = None
    for signum, handler in replaced.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("step", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("dropout", [False, True])
def test_a_training_preempted_at_any_step_resumes_to_the_same_bits(
    cfg: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, dropout: bool
) -> None:
    """Three steps an epoch: in the middle of one, at its end, and at the end of the last."""
    base = tiny_model(tmp_path / "model", "gpt2")  # it has dropout of its own
    cfg.trainer = replace(cfg.trainer, dropout=dropout)
    expected_rows, expected = run_training(cfg, base, tmp_path / "whole")
    taken = 0

    def preempted(*arguments: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_step(*arguments)

    monkeypatch.setattr(train_module, "train_step", preempted)
    with pytest.raises(preemption.Preempted, match="SIGUSR1"):
        run_training(cfg, base, tmp_path / "cut")
    assert taken == step
    preemption._requested = None
    rows, weights = run_training(cfg, base, tmp_path / "cut")
    assert taken == 9  # none of them twice
    assert rows == expected_rows
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("signals")
def test_outside_training_a_signal_interrupts_at_once_and_so_does_a_second_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preemption, "_REQUEST_SECONDS", 0.05)
    with pytest.raises(preemption.Preempted, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    time.sleep(0.06)
    with preemption.defer_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested_signal() == signal.SIGTERM
        with pytest.raises(preemption.Preempted):
            preemption.raise_if_requested()
        time.sleep(0.06)
        with pytest.raises(preemption.Preempted):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)


@pytest.mark.usefixtures("signals")
def test_a_signal_from_the_process_group_and_again_from_the_parent_is_one_request() -> None:
    with preemption.defer_signals():
        for signum in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        assert preemption.requested_signal() == signal.SIGUSR1


LONG = ["preset=debug", "trainer.epochs=20", "trainer.eval_every_epochs=20", "hydra.run.dir=run"]
SWEEP = ["-m", *LONG[:-1], "seed=0,1", "hydra.sweep.dir=sweep"]


def start_training(folder: Path, *arguments: str) -> Fork:
    """Start a command; return when it has written a checkpoint."""
    process = start(folder, *arguments)
    process.wait_until(lambda: below(folder, "tuned/*.partial/checkpoint-*.pt"))
    return process


def test_the_command_reports_the_signal_and_resumes(tmp_path: Path) -> None:
    process = start_training(tmp_path, *LONG)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.wait() == 128 + signal.SIGTERM
    assert "received SIGTERM; the same command resumes" in stderr
    assert "Traceback" not in stderr
    assert hyperfit(tmp_path, *LONG).returncode == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_preempted_sweep_has_its_runs_write_checkpoints_and_resumes(
    tmp_path: Path, send: Callable[[int, int], None]
) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = start_training(cut, *SWEEP, "hydra.launcher.workers=2")
    workers = psutil.Process(process.pid).children()
    send(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.wait() == 128 + signal.SIGTERM
    assert "received SIGTERM" in stderr and "Traceback" not in stderr
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    assert below(cut, "tuned/*.partial/checkpoint-*.pt")
    assert hyperfit(cut, *SWEEP).returncode == hyperfit(whole, *SWEEP).returncode == 0
    assert sweep_numbers(cut / "sweep") == sweep_numbers(whole / "sweep")


@pytest.mark.exhaustive
def test_a_preempted_run_of_a_sweep_is_started_again_by_its_launcher(tmp_path: Path) -> None:
    process = start_training(tmp_path, *SWEEP)
    status = json.loads(below(tmp_path / "sweep", "status.json")[0].read_text())
    os.kill(status["pid"], signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=300)
    assert process.wait() == 0, stderr
    assert stdout.count(" finished in ") == 2


@pytest.mark.usefixtures("signals")
def test_a_job_that_is_being_requeued_ignores_further_signals() -> None:
    """SLURM sends SIGTERM to a job that requeues itself, while it does."""
    interrupt, requeued = signal.getsignal(signal.SIGINT), []

    def requeue(signum: int, _: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        requeued.append(signum)

    try:
        preemption.forward_signal({signal.SIGUSR2: requeue})
        assert requeued == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGINT, interrupt)
