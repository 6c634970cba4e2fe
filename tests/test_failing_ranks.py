"""A rank that fails ends the training, whatever the others wait for.

Each rank begins by running a `sitecustomize` of the test, which makes it fail. As with NCCL, the
interpreter of such a rank does not end by itself: another rank would have to join its collectives.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import environment, hyperfit
from tests.test_distributed import SHAPE

pytestmark = pytest.mark.distributed
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
    "-m", "hyperfitting.run", *SHAPE,
]  # fmt: skip
SECONDS = 120
"""For a debug run of two processes that import torch and transformers on a busy machine."""
STEP_FAILS = """
from hyperfitting.training import step
forward_backward, calls = step._forward_backward, []
def fail(*arguments):
    calls.append(1)
    if len(calls) == 3:
        raise RuntimeError("it broke")
    return forward_backward(*arguments)
step._forward_backward = fail
"""
VALIDATION_FAILS_ONCE = """
import torch
from hyperfitting.decoding import generate
continue_batch, calls = generate._continue_batch, []
def fail(*arguments):
    calls.append(1)
    if len(calls) == 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return continue_batch(*arguments)
generate._continue_batch = fail
"""


def failing(folder: Path, rank: int, failure: str) -> str:
    """Return a PYTHONPATH with which a rank fails."""
    body = "import atexit, time\natexit.register(time.sleep, 3600)\n" + failure
    code = "import os\nif os.environ.get('RANK') == '%d':\n%s"
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    (folder / "sitecustomize.py").write_text(code % (rank, indented))
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def torchrun(folder: Path, rank: int, failure: str) -> "subprocess.CompletedProcess[str]":
    """Run two processes under torchrun, of which one fails."""
    process = subprocess.Popen(
        TORCHRUN, cwd=folder, env=environment(PYTHONPATH=failing(folder, rank, failure)),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _, stderr = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # it kills the ranks, which are in sessions of their own
        process.communicate(timeout=SECONDS)
        raise
    return subprocess.CompletedProcess(TORCHRUN, process.returncode, "", stderr)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_ends_all(tmp_path: Path, rank: int) -> None:
    path = failing(tmp_path, rank, STEP_FAILS)
    ended = hyperfit(tmp_path, *SHAPE, "hardware.num_processes=2", PYTHONPATH=path, timeout=SECONDS)
    assert ended.returncode == 1
    assert f"rank {rank} of 2 failed (RuntimeError: it broke)" in ended.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_under_torchrun_too(tmp_path: Path, rank: int) -> None:
    ended = torchrun(tmp_path, rank, STEP_FAILS)
    assert ended.returncode == 1
    error = "RuntimeError: it broke"
    assert (f"rank 1: {error}" if rank else error) in ended.stderr


def test_out_of_memory_of_one_rank_in_validation_ends_all(tmp_path: Path) -> None:
    """A smaller batch on that rank alone would be more forward passes than the others make."""
    path = failing(tmp_path, 1, VALIDATION_FAILS_ONCE)
    ended = hyperfit(tmp_path, *SHAPE, "hardware.num_processes=2", PYTHONPATH=path, timeout=SECONDS)
    assert ended.returncode == 1
    assert "hardware.generation_batch_size=2: out of memory" in ended.stderr


def test_out_of_memory_of_one_rank_under_torchrun_is_reported(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, 1, VALIDATION_FAILS_ONCE)
    assert ended.returncode == 1
    message = "rank 1: error: hardware.generation_batch_size=2: out of memory"
    assert ended.stderr.count(message) == 1
