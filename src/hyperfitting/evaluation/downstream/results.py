"""From the answers of base and tuned model to the record's `downstream`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from hyperfitting.evaluation.downstream import local_tasks
from hyperfitting.evaluation.downstream.artifacts import (
    DownstreamArtifacts,
    load_results,
    load_samples,
)
from hyperfitting.metrics.accuracy import accuracy, mcnemar
from hyperfitting.metrics.calibration import brier_scores, calibration
from hyperfitting.metrics.estimate import Estimate
from hyperfitting.metrics.uncertainty import bootstrap_mean, paired_difference
from hyperfitting.record.downstream import Downstream, DownstreamTask, Form, TaskScore
from hyperfitting.store.artifact import Artifact

Floats = NDArray[np.float64]
_PREFERRED = ("acc", "exact_match")
"""Metrics that are an accuracy, in order."""


@dataclass(frozen=True)
class Answers:
    """One model's answers to a task, (N,) questions."""

    metric: str
    filter: str
    questions: list[str]
    """Hash of each question."""
    correct: Floats
    """0 or 1."""
    logits: Floats | None
    """(N, C) log-likelihoods of the choices, padded with -inf; none: no multiple choice."""
    gold: NDArray[np.int64]


def build_downstream(artifacts: DownstreamArtifacts, resamples: int) -> Downstream | None:
    """Return what the record holds of the tasks; none: there are none.

    Args:
        artifacts: all answers; built.
        resamples: bootstrap resamples of the questions.
    """
    tasks: dict[str, DownstreamTask] = {}
    pooled: dict[str, dict[str, list[Floats]]] = {"tuned": {}, "base": {}}
    version = ""
    for requested, step in artifacts.base.items():
        base_results = load_results(step.artifact)
        version = base_results["harness"]
        for name in base_results["output_types"]:
            both = {
                side: read_answers(artifact, name)
                for side, artifact in (
                    ("tuned", artifacts.tuned[requested].artifact),
                    ("base", step.artifact),
                )
            }
            task = _task(name, artifacts.tuned[requested].artifact, step.artifact, both, resamples)
            tasks[name] = task
            for side, answers in both.items():
                pooled[side].setdefault(f"down/{task.form}", []).append(answers.correct)
                if answers.logits is not None:
                    p = softmax(answers.logits, axis=1)
                    scores = brier_scores(p, answers.gold)
                    pooled[side].setdefault("down/brier", []).append(scores)
    if not tasks:
        return None
    return Downstream(
        harness=version,
        tasks=tasks,
        estimates={
            "tuned": _pooled(pooled["tuned"], resamples),
            "base": _pooled(pooled["base"], resamples),
        },
    )


def _pooled(values: dict[str, list[Floats]], resamples: int) -> dict[str, Estimate]:
    estimates = {
        key: bootstrap_mean(np.concatenate(parts), resamples) for key, parts in values.items()
    }
    return {key: value for key, value in estimates.items() if value is not None}


def read_answers(artifact: Artifact, task: str) -> Answers:
    """Return a model's answers to a task.

    Of a task with several filters the first counts; of several metrics the accuracy.
    """
    samples = load_samples(artifact, task)
    chosen = samples[0]["filter"]
    samples = sorted((s for s in samples if s["filter"] == chosen), key=lambda s: s["doc_id"])
    metrics = samples[0]["metrics"]
    metric = next((name for name in _PREFERRED if name in metrics), next(iter(metrics)))
    logits, gold = None, np.zeros(len(samples), np.int64)
    if load_results(artifact)["output_types"][task] == "multiple_choice":
        n_choices = max(len(sample["choices"]) for sample in samples)
        logits = np.full((len(samples), n_choices), -np.inf)
        for row, sample in enumerate(samples):
            values = [value[0] for value in sample["filtered_resps"]][: len(sample["choices"])]
            logits[row, : len(values)] = values
            gold[row] = _gold(sample)
        if (gold < 0).any():
            logits = None
    return Answers(
        metric,
        chosen,
        [sample["doc_hash"] for sample in samples],
        np.array([_is_correct(sample["metrics"][metric]) for sample in samples], np.float64),
        logits,
        gold,
    )


def _gold(sample: dict[str, Any]) -> int:
    """Return the index of the right choice; -1: the sample does not tell it."""
    target = sample["target"]
    if isinstance(target, int):
        return target
    stripped = [str(choice).strip() for choice in sample["choices"]]
    return stripped.index(target.strip()) if str(target).strip() in stripped else -1


def _is_correct(value: Any) -> float:
    """Return whether an answer is right, of a metric's value or a pair of target and answer."""
    if isinstance(value, list):  # of F1 and Matthews correlation, which are of the whole set
        return float(value[0] == value[1])
    return float(value)


def _task(
    name: str, tuned: Artifact, base: Artifact, both: dict[str, Answers], resamples: int
) -> DownstreamTask:
    results = load_results(base)
    if both["tuned"].questions != both["base"].questions:
        raise ValueError(f"{name}: the two models answered different questions")
    form: Form = "likelihood"
    if results["output_types"][name] == "generate_until":
        form = "generation"
    difference = paired_difference(both["tuned"].correct, both["base"].correct, resamples)
    if difference is None:
        raise ValueError(f"{name}: no question was answered")
    logits = both["base"].logits
    chance = local_tasks.chance(name)
    if logits is not None:
        chance = float((1 / np.isfinite(logits).sum(1)).mean())
    version, task_hash = results["versions"].get(name), results["hashes"].get(name)
    return DownstreamTask(
        form=form,
        version=None if version is None else str(version),
        hash=task_hash,
        num_fewshot=int(results["n-shot"].get(name) or 0),
        chance=chance,
        tuned=_score(name, tuned, both["tuned"], chance),
        base=_score(name, base, both["base"], chance),
        difference=difference,
        mcnemar=mcnemar(both["tuned"].correct, both["base"].correct),
    )


def _score(name: str, artifact: Artifact, answers: Answers, chance: float | None) -> TaskScore:
    values = load_results(artifact)["results"][name]
    of_questions = accuracy(answers.correct)
    low, high = of_questions.ci95 or (0.0, 1.0)
    return TaskScore(
        accuracy=of_questions,
        metric=f"{answers.metric},{answers.filter}",
        value=_number(values.get(f"{answers.metric},{answers.filter}")),
        stderr=_number(values.get(f"{answers.metric}_stderr,{answers.filter}")),
        at_chance=None if chance is None else low <= chance <= high,
        calibration=None if answers.logits is None else calibration(answers.logits, answers.gold),
    )


def _number(value: Any) -> float | None:
    """Return a number of the harness, which writes `N/A` where it has none."""
    return float(value) if isinstance(value, int | float) else None
