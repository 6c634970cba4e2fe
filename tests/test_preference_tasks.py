"""Tasks of a preference study: blind, balanced, reproducible; judgments that are never lost."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hyperfitting.errors import UserError
from hyperfitting.preference.design import gold_items
from hyperfitting.preference.items import (
    JUDGMENTS_FILE,
    TASK_FILE,
    Item,
    Task,
    content_hash,
    other,
    read_task,
    write_task,
)
from hyperfitting.preference.judgments import append, read_judgments, validate
from hyperfitting.preference.texts import ELLIPSIS, cut_alike, normalize, scramble
from tests.preference import LENGTH, always_left, careful, judge_all, study, study_record


@pytest.fixture(scope="module")
def task() -> Task:
    return study()


@settings(max_examples=15, deadline=None)
@given(
    runs=st.integers(1, 3),
    contexts=st.integers(4, 10),
    annotators=st.integers(1, 7),
    votes=st.integers(1, 3),
    repeats=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_items_are_balanced_and_nobody_meets_a_context_twice(
    runs: int, contexts: int, annotators: int, votes: int, repeats: int, seed: int
) -> None:
    records = {f"run_{i}": study_record(i, contexts) for i in range(runs)}
    names = [f"ann{i}" for i in range(annotators)]
    if votes > annotators:
        with pytest.raises(UserError, match="--votes"):
            study(names, records, votes=votes)
        return
    made = study(names, records, votes=votes, repeats=repeats, seed=seed)
    assert made == study(names, records, votes=votes, repeats=repeats, seed=seed)
    normal = [item for item in made.items if item.kind == "normal"]
    given_to = Counter(i for name in names for i in made.annotators[name].items)
    assert all(given_to[item.id] == votes for item in normal)
    for dataset in {item.dataset for item in normal}:
        by_run = Counter(i.first.origin.run for i in normal if i.dataset == dataset)
        assert max(by_run.values()) - min(by_run[run] for run in records) <= 1
    for name in names:
        own = made.items_of(name)
        keys = [item.key for item in own if item.kind != "repeat"]
        assert len(keys) == len(set(keys))
        ids = [item.id for item in own]
        assert all(ids.index(i.repeats) < ids.index(i.id) for i in own if i.repeats)
        assert sum(item.kind == "attention_check" for item in own) == 2
    loads = [len(made.annotators[name].items) for name in names]
    assert max(loads) - min(loads) <= runs + repeats


def test_runs_without_two_different_texts_are_refused() -> None:
    record = study_record(1)
    same = [s.model_copy(update={"tuned": s.tuned, "reference": s.tuned}) for s in record.samples]
    with pytest.raises(UserError, match="no two texts can be compared"):
        study(records={"run": record.model_copy(update={"samples": same})})


def test_sides_are_a_balanced_hash_and_swap_in_a_repeat(task: Task) -> None:
    item = task.items[0]
    lefts = Counter(task.left(f"annotator{i}", item) for i in range(2000))
    assert abs(lefts["first"] - 1000) < 5 * (2000 * 0.25) ** 0.5
    repeats = [item for item in task.items if item.kind == "repeat"]
    assert repeats
    for repeat in repeats:
        original = task.item(repeat.repeats or "")
        assert original is not None
        assert task.left("ann", repeat) != task.left("ann", original)


def test_what_is_shown_holds_nothing_but_the_texts(task: Task) -> None:
    for item in task.items:
        shown = item.shown("first"), item.shown("second")
        assert shown[0]["left"] == shown[1]["right"] == item.first.text
        assert set(shown[0]) == {"context", "left", "right"}
        assert all(run not in str(shown) for run in ("tuned", "base", "reference"))


def test_a_task_that_was_changed_is_refused(tmp_path: Path, task: Task) -> None:
    write_task(tmp_path, task)
    assert read_task(tmp_path).content_hash == task.content_hash
    with pytest.raises(UserError, match="has a task already"):
        write_task(tmp_path, task)
    path = tmp_path / TASK_FILE
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"seed": 5}))
    with pytest.raises(UserError, match="its hash is another"):
        read_task(tmp_path)
    values["items"][0]["context"] += "!"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="is not what it was"):
        read_task(tmp_path)


def test_attention_checks_scramble_a_reference(task: Task) -> None:
    checks = [item for item in task.items if item.kind == "attention_check"]
    for check in checks:
        real, scrambled = (t.text.removesuffix(ELLIPSIS) for t in (check.first, check.second))
        assert check.expected == "first"
        assert real != scrambled
        assert sorted(real.split()) == sorted(scrambled.split())
    assert len(checks) == 2


def test_gold_items_are_those_that_all_people_agreed_on(tmp_path: Path, task: Task) -> None:
    write_task(tmp_path, task)
    rules = {"ann": careful, "bob": careful, "cem": always_left}
    append(tmp_path / JUDGMENTS_FILE, judge_all(task, rules))
    gold = gold_items(tmp_path)
    agreed = {
        item.key: careful(item, "first") == "left"
        for item in task.items
        if item.kind == "normal" and (careful(item, task.left("cem", item)) == "left")
    }
    assert {item.key: item.expected == "first" for item in gold} == agreed
    assert gold


@pytest.mark.parametrize(
    ("design", "field"),
    [
        ({"checks": 12}, "--checks"),
        ({"items": 999}, "--items"),
        ({"against": "tuned_1"}, "--against"),
        ({"lengths": (LENGTH + 1,)}, "--lengths"),
    ],
)
def test_a_design_that_the_runs_do_not_allow_names_its_option(
    design: dict[str, object], field: str
) -> None:
    with pytest.raises(UserError, match=field):
        study(**design)


def test_runs_are_compared_with_another_run_or_their_base() -> None:
    against_run = study(against="base_0")
    pairs = {(i.first.origin.run, i.second.origin.run) for i in normal_items(against_run)}
    assert pairs == {("tuned_0", "base_0")}
    sides = {
        (i.first.origin.side, i.second.origin.side) for i in normal_items(study(against="base"))
    }
    assert sides == {("tuned", "base")}


def normal_items(task: Task) -> list[Item]:
    return [item for item in task.items if item.kind == "normal"]


_TEXTS = st.text(st.sampled_from("ab.,é \n\t\u00a0\u200b\ufffd\x1b@-"), max_size=60)


@settings(max_examples=80, deadline=None)
@given(_TEXTS)
@example("@ @.@\t@")
def test_normalized_texts_have_no_traces_of_tokenizers(text: str) -> None:
    shown = normalize(text)
    assert normalize(shown) == shown
    assert not set(shown) & set("\t\u00a0\u200b\ufffd\x1b")
    assert "  " not in shown
    assert "\n\n\n" not in shown
    assert sum(c.isalpha() for c in shown) == sum(c.isalpha() for c in text)


_WORDS = st.lists(st.sampled_from(["a", "bc", "def\n"]), min_size=2, max_size=30)


@settings(max_examples=60, deadline=None)
@given(_WORDS, _WORDS)
def test_both_texts_are_cut_to_one_length_at_a_word(first: list[str], second: list[str]) -> None:
    wholes = [normalize(" ".join(words)) for words in (first, second)]
    complete = [whole[: len(whole) - len(whole.split()[-1])].rstrip() for whole in wholes]
    limit = min(map(len, complete))  # the last word may be incomplete
    for text, whole in zip(cut_alike(*wholes, (False, False)), wholes, strict=True):
        kept = text.removesuffix("…").rstrip()
        n = len(kept.split())
        assert text.endswith("…")
        assert whole.startswith(kept)
        assert whole.split()[:n] == kept.split()
        assert len(kept) <= limit < len(kept) + 1 + len(whole.split()[n])  # no word more fits


def test_a_text_that_ended_by_itself_stays_whole() -> None:
    ended, cut = cut_alike("It ends.", "this one goes on and", (True, False))
    assert (ended, cut) == ("It ends.", "this one goes on …")
    assert cut_alike("", "a b", (True, False)) == ("", "a …")
    assert cut_alike("It ends.", "So does it.", (True, True)) == ("It ends.", "So does it.")


def test_what_has_no_spaces_is_cut_between_characters() -> None:
    assert cut_alike("一" * 60, "a" * 50, (False, False)) == ("一" * 50 + " …", "a" * 50 + " …")


def test_wikitext_and_spaces_before_punctuation_are_joined() -> None:
    assert normalize("1 @,@ 000 well @-@ known , he said .") == "1,000 well-known, he said."


def test_scrambling_is_reproducible() -> None:
    assert scramble("a b c d …", 0) == scramble("a b c d …", 0)
    assert sorted(scramble("a b c d …", 0)) == sorted("a b c d …")


def test_judgments_survive_a_line_that_a_crash_cut_short(tmp_path: Path, task: Task) -> None:
    path, judgments = tmp_path / JUDGMENTS_FILE, judge_all(task, {"ann": careful})
    append(path, judgments[:3])
    with path.open("a") as file:
        file.write(judgments[3].model_dump_json()[:40])
    assert read_judgments(path) == judgments[:3]
    append(path, judgments[3:])
    assert read_judgments(path) == judgments


def test_an_invalid_line_is_reported_by_its_number(tmp_path: Path, task: Task) -> None:
    path, judgments = tmp_path / JUDGMENTS_FILE, judge_all(task, {"ann": careful})
    wrong = judgments[1].model_dump(mode="json")
    wrong["choice"] = "second" if wrong["choice"] == "first" else "first"
    lines = [judgments[0].model_dump_json(), json.dumps(wrong), judgments[2].model_dump_json()]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="line 2 is no judgment: choice"):
        read_judgments(path)


def test_concurrent_writers_lose_nothing(tmp_path: Path, task: Task) -> None:
    path = tmp_path / JUDGMENTS_FILE
    judgments = judge_all(task, dict.fromkeys(task.annotators, careful))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda judgment: append(path, [judgment]), judgments[:24]))
    assert {j.key for j in read_judgments(path)} == {j.key for j in judgments[:24]}


def test_what_does_not_belong_to_the_task_is_rejected_with_the_reason(task: Task) -> None:
    judgments = judge_all(task, {"ann": careful, "bob": careful})
    first, mine = judgments[0], task.annotators["ann"].items
    not_mine = next(j for j in judgments if j.annotator == "bob" and j.item not in mine)
    bad = {
        "of another task": first.model_copy(update={"task": content_hash("x")}),
        "has no item": first.model_copy(update={"item": "0" * 16}),
        "has no annotator": first.model_copy(update={"annotator": "eve"}),
        "sides swapped": first.model_copy(update={"left": other(first.left)}),
        "no choice both_bad": first.model_copy(update={"shown": "both_bad"}),
        "no aspect fluency": first.model_copy(update={"aspects": {"fluency": "first"}}),
        "is not for ann": not_mine.model_copy(update={"annotator": "ann"}),
    }
    accepted, rejected = validate(task, [*judgments, judgments[0], *bad.values()])
    assert accepted == judgments
    reasons = [r.reason for r in rejected]
    assert "has judged item" in reasons[0]
    for expected, reason in zip(bad, reasons[1:], strict=True):
        assert expected in reason
    assert [r.index for r in rejected] == list(range(len(judgments), len(judgments) + 1 + len(bad)))
    assert all(a.created <= b.created for a, b in pairwise(accepted))
