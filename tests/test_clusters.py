"""Sweeps on real engines on this machine: submitit's local executor, and a Ray cluster.

And on SLURM, where there is one: `tests/slurm.sh` starts one.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hyperfitting.errors import UserError
from hyperfitting.runtime import preemption
from hyperfitting.sweep import clusters
from hyperfitting.sweep.config import HydraSetup, RayConfig, SlurmConfig
from hyperfitting.sweep.state import RunFolder
from tests.cli import Fork, below, hyperfit, start
from tests.conftest import sweep_numbers

FOUR = [
    "-m", "preset=debug", "trainer.epochs=40", "trainer.eval_every_epochs=40",
    "seed=0,1,2,3", "hydra.sweep.dir=sweep",
]  # fmt: skip
REAL_SLURM = "a real SLURM"
ENGINES = {
    "slurm": [
        "hydra/launcher=slurm", "hydra.launcher.cluster=local", "hydra.launcher.gpus_per_node=0",
    ],
    "ray": ["hydra/launcher=ray"],
    REAL_SLURM: [
        "hydra/launcher=slurm", "hydra.launcher.gpus_per_node=0", "hydra.launcher.cpus_per_task=1",
    ],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
}  # fmt: skip
# SIGUSR2 is SLURM's warning before the time limit. Outside SLURM SIGTERM does not requeue: the job
# ends, and the sweep submits it again.
SIGNALS = {"slurm": (signal.SIGTERM, signal.SIGUSR2), REAL_SLURM: (signal.SIGTERM, signal.SIGUSR2)}
NO_HYDRA: Any = (None, None, None)
N_REQUEUED = {"slurm": 1, REAL_SLURM: 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sweep with worker processes, which need no engine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = hyperfit(folder, *FOUR, "hydra.launcher.workers=2", timeout=600)
    assert result.returncode == 0, result.stderr
    return folder


def wait_for_training(process: Fork, folder: Path, excluded_pids: Sequence[int]) -> int:
    """Wait until a run trains and there is a checkpoint; return the pid of the run."""

    def training() -> list[int]:
        if not below(folder, "tuned/*.partial/checkpoint-*.pt"):
            return []
        paths = below(folder / "sweep", "status.json")
        statuses = [RunFolder(path.parent).read_status() for path in paths]
        return [
            status.pid
            for status in statuses
            if (status.kind, status.task) == ("running", "training")
            and status.pid not in excluded_pids
        ]

    pids: list[int] = []
    process.wait_until(lambda: pids.extend(training()) or pids, timeout=240)
    return pids[0]


def skip_without(engine: str) -> None:
    if engine == REAL_SLURM and not (
        shutil.which("sinfo") and subprocess.run(["sinfo"], check=False).returncode == 0
    ):
        pytest.skip("there is no SLURM here")


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_a_sweep_survives_a_job_that_is_preempted_and_one_that_is_killed(
    tmp_path: Path, undisturbed: Path, engine: str
) -> None:
    skip_without(engine)
    overrides = ENGINES[engine]
    # Ray has its workers run at niceness 15, behind all other tests
    process = start(tmp_path, *FOUR, *overrides, RAY_worker_niceness="0")
    signaled: list[int] = []
    for signum in (*SIGNALS.get(engine, (signal.SIGTERM,)), signal.SIGKILL):
        signaled.append(wait_for_training(process, tmp_path, signaled))
        os.kill(signaled[-1], signum)
    stdout, stderr = process.communicate(timeout=600)
    assert process.wait() == 0, stderr
    assert stdout.count(" finished in ") == 4
    assert sweep_numbers(tmp_path / "sweep") == sweep_numbers(undisturbed / "sweep")
    if engine in N_REQUEUED:
        log_dir = tmp_path / "sweep" / clusters.LOG_DIR
        logs = [path.read_text() for path in (*below(log_dir, "*.err"), *below(log_dir, "*.out"))]
        assert sum("Requeued job" in log for log in logs) == N_REQUEUED[engine]


@pytest.mark.parametrize(
    ("signum", "executor", "state", "expected"),
    [
        (signal.SIGUSR2, "local", "", True),  # the time limit
        (signal.SIGTERM, "local", "", False),
        (signal.SIGTERM, "slurm", "RUNNING", True),  # preemption with a grace time
        (signal.SIGTERM, "slurm", "COMPLETING", False),  # `scancel`
        (signal.SIGTERM, "slurm", "", False),  # it has left the queue
    ],
)
def test_a_job_is_requeued_unless_it_was_canceled(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signum: signal.Signals,
    executor: str,
    state: str,
    expected: bool,
) -> None:
    squeue = tmp_path / "squeue"  # in place of SLURM's
    squeue.write_text(
        f'#!/bin/sh\n[ "$*" = "--noheader --jobs 7_3 --format=%T" ] && echo {state}\n'
    )
    squeue.chmod(0o755)
    variables = {"SUBMITIT_EXECUTOR": executor, "SLURM_ARRAY_JOB_ID": "7", "PATH": str(tmp_path)}
    for name, value in (variables | {"SLURM_ARRAY_TASK_ID": "3"}).items():
        monkeypatch.setenv(name, value)

    def preempted(*_: object) -> None:
        raise preemption.Preempted(signum)

    requeued: list[int] = []
    monkeypatch.setattr(clusters, "execute_job", preempted)
    monkeypatch.setattr(preemption, "forward_signal", lambda _: requeued.append(signum))
    monkeypatch.setattr(preemption, "install_handlers", dict)
    with pytest.raises(RuntimeError, match=signum.name):
        clusters.Job(HydraSetup(*NO_HYDRA), 0, [])()
    assert requeued == [signum] * expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hydra/launcher=slurm"], "hydra.launcher.cluster=slurm: cannot be used"),
        (["hydra/launcher=ray", "hydra.launcher.address=auto"], "no Ray cluster"),
    ],
)
def test_a_cluster_that_cannot_be_reached_is_reported(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    # with a PATH in which there is no SLURM
    result = hyperfit(tmp_path, *FOUR, *overrides, PATH=str(tmp_path))
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.distributed
def test_a_job_that_slurm_rejects_is_reported(tmp_path: Path) -> None:
    skip_without(REAL_SLURM)
    overrides = [*ENGINES[REAL_SLURM], "hydra.launcher.partition=nowhere"]
    result = hyperfit(tmp_path, *FOUR, *overrides)
    assert result.returncode == 1
    assert "invalid partition specified: nowhere" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_fields_of_the_launcher_reach_submitit_under_its_own_names() -> None:
    config = SlurmConfig(
        timeout_min=5, partition="p", cpus_per_task=2, gpus_per_node=3, mem_gb=1.5,
        array_parallelism=7, signal_delay_s=9, additional_parameters={"account": "x"},
    )  # fmt: skip
    assert clusters._submitit_parameters(config) == {
        "name": "hyperfitting", "timeout_min": 5, "cpus_per_task": 2, "gpus_per_node": 3,
        "mem_gb": 1.5, "slurm_partition": "p", "slurm_array_parallelism": 7,
        "slurm_signal_delay_s": 9, "slurm_additional_parameters": {"account": "x"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("minutes", "seconds", "expected"),
    [(24 * 60, None, 600), (10, None, 60), (24 * 60, 1800, 1800), (10, 599, 599)],
)
def test_slurm_warns_a_job_in_time_for_its_checkpoint(
    minutes: int, seconds: int | None, expected: int
) -> None:
    config = SlurmConfig(timeout_min=minutes, signal_delay_s=seconds)
    assert clusters._submitit_parameters(config)["slurm_signal_delay_s"] == expected


def test_a_warning_before_the_job_begins_is_refused() -> None:
    with pytest.raises(UserError, match=r"signal_delay_s=600: leaves a job no time"):
        clusters._submitit_parameters(SlurmConfig(timeout_min=10, signal_delay_s=600))


@pytest.mark.parametrize(
    ("configured", "resources", "expected"),
    [
        (None, {"CPU": 8.0, "GPU": 4.0}, 1),
        (None, {"CPU": 8.0}, 0),
        (0.5, {"CPU": 8.0, "GPU": 4.0}, 0.5),
        (0, {"CPU": 8.0, "GPU": 4.0}, 0),
    ],
)
def test_a_task_of_ray_has_a_gpu_of_its_own_where_there_are_any(
    configured: float | None, resources: dict[str, float], expected: float
) -> None:
    assert clusters._gpus_of_a_task(RayConfig(num_gpus=configured), resources) == expected


def test_an_engine_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"(?s)hydra/launcher=ray.*hyperfitting\[clusters\]"):
        clusters._require("ray", "ray")
