"""A training in several processes that is killed, and resumed in as many or in others."""

import signal
from pathlib import Path

import numpy as np
import psutil
import pytest

from hyperfitting.training.history import read_rows
from tests.cli import Fork, below, hyperfit, start
from tests.test_distributed import SHAPE

LONG = [
    *(o for o in SHAPE if not o.startswith("trainer.epochs")), "trainer.epochs=12",
    "hydra.run.dir=run",
]  # fmt: skip


def start_training(folder: Path, n: int, *more: str) -> Fork:
    """Start training in ``n`` processes; return when they have written a checkpoint."""
    process = start(folder, *LONG, *more, f"hardware.num_processes={n}")
    checkpoints = f"tuned/*.partial/checkpoint-*-of-{n}.pt"
    process.wait_until(lambda: len(below(folder, checkpoints)) >= n, timeout=240)
    return process


def ranks_of(process: Fork) -> dict[int, psutil.Process]:
    """Return the ranks that a run has started."""
    children = psutil.Process(process.pid).children()
    return {
        int(child.environ()["RANK"]): child
        for child in children
        if "hyperfitting.training" in child.cmdline()
    }


def assert_all_end(ranks: dict[int, psutil.Process]) -> None:
    psutil.wait_procs(list(ranks.values()), timeout=10)
    assert not [p for p in ranks.values() if p.is_running()]


@pytest.mark.distributed
def test_after_any_death_the_training_resumes_in_any_number_of_processes(tmp_path: Path) -> None:
    """Four, of which one is killed; then two, whose parent is killed; then one."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert hyperfit(whole, *LONG).returncode == 0

    process = start_training(cut, 4)
    ranks = ranks_of(process)
    assert sorted(ranks) == [0, 1, 2, 3]
    ranks[2].send_signal(signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.wait() == 1
    assert "rank 2 of 4 was killed (SIGKILL)" in stderr and "Traceback" not in stderr
    assert_all_end(ranks)

    process = start_training(cut, 2)
    ranks = ranks_of(process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert_all_end(ranks)

    resumed = hyperfit(cut, *LONG)
    assert resumed.returncode == 0, resumed.stderr
    rows, expected = (
        read_rows(below(folder, "tuned/*/history.jsonl")[0]) for folder in (cut, whole)
    )
    np.testing.assert_allclose(
        [row["train/loss"] for row in rows], [row["train/loss"] for row in expected], rtol=1e-3
    )


@pytest.mark.distributed
def test_with_as_many_processes_a_training_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 8-bit optimizer state, whose tensors are of a subclass."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    low = ["model.dtype=bfloat16", "optimizer=adam_8bit", "model.architecture.hidden_size=128"]
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # every rank would compile the optimizer
    assert hyperfit(whole, *LONG, *low, "hardware.num_processes=2").returncode == 0
    process = start_training(cut, 2, *low)
    process.send_signal(signal.SIGTERM)  # most likely in the middle of an epoch
    _, stderr = process.communicate(timeout=60)
    assert process.wait() == 128 + signal.SIGTERM
    assert "received SIGTERM" in stderr and "Traceback" not in stderr
    assert hyperfit(cut, *LONG, *low, "hardware.num_processes=2").returncode == 0
    for name in ("history.jsonl", "last.safetensors", "validation.json", "best_val.safetensors"):
        actual, expected = (
            next(p for p in below(folder, f"*/{name}") if ".partial" not in str(p))
            for folder in (cut, whole)
        )
        assert actual.read_bytes() == expected.read_bytes()
