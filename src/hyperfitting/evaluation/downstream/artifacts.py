"""Downstream tasks as artifacts: questions, and each model's answers task by task."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyperfitting.data.config import TextsConfig
from hyperfitting.data.sources import documents_step, load_documents
from hyperfitting.data.splits import split_documents
from hyperfitting.errors import UserError
from hyperfitting.evaluation.downstream import harness, local_tasks
from hyperfitting.evaluation.setting import LazyModel, Setting
from hyperfitting.models.size import forward_flops, model_size
from hyperfitting.runtime.files import write_json, write_text
from hyperfitting.store.artifact import Artifact, Step

VERSION = 1
QUESTIONS = "questions.jsonl"
_RESULTS, _SAMPLES = "results.json", "samples"
_QUESTION_TOKENS = 128
"""Of a question with its choices, on average; for the plan."""
_KEPT = ("results", "groups", "versions", "n-shot", "n-samples")
"""Of the harness's results."""


@dataclass(frozen=True)
class DownstreamArtifacts:
    """The steps of all tasks; empty: none is asked for."""

    inputs: dict[str, Step] = field(default_factory=dict)
    """Documents and questions of the local tasks, inputs first."""
    tuned: dict[str, Step] = field(default_factory=dict)
    """The tuned model's answers by task; the base model's if nothing is trained."""
    base: dict[str, Step] = field(default_factory=dict)

    def questions(self, task: str) -> Artifact:
        """Return the questions of a local task."""
        return self.inputs[_questions_name(local_tasks.parse(task))].artifact

    def named(self) -> Iterator[tuple[str, Step]]:
        """Yield all steps with their names, such as `downstream/tuned/mmlu`."""
        for kind, steps in vars(self).items():
            if kind != "tuned" or self.tuned is not self.base:
                for name, step in steps.items():
                    yield f"downstream/{kind}/{name}", step


def downstream_artifacts(
    setting: Setting, base: LazyModel, tuned: LazyModel | None, holdout_fraction: float
) -> DownstreamArtifacts:
    """Return the steps of the tasks that a config asks for.

    Args:
        setting: the tasks, and where they are kept.
        base: the base model.
        tuned: the tuned model; none: nothing is trained.
        holdout_fraction: of the documents, as of the dataset that is trained on.

    Raises:
        UserError: the harness is not installed, or has no such task.
    """
    tasks = setting.evaluation.downstream
    if not tasks:
        return DownstreamArtifacts()
    version = harness.harness_version()
    harness.check_tasks(tasks)
    inputs: dict[str, Step] = {}
    questions: dict[str, Artifact] = {}
    for name in tasks:
        if name.startswith(local_tasks.PREFIX):
            steps = _questions_steps(setting, local_tasks.parse(name), holdout_fraction)
            inputs |= steps
            questions[name] = list(steps.values())[-1].artifact

    def answers(model: LazyModel) -> dict[str, Step]:
        return {t: answers_step(setting, model, t, questions.get(t), version) for t in tasks}

    of_base = answers(base)
    return DownstreamArtifacts(inputs, of_base if tuned is None else answers(tuned), of_base)


def _questions_steps(
    setting: Setting, task: local_tasks.LocalTask, holdout_fraction: float
) -> dict[str, Step]:
    """Return the steps of a local task's documents, if it has any, and questions."""
    documents: Step | None = None
    config: dict[str, Any] = {"questions": task.questions}
    if task.domain is not None:
        texts = TextsConfig(name=task.domain, source="package", path=task.domain)
        documents = documents_step(texts, setting.store, setting.progress)
        config["holdout_fraction"] = holdout_fraction

    def build(work: Path) -> None:
        held_out: list[str] = []
        if documents is not None:
            loaded = load_documents(documents.artifact)
            held_out = split_documents(loaded.texts, loaded.groups, holdout_fraction, 0).held_out
        rows = local_tasks.make_questions(task, held_out)
        if not rows:
            raise UserError(
                "its held-out documents give no question",
                field="dataset.holdout_fraction",
                value=holdout_fraction,
            )
        write_text(work / QUESTIONS, "".join(json.dumps(row) + "\n" for row in rows))

    artifact = setting.store.artifact(
        "downstream_questions",
        version=local_tasks.VERSION,
        config=config,
        inputs={} if documents is None else {"documents": documents.artifact.id},
    )
    steps = {} if documents is None else {f"documents/{task.domain}": documents}
    return steps | {_questions_name(task): Step(artifact, build)}


def _questions_name(task: local_tasks.LocalTask) -> str:
    return f"questions/{task.questions}"


def answers_step(
    setting: Setting, model: LazyModel, task: str, questions: Artifact | None, version: str
) -> Step:
    """Return the step of a model's answers to one task or group of the harness.

    Files: `results.json`, and `samples/TASK.jsonl`, a line for each question and filter.

    Args:
        setting: few-shot examples, limit and batch size.
        model: which answers.
        task: its name.
        questions: of a local task.
        version: of the harness.
    """
    evaluation = setting.evaluation
    options: dict[str, Any] = {
        "num_fewshot": evaluation.downstream_num_fewshot,
        "limit": evaluation.downstream_limit,
        "apply_chat_template": evaluation.downstream_chat_template,
    }

    def build(work: Path) -> None:
        loaded = model()
        on_gpu = loaded.device.type == "cuda"
        spec: Any = task
        if questions is not None:
            spec = local_tasks.harness_config(task, str(questions.file(QUESTIONS)))
        with setting.progress(f"answering {task} with {model.label}", 1, "tasks") as advance:
            results = harness.evaluate(
                loaded,
                model.state.base.tokenizer(),
                spec,
                batch_size="auto" if on_gpu else setting.hardware.evaluation_batch_size,
                **options,
            )
            advance(1)
        _save(work, results, version)

    def flops() -> float:
        n_questions = min(
            evaluation.downstream_limit or local_tasks.MAX_QUESTIONS, local_tasks.MAX_QUESTIONS
        )
        size = model_size(model.state.base, setting.store)
        return forward_flops(size, n_questions, _QUESTION_TOKENS)

    artifact = setting.store.artifact(
        "downstream",
        version=VERSION,
        config=options | {"task": task, "harness": version},
        inputs={"model": model.state.id} | ({"questions": questions.id} if questions else {}),
    )
    # how many questions the harness's own tasks have is known only after loading them
    return Step(artifact, build, flops if questions is not None else None)


def _save(work: Path, results: dict[str, Any], version: str) -> None:
    """Write the files of a `downstream` artifact, from the results of the harness."""
    (work / _SAMPLES).mkdir(exist_ok=True)
    for name, samples in results["samples"].items():
        lines = (harness.sample_line(sample) + "\n" for sample in samples)
        write_text(work / _SAMPLES / f"{name}.jsonl", "".join(lines))
    kept = {name: results.get(name, {}) for name in _KEPT}
    kept["hashes"] = {n: harness.task_hash(s) for n, s in results["samples"].items()}
    kept["output_types"] = {n: c.get("output_type") for n, c in results["configs"].items()}
    kept["harness"] = version
    write_json(work / _RESULTS, json.loads(json.dumps(kept, default=harness.plain)))


def load_results(artifact: Artifact) -> dict[str, Any]:
    """Return `results.json` of the answers to a task."""
    results: dict[str, Any] = json.loads(artifact.file(_RESULTS).read_text("utf-8"))
    return results


def load_samples(artifact: Artifact, task: str) -> list[dict[str, Any]]:
    """Return the samples of a task, by question."""
    lines = artifact.file(f"{_SAMPLES}/{task}.jsonl").read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines if line]
