"""From the answers of base and tuned model to the record's `downstream`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

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

Floats = NDArray[np.float64]
_PREFERRED = ("acc", "exact_match")
"""Metrics that are an accuracy, in order."""


@dataclass(frozen=True)
class Answers:
    """One model's answers to a task, (N,) questions."""

    form: Form
    metric: str
    """The harness's metric, with its filter: `acc,none`."""
    value: float | None
    """Its value as the harness reports it."""
    stderr: float | None
    """Its standard error as the harness reports it."""
    questions: list[str]
    """Hash of each question."""
    correct: Floats
    """0 or 1."""
    logits: Floats | None
    """(N, C) log-likelihoods of the choices, padded with -inf; none: no multiple choice."""
    gold: NDArray[np.int64]
    """Index of the right choice."""


def build_downstream(artifacts: DownstreamArtifacts, resamples: int) -> Downstream | None:
    """Return what the record holds of the tasks; none: there are none.

    Args:
        artifacts: all answers; built.
        resamples: bootstrap resamples of the questions.
    """
    answers: dict[str, dict[str, Answers]] = {}
    tasks: dict[str, DownstreamTask] = {}
    by_name: dict[str, dict[str, dict[str, Estimate]]] = {}
    version = ""
    for requested, step in artifacts.base.items():
        sides = {"tuned": artifacts.tuned[requested].artifact, "base": step.artifact}
        results = {side: load_results(artifact) for side, artifact in sides.items()}
        version = results["base"]["harness"]
        for name in results["base"]["output_types"]:
            answers[name] = {
                side: read_answers(load_samples(artifact, name), results[side], name)
                for side, artifact in sides.items()
            }
            tasks[name] = _task(name, results["base"], answers[name], resamples)
        parts = [answers[name] for name in results["base"]["output_types"]]
        by_name[requested] = _by_side(parts, resamples)
    if not tasks:
        return None
    return Downstream(
        harness=version,
        tasks=tasks,
        estimates=_by_side(answers.values(), resamples),
        by_name=by_name,
    )


def _by_side(
    tasks: Collection[dict[str, Answers]], resamples: int
) -> dict[str, dict[str, Estimate]]:
    """Return the metrics `down/…` over the questions of some tasks, by `tuned` and `base`.

    The tuned model's include what it gains over the base model, paired by question.
    """
    values = {side: _values(answers[side] for answers in tasks) for side in ("tuned", "base")}
    for form in get_args(Form):
        if (key := f"down/{form}") in values["base"]:
            gain = values["tuned"][key] - values["base"][key]
            values["tuned"][f"{key}_gain"] = gain
    return {side: _estimates(of_side, resamples) for side, of_side in values.items()}


def _values(tasks: Iterable[Answers]) -> dict[str, Floats]:
    """Return one model's value of each metric `down/…` for every question of some tasks."""
    values: dict[str, list[Floats]] = {}
    for answers in tasks:
        values.setdefault(f"down/{answers.form}", []).append(answers.correct)
        if answers.logits is not None:
            scores = brier_scores(softmax(answers.logits, axis=1), answers.gold)
            values.setdefault("down/brier", []).append(scores)
    return {key: np.concatenate(parts) for key, parts in values.items()}


def _estimates(values: dict[str, Floats], resamples: int) -> dict[str, Estimate]:
    estimates = {key: bootstrap_mean(of_key, resamples) for key, of_key in values.items()}
    return {key: value for key, value in estimates.items() if value is not None}


def read_answers(samples: Sequence[dict[str, Any]], results: dict[str, Any], task: str) -> Answers:
    """Return a model's answers to a task.

    Of a task with several filters the first counts; of several metrics the accuracy.

    Args:
        samples: one for each question and filter.
        results: of the harness.
        task: its name.
    """
    chosen = samples[0]["filter"]
    samples = sorted((s for s in samples if s["filter"] == chosen), key=lambda s: s["doc_id"])
    metrics = samples[0]["metrics"]
    metric = next((name for name in _PREFERRED if name in metrics), next(iter(metrics)))
    output_type, values = results["output_types"][task], results["results"][task]
    gold = np.array([_gold(sample) for sample in samples], np.int64)
    has_logits = output_type == "multiple_choice" and (gold >= 0).all()
    return Answers(
        "generation" if output_type == "generate_until" else "likelihood",
        f"{metric},{chosen}",
        _number(values.get(f"{metric},{chosen}")),
        _number(values.get(f"{metric}_stderr,{chosen}")),
        [sample["doc_hash"] for sample in samples],
        np.array([_is_correct(sample["metrics"][metric]) for sample in samples], np.float64),
        _logits(samples) if has_logits else None,
        gold,
    )


def _logits(samples: Sequence[dict[str, Any]]) -> Floats:
    """Return the log-likelihoods of the choices, (N, C), padded with -inf."""
    n_choices = max(len(sample["choices"]) for sample in samples)
    logits = np.full((len(samples), n_choices), -np.inf)
    for row, sample in enumerate(samples):
        values = [value[0] for value in sample["filtered_resps"]][: len(sample["choices"])]
        logits[row, : len(values)] = values
    return logits


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
    name: str, results: dict[str, Any], answers: dict[str, Answers], resamples: int
) -> DownstreamTask:
    """Return both models' scores on a task; ``results``: the base model's, of the harness."""
    tuned, base = answers["tuned"], answers["base"]
    if tuned.questions != base.questions:
        raise ValueError(f"{name}: the two models answered different questions")
    difference = paired_difference(tuned.correct, base.correct, resamples)
    if difference is None:
        raise ValueError(f"{name}: no question was answered")
    chance = local_tasks.chance(name)
    if base.logits is not None:
        chance = float((1 / np.isfinite(base.logits).sum(1)).mean())
    version = results["versions"].get(name)
    return DownstreamTask(
        form=base.form,
        version=None if version is None else str(version),
        hash=results["hashes"].get(name),
        num_fewshot=int(results["n-shot"].get(name) or 0),
        chance=chance,
        tuned=_score(tuned, chance),
        base=_score(base, chance),
        difference=difference,
        mcnemar=mcnemar(tuned.correct, base.correct),
    )


def _score(answers: Answers, chance: float | None) -> TaskScore:
    of_questions = accuracy(answers.correct)
    low, high = of_questions.ci95 or (0.0, 1.0)
    return TaskScore(
        accuracy=of_questions,
        metric=answers.metric,
        value=answers.value,
        stderr=answers.stderr,
        at_chance=None if chance is None else low <= chance <= high,
        calibration=None if answers.logits is None else calibration(answers.logits, answers.gold),
    )


def _number(value: Any) -> float | None:
    """Return a number of the harness, which writes `N/A` where it has none."""
    return float(value) if isinstance(value, int | float) else None
