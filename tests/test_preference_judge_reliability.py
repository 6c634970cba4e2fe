"""How reliable a model is as judge: order, length, and agreement with people."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.optimize import minimize

from hyperfitting.preference.items import (
    JUDGMENTS_FILE,
    Annotator,
    Choice,
    Item,
    Shown,
    Task,
    write_task,
)
from hyperfitting.preference.judge import ask_judge
from hyperfitting.preference.judge_bias import PRIOR_SD, fit_logistic
from hyperfitting.preference.judge_reliability import report_on_judges
from hyperfitting.preference.judge_report import read_judge_file
from hyperfitting.preference.judgments import Answer, append, make_judgment
from tests.awkward_study import make_item, make_task
from tests.judge_study import (
    always_a,
    careful,
    command,
    judge_of,
    longer,
    report_of,
    run,
    server,
    study,
)
from tests.openai_server import OpenAIServer

__all__ = ["server", "study"]


def test_a_judge_that_always_takes_a_is_not_reliable(server: OpenAIServer, study: Path) -> None:
    ask_judge(study, "model", judge_of(study, server))
    report = report_of(study)
    assert report.flip_rate is not None
    assert report.reversal_rate is not None
    assert report.left_rate is not None
    assert (report.flip_rate.mean, report.reversal_rate.mean, report.left_rate.mean) == (1, 1, 1)
    assert not report.reliable
    assert "100% of 6 items" in report.reasons[0]
    (preference,) = report.preferences
    assert preference.win_rate.mean == 0.5
    assert preference.position_effect.mean > 2


def test_a_judge_by_length_is_reliable_but_its_length_controlled_win_rate_is_even(
    server: OpenAIServer, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, (60, 2))
    lengths[:, 0] += 12  # the run's are longer
    items = [make_item(n, "x" * a, "y" * b) for n, (a, b) in enumerate(lengths.tolist()) if a != b]
    write_task(tmp_path, make_task(items))
    server.reply = longer
    ask_judge(tmp_path, "model", judge_of(tmp_path, server, concurrency=4))
    report = report_of(tmp_path)
    assert report.reliable
    assert report.flip_rate is not None
    assert report.longer_rate is not None
    assert (report.flip_rate.mean, report.longer_rate.mean) == (0, 1)
    (preference,) = report.preferences
    expected = np.mean([len(i.first.text) > len(i.second.text) for i in items])
    assert preference.win_rate.mean == pytest.approx(expected)
    assert preference.win_rate.mean > 0.6
    assert preference.length_controlled.ci95 is not None
    low, high = preference.length_controlled.ci95
    assert low < 0.5 < high
    assert preference.length_effect.mean > 2


def add_people(study: Path, task: Task, rules: dict[str, Callable[[Item], Choice]]) -> None:
    def shown(name: str, item: Item, choice: Choice) -> Shown:
        if choice in ("equal", "both_bad"):
            return choice
        return "left" if choice == task.left(name, item) else "right"

    append(
        study / JUDGMENTS_FILE,
        [
            make_judgment(task, item, name, Answer(shown(name, item, rule(item))), "page")
            for name, rule in rules.items()
            for item in task.items
        ],
    )


def test_agreement_is_with_the_majority_of_people_and_with_other_judges(
    server: OpenAIServer, tmp_path: Path
) -> None:
    items = [make_item(n, "good one" if n % 2 else "one", "good two") for n in range(6)]
    task = make_task(items, ("alice", "bob", "carol"))
    write_task(tmp_path, task)
    # people: even items second twice; item 1 tied three ways; items 3 and 5 first twice

    def even(item: Item) -> bool:
        return item.first.text == "one"

    add_people(
        tmp_path, task,
        {
            "alice": lambda item: "second" if even(item) else "first",
            "bob": lambda i: "second" if even(i) else "equal" if i == items[1] else "first",
            "carol": lambda item: "second" if item == items[1] else "equal",
        },
    )  # fmt: skip
    server.reply = careful  # second on even items, ties on odd ones
    ask_judge(tmp_path, "careful", judge_of(tmp_path, server))
    server.reply = always_a  # all ties as verdicts
    ask_judge(tmp_path, "left", judge_of(tmp_path, server))
    report = report_of(tmp_path, "careful")
    assert report.compared_with == "scripts"
    assert report.with_people is not None
    assert (report.with_people.share.mean, report.with_people.share.n) == (3 / 5, 5)
    # 5 items, 10 values: second 6, first 2, equal 2; 2 items disagree
    expected_disagreement = 1 - (6 * 5 + 2 * 1 + 2 * 1) / (10 * 9)
    assert report.with_people.alpha is not None
    assert report.with_people.alpha.mean == pytest.approx(1 - (2 / 5) / expected_disagreement)
    assert report.with_judges["left"].share.mean == 1 / 2
    assert report.people is not None
    assert read_judge_file(tmp_path) == report_on_judges(tmp_path)


def test_people_count_before_scripts(server: OpenAIServer, study: Path) -> None:
    items = [make_item(n, "one", "good two") for n in range(4)]
    task = make_task(items)
    ids = task.annotators["bob"].items
    task = task.model_copy(
        update={"annotators": task.annotators | {"bob": Annotator(kind="person", items=ids)}}
    )
    (study / "task.json").unlink()
    write_task(study, task)
    add_people(study, task, {"alice": lambda _: "first", "bob": lambda _: "second"})
    server.reply = careful
    ask_judge(study, "model", judge_of(study, server))
    report = report_of(study)
    assert report.compared_with == "people"
    assert report.with_people is not None
    assert report.with_people.share.mean == 1


def test_checks_are_verdicts_too_and_no_part_of_the_rest(
    server: OpenAIServer, tmp_path: Path
) -> None:
    checks = [
        make_item(n, "good", "scrambled", kind="attention_check", expected=expected)
        for n, expected in enumerate(("first", "second"))
    ]
    write_task(tmp_path, make_task([*checks, make_item(9, "good", "other")]))
    server.reply = careful
    ask_judge(tmp_path, "model", judge_of(tmp_path, server))
    report = report_of(tmp_path)
    assert report.checks_passed is not None
    assert report.checks_passed.mean == 0.5
    assert report.items == 1


def random_wins(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = np.column_stack([np.ones(n), rng.normal(size=n), rng.choice([-0.5, 0.5], n)])
    p = 1 / (1 + np.exp(-x @ [0.5, 1.0, -0.8]))
    return x, rng.binomial(2, p) / 2


def test_the_logistic_regression_is_statsmodels() -> None:
    x, y = random_wins(200, 0)
    weights = np.random.default_rng(1).integers(0, 4, (3, 200)).astype(float)
    ours = fit_logistic(x, y, weights, [1e6] * 3)
    for row, coefficients in zip(weights, ours, strict=True):
        model = sm.GLM(y, x, family=sm.families.Binomial(), freq_weights=row)
        np.testing.assert_allclose(coefficients, model.fit().params, rtol=1e-6)


def test_the_prior_keeps_a_separable_regression_at_its_mode() -> None:
    x, _ = random_wins(50, 2)
    y = (x[:, 1] > 0).astype(float)

    def objective(b: np.ndarray) -> float:
        log_odds = x @ b
        loss = np.logaddexp(0, log_odds) - y * log_odds
        return float(loss.sum() + 0.5 * (b**2 / np.array(PRIOR_SD) ** 2).sum())

    expected = minimize(objective, np.zeros(3), tol=1e-12).x
    (ours,) = fit_logistic(x, y, np.ones((1, 50)), PRIOR_SD)
    np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_the_command_line_reports_and_exits_without_an_error(
    server: OpenAIServer, study: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prices = ["--price-in", "1", "--price-out", "10", "--max-cost", "1"]
    assert run(*command(study, server, *prices)) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "flips      1.00" in out
    assert "no ranking its answer depends on the order" in out
    assert "cost       0.0024" in out
    assert "wins" not in out
