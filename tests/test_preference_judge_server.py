"""A judge behind an OpenAI-compatible server: faults, budget, keys and addresses."""

from pathlib import Path

import pytest

from hyperfitting.errors import UserError
from hyperfitting.preference.items import JUDGMENTS_FILE, write_task
from hyperfitting.preference.judge import ask_judge
from hyperfitting.preference.judge_answers import answer_file
from hyperfitting.preference.judge_server import Budget, ServerJudge, check_base_url, read_key
from hyperfitting.preference.judgments import read_judgments
from tests.awkward_study import make_item, make_task
from tests.judge_study import KEY, always_a, command, judge_of, run, server, study
from tests.openai_server import Fault, OpenAIServer

__all__ = ["server", "study"]


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
