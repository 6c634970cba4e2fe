"""Told to end by a signal: a checkpoint at once, and the same numbers when it goes on."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from hyperfitting import preemption
from hyperfitting.config import RunConfig
from hyperfitting.training.learner import Learner
from tests.conftest import below, command, environment, hyperfit, tiny_model
from tests.test_sweep import numbers
from tests.test_training import cfg, train

__all__ = ["cfg"]


@pytest.fixture
def signals() -> Any:
    """Listen to signals, as the command line does, for one test."""
    before = {signum: signal.getsignal(signum) for signum in preemption.SIGNALS}
    preemption.listen()
    yield
    preemption._asked = None
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("update", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("dropout", [False, True])
def test_a_training_told_to_end_at_any_update_goes_on_to_the_same_bits(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int, dropout: bool
) -> None:
    """Three updates an epoch: in the middle of one, at its end, and at the end of the last."""
    base = tiny_model(tmp_path / "model", "gpt2")  # it has dropout of its own
    cfg.trainer = replace(cfg.trainer, dropout=dropout)
    expected_rows, expected = train(cfg, base, tmp_path / "whole")
    real, taken = Learner.update, 0

    def told(*arguments: Any) -> float:
        nonlocal taken
        taken += 1
        if taken == update:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(*arguments)

    monkeypatch.setattr(Learner, "update", told)
    with pytest.raises(preemption.Preempted, match="SIGUSR1"):
        train(cfg, base, tmp_path / "cut")
    assert taken == update
    preemption._asked = None
    rows, weights = train(cfg, base, tmp_path / "cut")
    assert taken == 9  # none of them twice
    assert rows == expected_rows
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("signals")
def test_what_is_no_training_ends_at_once_and_a_second_signal_does_not_wait() -> None:
    with pytest.raises(preemption.Preempted, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    with preemption.waits():
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.asked() == signal.SIGTERM
        with pytest.raises(preemption.Preempted):
            preemption.end_if_asked()
        with pytest.raises(preemption.Preempted):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)


LONG = ["preset=debug", "trainer.epochs=40", "trainer.look_every=40", "hydra.run.dir=run"]
SWEEP = ["-m", *LONG[:-1], "seed=0,1", "hydra.sweep.dir=sweep"]


def until(process: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 120
    while not below(folder, pattern):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def begun(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        command(*arguments), cwd=folder, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_the_command_says_so_and_goes_on(tmp_path: Path) -> None:
    process = begun(tmp_path, *LONG)
    until(process, tmp_path, "tuned/*.partial/checkpoint-*.pt")
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "told to end (SIGTERM); the same command goes on" in told
    assert "Traceback" not in told
    assert hyperfit(tmp_path, *LONG).returncode == 0


def test_a_sweep_told_to_end_has_its_members_write_checkpoints_and_goes_on(tmp_path: Path) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = begun(cut, *SWEEP, "hydra.launcher.workers=2")
    until(process, cut, "tuned/*.partial/checkpoint-*.pt")
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "told to end (SIGTERM)" in told and "Traceback" not in told
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    assert below(cut, "tuned/*.partial/checkpoint-*.pt")
    whole.mkdir()
    assert hyperfit(cut, *SWEEP).returncode == hyperfit(whole, *SWEEP).returncode == 0
    assert numbers(cut / "sweep") == numbers(whole / "sweep")


def test_a_member_told_to_end_is_begun_again_by_its_launcher(tmp_path: Path) -> None:
    process = begun(tmp_path, *SWEEP)
    until(process, tmp_path, "tuned/*.partial/checkpoint-*.pt")
    status = json.loads(below(tmp_path / "sweep", "status.json")[0].read_text())
    os.kill(status["pid"], signal.SIGTERM)
    out, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert out.count("has finished") == 2


@pytest.mark.usefixtures("signals")
def test_a_job_that_is_being_queued_again_is_not_told_twice() -> None:
    """SLURM sends SIGTERM to a job that asks to be queued again, while it still asks."""
    interrupt, asked = signal.getsignal(signal.SIGINT), []

    def queue_again(signum: int, _: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        asked.append(signum)

    try:
        preemption.hand_over({signal.SIGUSR2: queue_again})
        assert asked == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGINT, interrupt)
