"""Local tasks of a run for lm-evaluation-harness's own command line, which gives equal numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from hyperfitting.apps import export
from hyperfitting.apps.harness_tasks import local_tasks_of, write_tasks
from hyperfitting.errors import UserError
from hyperfitting.evaluation.downstream import harness, local_tasks
from hyperfitting.pipeline.build import build_pipeline
from hyperfitting.record.files import RECORD_FILE, read_record
from tests.cli import hyperfit
from tests.conftest import Compose

pytest.importorskip("lm_eval")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def reads_no_task_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """To check the name of a task, the harness reads all of its own: seconds."""
    monkeypatch.setattr(harness, "check_tasks", lambda tasks: None)


def test_local_tasks_are_written_with_their_questions(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["local_agreement", "local_agreement_gen", "local_arithmetic"]
    tasks = f"evaluation.downstream=[{','.join(names)},gsm8k]"
    pipeline = build_pipeline(compose("preset=debug", f"store={tmp_path}/store", tasks), CPU)
    assert local_tasks_of(pipeline) == names
    partial = tmp_path / "partial"
    partial.mkdir()
    write_tasks(pipeline, names, partial, Path("tasks"))
    assert len(list(partial.iterdir())) == 2 * len(names)
    for name in names:
        lines = (partial / f"{name}.jsonl").read_text("utf-8").splitlines()
        task = local_tasks.parse(name)
        assert [json.loads(line) for line in lines] == local_tasks.make_questions(task, [])
        config = yaml.safe_load((partial / f"{name}.yaml").read_text("utf-8"))
        path = tmp_path / "tasks" / f"{name}.jsonl"  # absolute: where the folder will lie
        assert config == local_tasks.harness_config(name, str(path))


def test_a_run_without_local_tasks_has_none_to_write(compose: Compose, tmp_path: Path) -> None:
    for tasks in ([], ["evaluation.downstream=[gsm8k]"]):
        pipeline = build_pipeline(compose("preset=debug", f"store={tmp_path}", *tasks), CPU)
        with pytest.raises(UserError, match="answers no local task"):
            local_tasks_of(pipeline)


# `lm_eval` without reading the thousands of files of its own tasks (9 s)
_COMMAND_LINE = """
import functools, lm_eval.tasks
from lm_eval.__main__ import cli_evaluate
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
cli_evaluate()
"""


def test_tasks_are_not_written_over_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(SystemExit) as done:
        export.main(["run", str(tmp_path / "model"), "--tasks", str(tmp_path)])
    assert done.value.code == 1
    assert f"--tasks={tmp_path}: is not empty" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_the_numbers_of_a_record_are_those_of_the_harness_own_command_line(tmp_path: Path) -> None:
    tasks = "local_cloze_news,local_last_word_news,local_arithmetic_gen"
    result = hyperfit(
        tmp_path, "preset=debug", "hydra.run.dir=run", f"evaluation.downstream=[{tasks}]",
        "evaluation.downstream_limit=6",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    export = ["-m", "hyperfitting.apps.export", "run", "model", "--tasks", "tasks"]
    evaluate = [
        "-c", _COMMAND_LINE, "--model", "hf", "--model_args", "pretrained=model,dtype=float32",
        "--include_path", "tasks", "--tasks", tasks, "--limit", "6", "--device", "cpu",
        "--batch_size", "8", "--output_path", "out", "--log_samples",
    ]  # fmt: skip

    def run(arguments: list[str]) -> None:
        subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, check=True,
            capture_output=True, timeout=600,
        )  # fmt: skip

    run(export)
    model = tmp_path / "model"  # whose byte tokenizer has no end-of-text token, which lm_eval needs
    harness.with_eos(AutoTokenizer.from_pretrained(model)).save_pretrained(model)
    run(evaluate)
    (path,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(path.read_text("utf-8"))
    downstream = read_record(tmp_path / "run" / RECORD_FILE).downstream
    assert downstream is not None
    for name, task in downstream.tasks.items():
        values = {
            k: v for k, v in theirs["results"][name].items() if k.startswith(("acc,", "exact"))
        }
        (value,) = (v for k, v in values.items() if "stderr" not in k)
        assert task.tuned.value == value
        assert theirs["task_hashes"][name] == task.hash
    assert set(downstream.tasks) == set(tasks.split(","))
