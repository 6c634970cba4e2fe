"""A model as judge: what it is asked, its faults, its cost, and how far it is believed."""

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from scipy.optimize import minimize

from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import ModelState
from hyperfitting.preference.cli import main
from hyperfitting.preference.items import (
    JUDGMENTS_FILE,
    Annotator,
    Choice,
    Item,
    Shown,
    Task,
    read_task,
    write_task,
)
from hyperfitting.preference.judge import ask_judge
from hyperfitting.preference.judge_answers import MAX_ANSWERS, answer_file
from hyperfitting.preference.judge_bias import PRIOR_SD, fit_logistic
from hyperfitting.preference.judge_local import LocalJudge
from hyperfitting.preference.judge_prompt import messages, parse
from hyperfitting.preference.judge_report import JudgeReport, read_judge_file
from hyperfitting.preference.judge_server import Budget, ServerJudge, check_base_url, read_key
from hyperfitting.preference.judge_trust import report_on_judges
from hyperfitting.preference.judgments import (
    Answer,
    append,
    make_judgment,
    read_judgments,
)
from tests.awkward_study import awkward_task, make_item, make_task
from tests.openai_server import Fault, OpenAIServer, serving

KEY = "sk-secret-0123456789"
_TEXTS = re.compile(r"<continuation_(\w)>\n(.*?)\n</continuation", re.S)


def always_a(_: str) -> str:
    return '{"choice": "A"}'


def texts_in(prompt: str) -> dict[str, str]:
    return dict(_TEXTS.findall(prompt))


def longer(prompt: str) -> str:
    """Prefer the longer text, whatever it says."""
    lengths = {side: len(text) for side, text in texts_in(prompt).items()}
    return json.dumps({"choice": max(lengths, key=lambda side: lengths[side])})


def careful(prompt: str) -> str:
    """Prefer the text that says it is good; a tie if both or none do."""
    good = [side for side, text in texts_in(prompt).items() if "good" in text]
    return json.dumps({"choice": good[0] if len(good) == 1 else "equal"})


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with serving(always_a) as server:
        yield server


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Six items, of which the run's text is the longer one in five, and the good one in two."""
    items = [
        make_item(n, "good" * (n < 2) + "long" * (n + 1), "good" * (n > 3) + "other")
        for n in range(6)
    ]
    write_task(tmp_path, make_task(items))
    return tmp_path


def judge_of(study: Path, server: OpenAIServer, **fields: Any) -> ServerJudge:
    question = read_task(study).question
    options: dict[str, Any] = {"budget": Budget(), "concurrency": 1} | fields
    return ServerJudge("model", server.url, question, **options)


def command(study: Path, server: OpenAIServer, *more: str) -> list[str]:
    return ["judge", str(study), "--model", "model", "--base-url", server.url, *more]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return int(end.value.code or 0)


def report_of(study: Path, name: str = "model") -> JudgeReport:
    return report_on_judges(study).judges[name]


def test_a_judge_gets_every_item_in_both_orders_with_the_words_that_people_get(
    server: OpenAIServer, tmp_path: Path
) -> None:
    task = awkward_task(aspects=("coherence",))
    write_task(tmp_path, task)
    assert ask_judge(tmp_path, "model", judge_of(tmp_path, server))
    shown = Counter(
        (texts["A"], texts["B"]) for texts in map(texts_in, server.prompts())
    )  # fmt: skip
    pairs = [(item.first.text, item.second.text) for item in task.items]
    assert shown == Counter(pairs) + Counter((b, a) for a, b in pairs)
    for prompt in server.prompts():
        for words in (
            task.question.wording,
            task.question.guidelines,
            "I prefer A",
            "Equally good",
        ):
            assert words in prompt
        assert "Which makes more sense" in prompt
        assert not re.search(r"hidden|tuned|\breference|\bfirst\b|\bsecond\b", prompt)
    judgments = read_judgments(tmp_path / JUDGMENTS_FILE)
    assert {(j.item, j.left) for j in judgments} == {
        (item.id, left) for item in task.items for left in ("first", "second")
    }
    assert all(j.choice == j.left and j.source == "judge:model" for j in judgments)


def test_repeats_are_not_asked_again(server: OpenAIServer, tmp_path: Path) -> None:
    item = make_item(0, "one", "two")
    repeat = item.model_copy(update={"id": "", "kind": "repeat", "repeats": item.id})
    repeat = Item.model_validate(repeat.model_dump())
    write_task(tmp_path, make_task([item, repeat]))
    ask_judge(tmp_path, "model", judge_of(tmp_path, server))
    assert len(server.requests) == 2


