"""Sweeps by real engines on this machine: submitit's local executor, and a cluster of Ray.

And SLURM, where there is one: `tests/slurm.sh` begins one.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hyperfitting.errors import UserError
from hyperfitting.sweep import clusters
from tests.conftest import below, command, environment, hyperfit
from tests.test_sweep import numbers

EIGHT = [
    "-m", "preset=debug", "trainer.epochs=40", "trainer.look_every=40", "seed=0,1,2,3,4,5,6,7",
    "hydra.sweep.dir=sweep",
]  # fmt: skip
ENGINES = {
    "slurm": ["hydra/launcher=slurm", "hydra.launcher.cluster=local", "hydra.launcher.gpus=0"],
    "ray": ["hydra/launcher=ray"],
    "a real SLURM": ["hydra/launcher=slurm", "hydra.launcher.gpus=0", "hydra.launcher.cpus=1"],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sweep by the launcher that needs no engine."""
    folder = tmp_path_factory.mktemp("plain")
    ended = hyperfit(folder, *EIGHT, "hydra.launcher.workers=2", timeout=600)
    assert ended.returncode == 0, ended.stderr
    return folder


def in_training(folder: Path, but: int = 0) -> int:
    """Return the process of a member that trains, and has a checkpoint already."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if below(folder, "tuned/*.partial/checkpoint-*.pt"):
            for path in below(folder / "sweep", "status.json"):
                said = json.loads(path.read_text())
                if said["kind"] == "running" and said["task"] == "training" and said["pid"] != but:
                    return int(said["pid"])
        time.sleep(0.01)
    raise AssertionError("no member trains")


def engine_or_skip(engine: str) -> str:
    if engine == "a real SLURM":
        there = shutil.which("sinfo") and subprocess.run(["sinfo"], check=False).returncode == 0
        if not there:
            pytest.skip("there is no SLURM here")
    return engine


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_a_sweep_survives_a_job_that_is_preempted_and_one_that_is_killed(
    tmp_path: Path, plain: Path, engine: str
) -> None:
    more = ENGINES[engine_or_skip(engine)]
    process = subprocess.Popen(
        command(*EIGHT, *more), cwd=tmp_path, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    told = in_training(tmp_path)
    os.kill(told, signal.SIGTERM)
    os.kill(in_training(tmp_path, but=told), signal.SIGKILL)
    out, problems = process.communicate(timeout=600)
    assert process.returncode == 0, problems
    assert out.count(" has finished") == 8
    assert numbers(tmp_path / "sweep") == numbers(plain / "sweep")
    if "hydra/launcher=slurm" in more:
        logs = [p.read_text() for p in below(tmp_path / "sweep" / clusters.LOGS, "*.err")]
        logs += [p.read_text() for p in below(tmp_path / "sweep" / clusters.LOGS, "*.out")]
        assert sum("Requeued job" in log for log in logs) == 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["hydra/launcher=slurm"], "hydra.launcher.cluster=slurm: cannot be used"),
        (["hydra/launcher=ray", "hydra.launcher.address=auto"], "no Ray cluster"),
    ],
)
def test_a_cluster_that_is_not_there_is_said(tmp_path: Path, more: list[str], says: str) -> None:
    ended = hyperfit(tmp_path, *EIGHT, *more, PATH=str(tmp_path))  # where SLURM is not, if it is
    assert ended.returncode == 1
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.distributed
def test_a_job_that_slurm_refuses_is_said(tmp_path: Path) -> None:
    real = ENGINES[engine_or_skip("a real SLURM")]
    ended = hyperfit(tmp_path, *EIGHT, *real, "hydra.launcher.partition=nowhere")
    assert ended.returncode == 1
    assert "invalid partition specified: nowhere" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_engine_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"(?s)hydra/launcher=ray.*hyperfitting\[clusters\]"):
        clusters._needs("ray", "ray")
