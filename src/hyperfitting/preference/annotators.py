"""What is known of each annotator, and whom the task's exclusion rule leaves out."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from hyperfitting.preference.items import Choice, Item, Task
from hyperfitting.preference.judgments import JUDGE, Judgment
from hyperfitting.preference.results import AnnotatorSummary

_MIN_PREFERENCES = 20
"""Preferences from which a share of one side means something."""


def summarize_annotators(task: Task, judgments: Sequence[Judgment]) -> list[AnnotatorSummary]:
    """Return a summary of each annotator who judged anything, by name."""
    by_annotator: dict[str, list[Judgment]] = defaultdict(list)
    by_item: dict[str, list[Judgment]] = defaultdict(list)
    for judgment in judgments:
        by_annotator[judgment.annotator].append(judgment)
        by_item[judgment.item].append(judgment)
    return [_summary(task, name, by_annotator[name], by_item) for name in sorted(by_annotator)]


def _summary(
    task: Task, name: str, own: Sequence[Judgment], by_item: Mapping[str, Sequence[Judgment]]
) -> AnnotatorSummary:
    answered = [(item, j) for j in own if (item := task.item(j.item)) is not None]
    checks = [j.choice == item.expected for item, j in answered if item.expected is not None]
    seconds = [j.seconds for j in own if j.seconds is not None]
    preferences = [j.shown for j in own if j.shown in ("left", "right")]
    repeats = list(_repeats(answered))
    same = [
        mine.choice == theirs.choice
        for item, mine in answered
        if item.kind == "normal"
        for theirs in by_item[mine.item]
        if theirs.annotator != name
    ]
    summary = AnnotatorSummary(
        name=name,
        judgments=len(own),
        median_seconds=median(seconds) if seconds else None,
        left_share=preferences.count("left") / len(preferences) if preferences else None,
        preferences=len(preferences),
        failed_checks=checks.count(False),
        checks=len(checks),
        consistent_repeats=repeats.count(True),
        repeats=len(repeats),
        agreement=sum(same) / len(same) if same else None,
        excluded=[],
    )
    return summary.model_copy(update={"excluded": list(_exclusions(task, summary))})


def _repeats(answered: Sequence[tuple[Item, Judgment]]) -> Iterator[bool]:
    """Yield for each repeat whether the answer is the same as the first time."""
    first: dict[str, Choice] = {item.id: j.choice for item, j in answered}
    for item, judgment in answered:
        if item.repeats in first:
            yield judgment.choice == first[item.repeats]


def _exclusions(task: Task, summary: AnnotatorSummary) -> Iterator[str]:
    rule = task.exclusion
    if summary.checks and summary.failed_checks > rule.max_failed_checks * summary.checks:
        yield f"failed {summary.failed_checks} of {summary.checks} checks"
    seconds = None if summary.name.startswith(JUDGE) else summary.median_seconds
    if seconds is not None and seconds < rule.min_median_seconds:
        yield f"took {seconds:.1f} s per item"
    left = summary.left_share
    if left is not None and summary.preferences >= _MIN_PREFERENCES:
        side, share = ("left", left) if left >= 0.5 else ("right", 1 - left)
        if share > rule.max_side_share:
            yield f"chose {side} in {share:.0%} of {summary.preferences} preferences"