FAULTS = {
    "too many requests": Fault(429, {"Retry-After": "1"}, b'{"error": {"message": "wait"}}'),
    "an internal error": Fault(500, body=b"oops"),
    "a dropped connection": Fault(send_bytes=-1),
    "a truncated answer": Fault(send_bytes=20),
    "invalid JSON": Fault(body=b'{"choices": [{'),
    "no chat completion": Fault(body=b'{"choices": []}'),
    "a slow answer": Fault(seconds=1.5),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault_a_question_is_asked_again(
    server: OpenAIServer, tmp_path: Path, fault: str
) -> None:
    write_task(tmp_path, make_task([make_item(0, "one", "two")]))
    server.faults.append(FAULTS[fault])
    assert ask_judge(tmp_path, "model", judge_of(tmp_path, server, timeout=1.0))
    assert len(server.requests) == 3
    assert server.requests[0] == server.requests[1]
    assert len(read_judgments(tmp_path / JUDGMENTS_FILE)) == 2
    if "Retry-After" in FAULTS[fault].headers:
        assert server.times[1] - server.times[0] >= 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(401, body=b'{"error": {"message": "bad key %s"}}' % KEY.encode()), "--key-env"),
        (Fault(404, body=b'{"error": {"message": "no such model"}}'), "no such model"),
        (Fault(400, body=b'{"error": {"message": "too long"}}'), "too long"),
    ],
)
def test_what_no_repetition_helps_ends_with_a_message_and_keeps_the_answers(
    server: OpenAIServer, study: Path, fault: Fault, message: str
) -> None:
    server.faults.extend([Fault(), Fault(), fault])
    with pytest.raises(UserError, match=message) as error:
        ask_judge(study, "model", judge_of(study, server, key=KEY))
    assert KEY not in str(error.value)
    assert len(server.requests) == 3
    assert len(read_judgments(study / JUDGMENTS_FILE)) == 2


def test_an_invalid_answer_is_asked_for_once_more_and_then_never_again(
    server: OpenAIServer, study: Path
) -> None:
    server.reply = lambda _: "I like both."
    assert ask_judge(study, "model", judge_of(study, server))
    assert len(server.requests) == 12 * MAX_ANSWERS
    again = server.requests[-1]["messages"]
    assert [m["role"] for m in again] == ["user", "assistant", "user"]
    assert "I like both." in again[1]["content"]
    assert "no JSON object" in again[2]["content"]
    assert not (study / JUDGMENTS_FILE).exists()
    assert ask_judge(study, "model", judge_of(study, server))
    assert len(server.requests) == 12 * MAX_ANSWERS
    report = report_of(study)
    assert report.usage is not None
    assert (report.usage.questions, report.usage.invalid, report.usage.requests) == (12, 12, 24)
    assert not report.believed
    assert report.reasons == ["no item was answered in both orders"]


def test_a_corrected_answer_counts(server: OpenAIServer, study: Path) -> None:
    server.reply = lambda prompt: always_a("") if "no valid answer" in prompt else "hm"
    assert ask_judge(study, "model", judge_of(study, server))
    assert len(read_judgments(study / JUDGMENTS_FILE)) == 12


def test_an_answer_that_was_cut_says_so(server: OpenAIServer, study: Path) -> None:
    server.reply = lambda _: '{"choice": "'
    server.faults.extend([Fault(finish_reason="length")] * 24)
    ask_judge(study, "model", judge_of(study, server, max_tokens=7))
    assert "cut at 7 tokens" in server.requests[-1]["messages"][-1]["content"]


def test_nothing_is_asked_twice(server: OpenAIServer, study: Path) -> None:
    for _ in range(2):
        assert ask_judge(study, "model", judge_of(study, server))
    assert len(server.requests) == 12
    assert len(read_judgments(study / JUDGMENTS_FILE)) == 12


