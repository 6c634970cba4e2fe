"""A model as judge: what it is asked, how its answers are read, and what is asked again."""

import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import ModelState
from hyperfitting.preference.items import JUDGMENTS_FILE, Item, write_task
from hyperfitting.preference.judge import ask_judge
from hyperfitting.preference.judge_answers import MAX_ANSWERS, answer_file
from hyperfitting.preference.judge_local import LocalJudge
from hyperfitting.preference.judge_prompt import messages, parse
from hyperfitting.preference.judgments import Answer, read_judgments
from tests.awkward_study import awkward_task, make_item, make_task
from tests.judge_study import always_a, command, judge_of, report_of, server, study, texts_in
from tests.openai_server import Fault, OpenAIServer

__all__ = ["server", "study"]


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
    assert not report.reliable
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
