"""The local downstream tasks of a run as files for lm-evaluation-harness's own command line."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from hyperfitting.errors import UserError
from hyperfitting.evaluation.downstream import local_tasks
from hyperfitting.evaluation.downstream.artifacts import QUESTIONS
from hyperfitting.pipeline.pipeline import Pipeline
from hyperfitting.runtime.files import write_text


def local_tasks_of(pipeline: Pipeline) -> list[str]:
    """Return the local tasks that a run answers.

    Raises:
        UserError: there is none.
    """
    tasks = pipeline.cfg.evaluation.downstream
    local = [task for task in tasks if task.startswith(local_tasks.PREFIX)]
    if not local:
        raise UserError(
            "this run answers no local task: there are no questions to write",
            field="evaluation.downstream",
            value=tasks,
            valid="names that begin with local_",
            hint="without --tasks: lm_eval has its own tasks already",
        )
    return local


def write_tasks(pipeline: Pipeline, tasks: Sequence[str], folder: Path, final: Path) -> None:
    """Write `TASK.yaml` and the questions, `TASK.jsonl`, of local tasks.

    Args:
        pipeline: of the run; questions that are no longer in its store are made again.
        tasks: of `local_tasks_of`.
        folder: to write into.
        final: where the folder will lie: the harness needs the absolute path of the questions.
    """
    for step in pipeline.downstream.inputs.values():
        step.ensure()
    for task in tasks:
        questions = f"{task}.jsonl"
        shutil.copyfile(pipeline.downstream.questions(task).file(QUESTIONS), folder / questions)
        config = local_tasks.harness_config(task, str(final.absolute() / questions))
        write_text(folder / f"{task}.yaml", yaml.safe_dump(config, sort_keys=False))