def test_a_killed_judge_resumes_with_what_it_was_not_answered(
    server: OpenAIServer, study: Path
) -> None:
    server.delay = 0.3
    arguments = [sys.executable, "-m", "hyperfitting.preference.cli"]
    process = subprocess.Popen([*arguments, *command(study, server, "--concurrency", "1")])
    while len(server.requests) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    file = study / "judges/model.jsonl"
    n_kept = len(file.read_text("utf-8").splitlines())
    assert n_kept >= 3
    with file.open("a") as out:
        out.write('{"key": "cut by the cra')
    server.delay, before = 0, len(server.requests)
    assert ask_judge(study, "model", judge_of(study, server))
    assert len(server.requests) - before == 12 - n_kept
    assert len(read_judgments(study / JUDGMENTS_FILE)) == 12


def test_judgments_that_a_crash_lost_are_added_from_the_answers(
    server: OpenAIServer, study: Path
) -> None:
    ask_judge(study, "model", judge_of(study, server))
    judgments = read_judgments(study / JUDGMENTS_FILE)
    (study / JUDGMENTS_FILE).unlink()
    ask_judge(study, "model", judge_of(study, server))
    assert read_judgments(study / JUDGMENTS_FILE) == judgments
    assert len(server.requests) == 12


def test_nothing_is_asked_that_might_exceed_the_budget(server: OpenAIServer, study: Path) -> None:
    def judge(max_cost: float) -> ServerJudge:
        # an answer costs 100 * 1 + 10 * 10 = 200 millionths
        budget = Budget(price_in=1, price_out=10, max_cost=max_cost)
        return judge_of(study, server, budget=budget, max_tokens=20, concurrency=3)

    first = judge(3e-3)
    assert not ask_judge(study, "model", first)
    n_asked = len(server.requests)
    assert 0 < n_asked < 12
    assert first.budget.spent == pytest.approx(n_asked * 200e-6)
    assert first.budget.spent <= 3e-3
    second = judge(1.0)
    assert ask_judge(study, "model", second)
    assert len(server.requests) == 12
    assert second.budget.spent == pytest.approx(12 * 200e-6)


def test_without_the_servers_count_tokens_are_not_underestimated(
    server: OpenAIServer, study: Path
) -> None:
    server.usage = None
    ask_judge(study, "model", judge_of(study, server))
    with answer_file(study, "model") as answers:
        n_bytes = sum(len(prompt.encode()) for prompt in server.prompts())
        assert answers.usage.prompt_tokens >= n_bytes
        assert answers.usage.completion_tokens >= 12 * len(always_a(""))


@pytest.mark.parametrize("concurrency", [1, 3])
def test_requests_at_a_time_are_bounded(
    server: OpenAIServer, study: Path, concurrency: int
) -> None:
    server.delay = 0.05
    ask_judge(study, "model", judge_of(study, server, concurrency=concurrency))
    assert server.most_at_once == concurrency


