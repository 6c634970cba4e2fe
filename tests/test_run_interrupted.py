"""A run that is killed, interrupted, cut off by a full disk or damaged ends with its numbers."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli import below, hyperfit, start
from tests.conftest import run_numbers, small_disk

DEBUG = ["preset=debug", "hydra.run.dir=run"]
LONGER = [*DEBUG, "trainer.epochs=6", "evaluation.max_new_tokens=[64]", "dataset.n_train=40"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the longer run has ended."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert hyperfit(folder, *LONGER, from_nothing=True).returncode == 0
    return folder


def test_kill_9_at_any_moment_ends_with_bit_identical_numbers(
    tmp_path: Path, undisturbed: Path
) -> None:
    """Moments of progress, not of the clock: a shared machine may be twice as fast soon after."""
    seed = int(os.environ.get("KILL_SEED") or time.time_ns() % 10**6)  # other moments in every run
    print(f"KILL_SEED={seed}")  # shown when the test fails: repeats it
    rng = random.Random(seed)
    n_files = len(below(undisturbed / "outputs/store"))
    moments = sorted((rng.uniform(0.1, 0.75) * n_files, rng.uniform(0, 0.3)) for _ in range(3))
    for reached, later in moments:
        process = start(tmp_path, *LONGER, from_nothing=True)
        process.wait_until(lambda: len(below(tmp_path / "outputs/store")) >= reached)  # noqa: B023
        time.sleep(later)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, moments
    assert hyperfit(tmp_path, *LONGER).returncode == 0, moments
    assert run_numbers(tmp_path / "run") == run_numbers(undisturbed / "run"), moments
    assert not below(tmp_path / "outputs/store", "*.partial")


@pytest.mark.parametrize(
    "sign",
    [
        "tuned/*.partial/checkpoint-*.pt",
        "tuned/*.partial/last.safetensors",
        "continuations/*.partial",
    ],
)
def test_kill_9_in_each_phase_ends_with_bit_identical_numbers(
    tmp_path: Path, undisturbed: Path, sign: str
) -> None:
    """Aimed kills: as soon as a sign of training, of writing and of generation is on the disk."""
    process = start(tmp_path, *LONGER)
    process.wait_until(lambda: below(tmp_path / "outputs/store", sign))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "run/results.json").exists()
    assert hyperfit(tmp_path, *LONGER).returncode == 0
    assert run_numbers(tmp_path / "run") == run_numbers(undisturbed / "run")


def test_an_interrupted_run_resumes(tmp_path: Path, debug_run: Path) -> None:
    process = start(tmp_path, *DEBUG)
    process.wait_until(lambda: below(tmp_path / "outputs/store", "tuned/*.partial"))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.wait() == 130
    assert "interrupted; the same command resumes" in stderr
    assert hyperfit(tmp_path, *DEBUG).returncode == 0
    assert run_numbers(tmp_path / "run") == run_numbers(debug_run / "run")


def test_damaged_artifacts_are_built_again_with_the_same_numbers(
    debug_run: Path, tmp_path: Path
) -> None:
    """One file of every artifact is damaged, between two runs of the same command."""
    shutil.copytree(debug_run / "outputs", tmp_path / "outputs")
    store = tmp_path / "outputs/store"
    folders = [path.parent for path in store.glob("*/*/manifest.json")]
    kinds = {folder.parent.name for folder in folders}
    assert {"documents", "sequences", "tuned", "validation", "continuations"} <= kinds
    for folder in folders:
        victim = next(
            p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "manifest.json"
        )
        victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    result = hyperfit(tmp_path, *DEBUG)
    assert result.returncode == 0, result.stderr
    assert run_numbers(tmp_path / "run") == run_numbers(debug_run / "run")


def test_a_full_disk_is_reported_and_finished_artifacts_are_kept(
    tmp_path: Path, debug_run: Path
) -> None:
    with small_disk(tmp_path / "disk", "3m") as disk:
        result = hyperfit(tmp_path, *DEBUG, f"store={disk}")
        assert result.returncode == 1
        assert "no space left on the disk" in result.stderr
        assert "Traceback" not in result.stderr
        finished = {p.parent.name for p in disk.rglob("manifest.json")}
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = hyperfit(tmp_path, *DEBUG, f"store={disk}")
        assert again.returncode == 0, again.stderr
        assert finished <= {p.parent.name for p in disk.rglob("manifest.json")}
        expected = run_numbers(debug_run / "run")
        expected["config"]["store"] = str(disk)
        assert run_numbers(tmp_path / "run") == expected
