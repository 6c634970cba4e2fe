"""Downstream tasks: statistics of the answers, and the questions of the local tasks."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.proportion import proportion_confint

from hyperfitting.errors import UserError
from hyperfitting.evaluation.downstream import local_tasks
from hyperfitting.metrics.accuracy import accuracy, mcnemar
from hyperfitting.metrics.calibration import (
    BINS,
    brier_scores,
    calibration,
    expected_calibration_error,
    fit_temperature,
)
from tests.conftest import Compose
from tests.downstream import DOCUMENTS, question_rows


def test_the_accuracy_has_the_exact_binomial_interval() -> None:
    estimate = accuracy([1] * 13 + [0] * 37)
    assert estimate.mean == 13 / 50
    assert estimate.ci95 == pytest.approx(proportion_confint(13, 50, method="beta"))


@pytest.mark.parametrize(("only_tuned", "only_base"), [(0, 0), (3, 9), (20, 1)])
def test_mcnemar_is_that_of_statsmodels(only_tuned: int, only_base: int) -> None:
    tuned = [1] * (5 + only_tuned) + [0] * (only_base + 4)
    base = [1] * 5 + [0] * only_tuned + [1] * only_base + [0] * 4
    test = mcnemar(tuned, base)
    assert (test.only_tuned, test.only_base) == (only_tuned, only_base)
    table = [[5, only_tuned], [only_base, 4]]
    assert test.p == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue)


def test_calibration_is_that_of_a_loop_over_the_questions() -> None:
    rng = np.random.default_rng(0)
    logits, gold = rng.normal(0, 2, (60, 4)), rng.integers(0, 4, 60)
    p = softmax(logits, axis=1)
    bins: dict[int, list[tuple[float, bool]]] = {}
    brier = 0.0
    for row, right in zip(p.tolist(), gold.tolist(), strict=True):
        confidence = max(row)
        number = next(b for b in range(BINS) if confidence <= (b + 1) / BINS)
        bins.setdefault(number, []).append((confidence, row.index(confidence) == right))
        brier += sum((value - (i == right)) ** 2 for i, value in enumerate(row))
    ece = sum(
        len(b) / 60 * abs(sum(c for c, _ in b) / len(b) - sum(r for _, r in b) / len(b))
        for b in bins.values()
    )
    assert expected_calibration_error(p, gold) == pytest.approx(ece)
    assert brier_scores(p, gold).mean() == pytest.approx(brier / 60)


def test_the_temperature_of_overconfident_answers_is_found_and_helps_the_other_half() -> None:
    rng = np.random.default_rng(1)
    honest = rng.normal(0, 1, (2000, 4))
    gold = np.array([rng.choice(4, p=row) for row in softmax(honest, axis=1)])
    logits = 5 * honest
    scores = calibration(logits, gold)
    temperatures = np.linspace(2, 10, 801)
    losses = [
        -log_softmax(logits[::2] / t, axis=1)[np.arange(1000), gold[::2]].mean()
        for t in temperatures
    ]
    assert scores.temperature == pytest.approx(temperatures[np.argmin(losses)], abs=0.02)
    assert scores.ece_held_out is not None
    assert scores.ece_scaled is not None
    assert scores.ece_scaled < 0.05
    assert scores.ece_held_out > 0.2
    assert fit_temperature(honest, gold) == pytest.approx(1, abs=0.1)


def test_padding_of_fewer_choices_changes_nothing() -> None:
    logits, gold = np.array([[0.0, 1.0], [2.0, 0.5]] * 3), np.array([1, 0, 0, 1, 1, 0])
    padded = np.pad(logits, ((0, 0), (0, 2)), constant_values=-np.inf)
    assert calibration(padded, gold) == calibration(logits, gold)


@pytest.mark.parametrize("kind", ["last_word", "cloze", "sentence_order"])
def test_the_right_answer_continues_the_document(kind: str) -> None:
    rows = question_rows(f"local_{kind}_news")
    assert len(rows) == len(DOCUMENTS)
    for row in rows:
        answer = row["choices"][row["gold"]] if row["choices"] else f" {row['answer']}"
        continued = [row["context"] + choice in document for document in DOCUMENTS
                     for choice in [answer]]  # fmt: skip
        assert any(continued)
        wrong = [choice for choice in row["choices"] if choice != answer]
        assert not any(row["context"] + choice in d for d in DOCUMENTS for choice in wrong)
        if row["choices"]:
            assert f"\n{row['answer']}.{answer}\n" in row["prompt"]


def test_sums_are_right_and_verbs_agree() -> None:
    for row in question_rows("local_arithmetic"):
        a, sign, b = row["context"].splitlines()[-1].removesuffix(" =").split()
        result = int(a) + int(b) * (1 if sign == "+" else -1)
        assert row["choices"][row["gold"]] == f" {result}"
        assert row["answer"] == str(result)
        assert len(set(row["choices"])) == 4
    rows = question_rows("local_agreement")
    for row in rows:
        subject = row["context"].split()[1]
        verb = "are" if subject.endswith("s") else "is"
        assert row["choices"][row["gold"]].split()[0] == row["answer"] == verb
    assert len(rows) == local_tasks.MAX_QUESTIONS


def test_questions_depend_on_the_documents_only() -> None:
    for name in local_tasks.names():
        task = local_tasks.parse(name)
        assert local_tasks.make_questions(task, DOCUMENTS) == local_tasks.make_questions(
            task, DOCUMENTS[::-1]
        )


def test_options_without_tasks_are_refused(compose: Compose) -> None:
    with pytest.raises(UserError, match="changes nothing without tasks"):
        compose("preset=debug", "evaluation.downstream_limit=5")