def test_the_key_goes_to_the_server_and_nowhere_else(
    server: OpenAIServer, study: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("THE_KEY", KEY)
    server.reply = lambda _: f'{{"choice": "A"}} {KEY}'
    assert run(*command(study, server, "--key-env", "THE_KEY")) == 0
    assert set(server.keys) == {f"Bearer {KEY}"}
    out, err = capfd.readouterr()
    assert KEY not in out + err
    for path in study.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in repr(judge_of(study, server, key=KEY))


def test_openais_key_is_sent_to_openai_alone(
    server: OpenAIServer, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert run(*command(study, server)) == 0
    assert KEY not in "".join(server.keys)
    assert read_key("https://api.openai.com/v1", None) == KEY
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        read_key("https://api.openai.com/v1", None)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("localhost:8000", "no address"),
        ("ftp://host/v1", "no address"),
        ("http://", "no address"),
        ("http://[", "no address"),
        ("http://me:secret@host/v1", "password"),
    ],
)
def test_an_address_that_is_none_is_refused(url: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as error:
        check_base_url(url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--max-cost", "1"], "needs prices"),
        (["--price-in", "-1"], "is no amount"),
        (["--concurrency", "0"], "--concurrency"),
        (["--dtype", "bfloat16"], "is for --in-process"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    server: OpenAIServer, study: Path, capfd: pytest.CaptureFixture[str],
    more: list[str], problem: str,
) -> None:  # fmt: skip
    assert run(*command(study, server, *more)) == 1
    assert problem in capfd.readouterr().err
    assert server.requests == []


def test_one_name_is_one_judge(server: OpenAIServer, study: Path) -> None:
    ask_judge(study, "model", judge_of(study, server))
    with pytest.raises(UserError, match="--name"):
        ask_judge(study, "model", judge_of(study, server, temperature=1.0))
    assert len(server.requests) == 12
    ask_judge(study, "warm", judge_of(study, server, temperature=1.0))
    assert len(read_judgments(study / JUDGMENTS_FILE)) == 24


@pytest.mark.parametrize("name", ["a\nb", "x" * 300])
def test_a_name_that_no_file_can_have_is_refused(
    server: OpenAIServer, study: Path, name: str
) -> None:
    with pytest.raises(UserError, match="cannot be the name of a judge"):
        ask_judge(study, name, judge_of(study, server))
    assert server.requests == []


def test_two_processes_do_not_ask_one_judge(server: OpenAIServer, study: Path) -> None:
    with answer_file(study, "model"), pytest.raises(UserError, match="another process"):
        ask_judge(study, "model", judge_of(study, server))


QUESTION = make_task([make_item(0, "one", "two")], aspects=("fluency",)).question


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"choice": "A"}', "left"),
        ('{"choice": " b "}', "right"),
        ('Sure!\n```json\n{"reason": "{x}", "choice": "equal"}\n```', "equal"),
        ('<think>{"choice": hm}</think> {"choice": "B", "fluency": "A"}', "right"),
        ('{"choice": "A"} or, again, {"choice": "A"}', "left"),
        ('{"choice": "A"} no: {"choice": "B"}', "it holds several answers that differ"),
        (' "equal"\n', "equal"),
        ("A", "left"),
        ("A is better", "it holds no JSON object"),
        ('["A"]', "it holds no JSON object"),
        ('{"choice": 1}', 'the JSON object has no text "choice"'),
        ('{"choice": "both bad"}', "preference has no choice 'both bad'"),
        ('{"choice": "A", "fluency": "very"}', "fluency has no choice 'very'"),
        ("{" * 5000, "it holds no JSON object"),
    ],
)
def test_an_answer_is_one_json_object_with_a_valid_choice(text: str, shown: str) -> None:
    parsed = parse(QUESTION, text)
    assert (parsed.shown if isinstance(parsed, Answer) else parsed) == shown


def test_the_fine_form_has_both_bad() -> None:
    question = awkward_task(form="fine").question
    parsed = parse(question, '{"choice": "both bad"}')
    assert isinstance(parsed, Answer)
    assert parsed.shown == "both_bad"


def test_a_judge_that_always_takes_a_is_not_believed(server: OpenAIServer, study: Path) -> None:
    ask_judge(study, "model", judge_of(study, server))
    report = report_of(study)
    assert report.flip_rate is not None
    assert report.reversal_rate is not None
    assert report.left_rate is not None
    assert (report.flip_rate.mean, report.reversal_rate.mean, report.left_rate.mean) == (1, 1, 1)
    assert not report.believed
    assert "100% of 6 items" in report.reasons[0]
    (preference,) = report.preferences
    assert preference.win_rate.mean == 0.5
    assert preference.position_effect.mean > 2


def test_a_judge_by_length_is_believed_but_its_length_controlled_win_rate_is_even(
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
    assert report.believed
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


def test_a_local_judge_takes_the_most_likely_answer(base: BaseModel, tmp_path: Path) -> None:
    task = make_task([make_item(0, "one", "two")], form="fine", aspects=("fluency",))
    write_task(tmp_path, task)
    model, tokenizer = ModelState(base).load(torch.device("cpu")), base.tokenizer()
    judge = LocalJudge(base, model, tokenizer, task.question)
    assert ask_judge(tmp_path, "tiny", judge)
    judgments = read_judgments(tmp_path / JUDGMENTS_FILE)
    words = {"A": "left", "B": "right", "equal": "equal", "both bad": "both_bad"}
    for judgment in judgments:
        prompt = messages(task.question, task.items[0], judgment.left)[0]["content"] + "\n\n"
        scores = {}
        for word in words:
            start, end = f'{prompt}{{"choice": "', f'{word}"'
            ids = torch.tensor([tokenizer.encode(start + end)])
            n = len(tokenizer.encode(end))
            with torch.inference_mode():
                log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            picked = log_p[torch.arange(len(log_p)), ids[0, 1:]]
            scores[word] = float(picked[-n:].sum())
        assert judgment.shown == words[max(scores, key=lambda word: scores[word])]
        assert set(judgment.aspects) == {"fluency"}
    assert {j.left for j in judgments} == {"first", "second"}


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
