"""How reliable a judge is: flips under swapped order, biases, agreement with people.

A judge's verdict on an item is the text it prefers in both orders, else a tie (as in MT-bench;
Zheng et al., 2023). A judge whose answer changes with the order on more than the study's
`max_flip_rate` of the items does not rank: tables show the reason instead of a number.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.metrics.uncertainty import bootstrap_mean
from hyperfitting.preference.agreement import agreement, counts, krippendorff_alpha
from hyperfitting.preference.items import JUDGMENTS_FILE, Choice, Item, Origin, Task, read_task
from hyperfitting.preference.judge_answers import judge_names, judge_usage
from hyperfitting.preference.judge_bias import RESAMPLES, WinEstimates, Wins, estimate_wins
from hyperfitting.preference.judge_report import (
    Agreement,
    JudgeFile,
    JudgeReport,
    Preference,
    write_judge_file,
)
from hyperfitting.preference.judgments import JUDGE, Judgment, read_judgments, validate

Verdicts = Mapping[str, Choice]
"""By item."""
_SCORES: dict[Choice, float] = {"first": 1.0, "equal": 0.5, "both_bad": 0.5, "second": 0.0}


def report_on_judges(study: Path) -> JudgeFile:
    """Report on all judges of a study, in `judge.json`; return the report.

    Raises:
        UserError: the task, a judgment or an answer is damaged.
    """
    task = read_task(study)
    judgments, _ = validate(task, read_judgments(study / JUDGMENTS_FILE))
    judged: dict[str, dict[str, list[Judgment]]] = {name: {} for name in judge_names(study)}
    for judgment in judgments:
        if judgment.is_model:
            by_item = judged.setdefault(judgment.annotator.removeprefix(JUDGE), {})
            by_item.setdefault(judgment.item, []).append(judgment)
    votes = Votes(task, [judgment for judgment in judgments if not judgment.is_model])
    reliabilities = {
        name: JudgeReliability(task, by_item, votes) for name, by_item in judged.items()
    }
    reports = {}
    for name, trust in reliabilities.items():
        others = {other: t.verdicts for other, t in reliabilities.items() if other != name}
        reports[name] = trust.report(others).model_copy(update={"usage": judge_usage(study, name)})
    report = JudgeFile(task=task.content_hash, judges=reports)
    write_judge_file(study, report)
    return report


class Votes:
    """Choices of people on the normal items; of scripts, if no person has judged."""

    def __init__(self, task: Task, judgments: Sequence[Judgment]) -> None:
        people = [j for j in judgments if task.annotators[j.annotator].kind == "person"]
        self.kind: Literal["people", "scripts"] = "people" if people else "scripts"
        normal = {item.id for item in task.items if item.kind == "normal"}
        self.votes = [(j.item, j.choice) for j in people or judgments if j.item in normal]
        self._seed = task.seed

    def majorities(self) -> Verdicts:
        """Return the most frequent choice on each item that has one."""
        by_item: dict[str, Counter[Choice]] = {}
        for item, choice in self.votes:
            by_item.setdefault(item, Counter())[choice] += 1
        tops = {item: votes.most_common(2) for item, votes in by_item.items()}
        return {i: top[0][0] for i, top in tops.items() if len({n for _, n in top}) == len(top)}

    def alpha(self) -> Estimate | None:
        """Return Krippendorff's alpha among them."""
        table = counts([item for item, _ in self.votes], [choice for _, choice in self.votes])
        return agreement(krippendorff_alpha, table, RESAMPLES, self._seed)


