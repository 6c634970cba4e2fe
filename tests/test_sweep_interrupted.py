"""Sweeps whose processes are killed or interrupted at any moment, or whose disk is full."""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from hyperfitting.sweep.state import RunFolder, Status
from tests.cli import Fork, below, hyperfit, start
from tests.conftest import only_sweep, small_disk, sweep_numbers

SWEEP = ["-m", "preset=debug", "seed=0,1", "decode=greedy,top_p"]
ENDLESS = ["-m", "preset=debug", "trainer.epochs=100000"]


def status_of(folder: Path) -> Status:
    """The status of the only run of the only sweep in a working folder."""
    paths = list((folder / "outputs/sweeps").glob("*/only"))
    return RunFolder(paths[0]).read_status() if paths else Status()


def start_training(folder: Path) -> Fork:
    """Start a sweep of one endless run; return when it trains."""
    process = start(folder, *ENDLESS)
    process.wait_until(lambda: status_of(folder).task == "training")
    return process


def test_a_worker_that_is_killed_is_restarted_up_to_max_attempts(tmp_path: Path) -> None:
    process = start_training(tmp_path)
    for attempt in range(3):
        pid = status_of(tmp_path).pid
        os.kill(pid, signal.SIGKILL)
        if attempt < 2:
            process.wait_until(lambda: status_of(tmp_path).pid != pid)  # noqa: B023
            process.wait_until(lambda: status_of(tmp_path).task == "training")
    _, stderr = process.communicate(timeout=60)
    assert process.wait() == 1
    assert "its process died 3 times" in stderr
    assert "while training" in stderr


def test_workers_end_with_the_launcher(tmp_path: Path) -> None:
    process = start_training(tmp_path)
    pid = status_of(tmp_path).pid
    process.send_signal(signal.SIGKILL)
    process.wait()
    with suppress(psutil.NoSuchProcess):
        worker = psutil.Process(pid)
        deadline = time.monotonic() + 10
        while worker.status() != psutil.STATUS_ZOMBIE:  # nobody may wait for an orphan
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_ctrl_c_says_that_the_same_command_resumes(tmp_path: Path) -> None:
    process = start_training(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.wait() == 130
    assert "interrupted; the same command resumes where it stopped" in stderr
    assert "Traceback" not in stderr


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which SWEEP has finished."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = hyperfit(folder, *SWEEP, from_nothing=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.exhaustive
def test_a_full_disk_loses_nothing_that_was_built(undisturbed: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "3m") as disk:
        full = hyperfit(disk, *SWEEP, from_nothing=True)
        assert full.returncode == 1
        assert "no space left on the disk" in full.stderr
        assert "Traceback" not in full.stdout + full.stderr
        built = set((disk / "outputs/store").glob("*/*/manifest.json"))
        assert built
        subprocess.run(["mount", "-o", "remount,size=256m", str(disk)], check=True)
        again = hyperfit(disk, *SWEEP, from_nothing=True)
        assert again.returncode == 0, again.stderr
        assert sweep_numbers(only_sweep(disk)) == sweep_numbers(only_sweep(undisturbed))
        assert built <= set((disk / "outputs/store").glob("*/*/manifest.json"))


@pytest.mark.parametrize(
    ("n_kills", "seed"), [(3, 7), pytest.param(20, 8, marks=pytest.mark.exhaustive)]
)
def test_killed_at_many_moments_a_sweep_ends_with_the_same_records(
    tmp_path: Path, undisturbed: Path, n_kills: int, seed: int
) -> None:
    """A moment is the number of files that the sweep has created, which no load changes."""
    rng, n_hits = random.Random(seed), 0
    n_files = len(below(undisturbed / "outputs"))
    for moment in sorted(rng.uniform(0.05, 0.85) * n_files for _ in range(n_kills)):
        process = start(tmp_path, *SWEEP, from_nothing=True)
        reached = max(moment, len(below(tmp_path)) + 1)
        process.wait_until(lambda: len(below(tmp_path)) >= reached)  # noqa: B023
        time.sleep(rng.uniform(0, 0.1))
        os.killpg(process.pid, signal.SIGKILL)
        n_hits += process.wait() == -signal.SIGKILL
    assert n_hits == n_kills  # each hit a sweep that was running
    last = hyperfit(tmp_path, *SWEEP, from_nothing=True)
    assert last.returncode == 0, last.stderr
    assert len(sweep_numbers(only_sweep(tmp_path))) == 4
    assert sweep_numbers(only_sweep(tmp_path)) == sweep_numbers(only_sweep(undisturbed))
