"""Studies of human preference for tests: records, tasks, and annotators with known rules."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.preference.design import Design, make_task
from hyperfitting.preference.items import Item, Place, Question, Shown, Task, other
from hyperfitting.preference.judgments import Answer, Judgment, make_judgment
from hyperfitting.record.schema import Record
from tests.records import make_continuation, make_record, make_sample, make_slice, write_sweep

DATASETS = ("fiction", "news")
QUESTION = Question(form="p1", wording="Which do you prefer?", guidelines="Read both.")
LENGTH = 12
Rule = Callable[[Item, Place], Shown]
"""From an item and the text on the left to a choice."""


def words(seed: int, n: int = LENGTH) -> str:
    """Return random words, all different."""
    return " ".join(f"w{number}" for number in np.random.default_rng(seed).permutation(999)[:n])


def study_record(seed: int, contexts: int = 12) -> Record:
    """Return the record of a run: the same contexts and references for every seed.

    The texts of seed 0 repeat three words; all others have no word twice.
    """
    distinct = 3 if seed == 0 else LENGTH
    samples = [
        make_sample(
            make_continuation(
                " ".join([words(1000 * (seed + 1) + i, distinct)] * (LENGTH // distinct))
            ),
            make_continuation("on and on and on and on and on and on"),
            dataset=DATASETS[i % len(DATASETS)],
            context=f"Context {i}",
            reference="",
        ).model_copy(update={"reference": make_continuation(words(i))})
        for i in range(contexts)
    ]
    slices = [make_slice({"gen/ttr": Estimate(1.0, None, contexts)}, max_new_tokens=LENGTH)]
    for dataset in DATASETS:
        slices.append(make_slice({}, dataset=dataset, max_new_tokens=LENGTH))
    per_text = {side: {"gen/ttr": [1.0] * contexts} for side in ("tuned", "base", "reference")}
    return make_record(slices, samples, per_text)


def study(
    annotators: Sequence[str] | Mapping[str, str] = ("ann", "bob", "cem"),
    records: Mapping[str, Record] | None = None,
    question: Question = QUESTION,
    **design: object,
) -> Task:
    """Return a task of two runs against the reference."""
    records = records or {"base_0": study_record(0), "tuned_0": study_record(1)}
    is_plain = not isinstance(annotators, Mapping)
    kinds = dict.fromkeys(annotators, "person") if is_plain else annotators
    values = {"annotators": kinds, "checks": 2, "repeats": 1} | design
    return make_task("x", records, Design(**values), question)


def write_study_sweep(folder: Path, report: Mapping[str, object]) -> Path:
    """Write a sweep with the runs that `study` is of."""
    return write_sweep(folder, report, {"base_0": study_record(0), "tuned_0": study_record(1)})


def side_of(place: Place, left: Place) -> Shown:
    """Return where a text is shown."""
    return "left" if place == left else "right"


def always_left(item: Item, left: Place) -> Shown:
    """Choose the left side, whatever it shows."""
    return "left"


def careful(item: Item, left: Place) -> Shown:
    """Prefer the tuned run to the reference, the reference to the base run; pass every check."""
    if item.expected == "first":
        return side_of("first", left)
    return side_of("first" if item.first.origin.run == "tuned_0" else "second", left)


def judge_all(
    task: Task, rules: Mapping[str, Rule], seconds: float = 20.0, source: str = "page"
) -> list[Judgment]:
    """Return the judgments of annotators who follow rules."""
    return [
        make_judgment(
            task, item, name, Answer(rule(item, task.left(name, item)), seconds=seconds), source
        )
        for name, rule in rules.items()
        for item in task.items_of(name)
    ]


def judge_by_model(
    task: Task, name: str, rule: Rule, seconds: float | None = None
) -> list[Judgment]:
    """Return a model's judgments of all normal items in both orders."""
    places: tuple[Place, Place] = ("first", other("first"))
    return [
        make_judgment(task, item, name, Answer(rule(item, left), seconds=seconds), name, left)
        for item in task.items
        if item.kind == "normal"
        for left in places
    ]