class JudgeReliability:
    """The figures of one judge.

    Args:
        task: the study.
        judgments: of the judge, by item.
        votes: of people.
    """

    def __init__(
        self, task: Task, judgments: Mapping[str, Sequence[Judgment]], votes: Votes
    ) -> None:
        self._task, self._votes = task, votes
        in_both = [item for item in task.items if len(judgments.get(item.id, ())) == 2]
        self._judgments = {item.id: judgments[item.id] for item in in_both}
        self._normal = [item for item in in_both if item.kind == "normal"]
        self._checks = [item for item in in_both if item.expected is not None]
        self.verdicts = {item.id: self._verdict(item) for item in self._normal}

    def report(self, others: Mapping[str, Verdicts]) -> JudgeReport:
        """Return the report, without the usage.

        Args:
            others: verdicts of the other judges, by name.
        """
        flip_rate = self._mean(lambda item: len(self._choices(item)) > 1)
        reasons = []
        limit = self._task.max_flip_rate
        if flip_rate is None:
            reasons.append("no item was answered in both orders")
        elif flip_rate.mean > limit:
            reasons.append(
                f"its answer depends on the order of the texts on {flip_rate.mean:.0%} of "
                f"{flip_rate.n} items (at most {limit:.0%} are allowed)"
            )
        return JudgeReport(
            reliable=not reasons,
            reasons=reasons,
            usage=None,
            items=len(self._normal),
            flip_rate=flip_rate,
            reversal_rate=self._mean(lambda item: self._choices(item) >= {"first", "second"}),
            tie_rate=self._mean(lambda item: _SCORES[self.verdicts[item.id]] == 0.5),
            left_rate=self._mean(self._left_rate),
            longer_rate=self._mean(self._takes_longer),
            checks_passed=self._mean(lambda i: self._verdict(i) == i.expected, self._checks),
            compared_with=self._votes.kind,
            with_people=self._agreement(self._votes.majorities()),
            people=self._votes.alpha(),
            with_judges={
                name: agreed for name, v in others.items() if (agreed := self._agreement(v))
            },
            preferences=self._preferences(),
        )

    def _choices(self, item: Item) -> set[Choice]:
        return {judgment.choice for judgment in self._judgments[item.id]}

    def _verdict(self, item: Item) -> Choice:
        choices = self._choices(item)
        return choices.pop() if len(choices) == 1 else "equal"

    def _left_rate(self, item: Item) -> float:
        """Return the share of the left side among the preferences on an item; NaN: all tied."""
        shown = [judgment.shown for judgment in self._judgments[item.id]]
        n_sides = shown.count("left") + shown.count("right")
        return shown.count("left") / n_sides if n_sides else np.nan

    def _takes_longer(self, item: Item) -> float:
        """Return whether the verdict is the longer text; NaN: a tie, or of the same length."""
        score, difference = _SCORES[self.verdicts[item.id]], _length_difference(item)
        return float((score == 1) == (difference > 0)) if score != 0.5 and difference else np.nan

    def _mean(
        self, value: Callable[[Item], float], items: Sequence[Item] | None = None
    ) -> Estimate | None:
        items = self._normal if items is None else items
        return bootstrap_mean([value(item) for item in items], RESAMPLES, self._task.seed)

    def _agreement(self, verdicts: Verdicts) -> Agreement | None:
        """Return the agreement with other verdicts, on the items that both have."""
        shared = [item for item in self.verdicts if item in verdicts]
        same = [self.verdicts[item] == verdicts[item] for item in shared]
        share = bootstrap_mean(same, RESAMPLES, self._task.seed)
        if share is None:
            return None
        both = [*(self.verdicts[i] for i in shared), *(verdicts[i] for i in shared)]
        table = counts(shared * 2, both)
        alpha = agreement(krippendorff_alpha, table, RESAMPLES, self._task.seed)
        return Agreement(share=share, alpha=alpha)

    def _preferences(self) -> list[Preference]:
        pairs: dict[tuple[str, str], list[Item]] = {}
        for item in self._normal:
            pair = (_system(item.first.origin), _system(item.second.origin))
            pairs.setdefault(pair, []).append(item)
        return [
            Preference(first=first, second=second, **vars(self._wins(items)))
            for (first, second), items in pairs.items()
        ]

    def _wins(self, items: Sequence[Item]) -> WinEstimates:
        rows = [(n, item, j) for n, item in enumerate(items) for j in self._judgments[item.id]]
        wins = Wins(
            np.array([_SCORES[judgment.choice] for *_, judgment in rows]),
            np.array([_length_difference(item) for _, item, _ in rows], dtype=np.float64),
            np.array([judgment.left == "first" for *_, judgment in rows]),
            np.array([n for n, *_ in rows], dtype=np.intp),
        )
        return estimate_wins(wins, self._task.seed)


def _length_difference(item: Item) -> int:
    return len(item.first.text) - len(item.second.text)


def _system(origin: Origin) -> str:
    """Return the name of who wrote a text."""
    return origin.side if origin.side == "reference" else f"{origin.run}/{origin.side}"
