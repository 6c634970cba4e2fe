"""Human preference in reports: cells of tables, and how each text was judged.

A judge's numbers never fill a cell: they stand in its note, or there is only why they are refused.
"""

from collections import defaultdict
from collections.abc import Iterator

from hyperfitting import formatting
from hyperfitting.metrics.estimate import Estimate
from hyperfitting.preference.items import Choice
from hyperfitting.preference.pairing import text_hash
from hyperfitting.preference.results import SCRIPTS, Analysis, Comparison, Group, ItemVotes
from hyperfitting.record.schema import SIDES, Record, Sample, Side
from hyperfitting.record.texts import Continuation
from hyperfitting.reporting.spec import ColumnSpec
from hyperfitting.reporting.sweep_records import RunEntry, SweepRecords

PREFERENCE = "preference"
"""The metric of human preference, which `hyperfit-preference` measures."""
_NONE_YET = "no annotations yet"
_CHOICES: dict[Choice, str] = {
    "first": "preferred",
    "equal": "equal",
    "both_bad": "both bad",
    "second": "not preferred",
}


def preference_share(
    sweep: SweepRecords, run: RunEntry, column: ColumnSpec
) -> tuple[Estimate | None, str, str]:
    """Return the share of judgments that prefer a run to the reference or find both equally good.

    Args:
        sweep: of the run.
        run: which run's texts were judged.
        column: at which length, on which dataset, of which side.

    Returns:
        The share, or None; why there is none; and a note: how many judgments of whom, their
        agreement, and what judges say.
    """
    analysis, record = sweep.preference, run.record
    if analysis is None or record is None:
        return None, run.missing if record is None else _NONE_YET, ""
    if problem := _problem(analysis, run.name, record, column):
        return None, problem, ""
    judges = "; ".join(
        _judge_note(group, comparison, column)
        for group in analysis.judges
        if (comparison := _comparison(group, run, record, column)) is not None
    )
    group = analysis.annotated
    if group is None:
        return None, _NONE_YET, judges
    comparison = _comparison(group, run, record, column)
    if comparison is None:
        return None, "not asked", judges
    note = _note(group, comparison)
    return comparison.preferred_or_equal, "", f"{note}; {judges}" if judges else note


def _problem(analysis: Analysis, run: str, record: Record, column: ColumnSpec) -> str:
    """Return why a study has no share of a finished run; "" if it may have one."""
    if column.minus is not None or column.statistic != "mean":
        return "only a share for each run"
    if not _is_of(analysis, run, record):
        return "other texts were judged than this record's"
    return ""


def _comparison(
    group: Group, run: RunEntry, record: Record, column: ColumnSpec
) -> Comparison | None:
    length = column.length or record.overall.max_new_tokens
    return group.comparison(run.name, length, column.dataset, column.side)


def _is_of(analysis: Analysis, run: str, record: Record) -> bool:
    """Return whether the texts that were judged are still a record's."""
    return all(analysis.texts.get(f"{run}/{side}") == text_hash(record, side) for side in SIDES)


def _note(group: Group, comparison: Comparison) -> str:
    who = "scripts" if group.who == SCRIPTS else "annotators"
    alpha = formatting.estimate(comparison.alpha, "{:.2f}") or "undefined"
    return f"n {comparison.judgments}, {comparison.annotators} {who}, alpha {alpha}"


def _judge_note(group: Group, comparison: Comparison, column: ColumnSpec) -> str:
    if group.refused:
        flips = formatting.estimate(group.flip_rate, "{:.0%}")
        return f"{group.who} refused: it flips {flips}" if flips else f"{group.who} refused"
    share = comparison.preferred_or_equal.scaled(column.scale)
    number = formatting.estimate(share, column.number_format)
    return f"{group.who}, a model: {number}, n {comparison.judgments}"


TextKey = tuple[str, str, tuple[int, ...]]
"""Evaluation dataset, text of the context, tokens of the continuation."""


def text_key(sample: Sample, side: Side) -> TextKey:
    """Return what identifies a continuation in all runs of a sweep."""
    continuation: Continuation = getattr(sample, side)
    return sample.dataset, sample.context.text, tuple(continuation.tokens)


def judged_texts(sweep: SweepRecords) -> dict[TextKey, list[tuple[str, str]]]:
    """Return how each text was judged: by whom against what, and the judgments."""
    judged: dict[TextKey, list[tuple[str, str]]] = defaultdict(list)
    analysis = sweep.preference
    if analysis is None:
        return judged
    records = {
        run.name: record for run, record in sweep.finished() if _is_of(analysis, run.name, record)
    }
    for item in analysis.items:
        side, record = item.first.side, records.get(item.first.run)
        if record is not None and side != "scrambled":
            judged[text_key(record.samples[item.first.sample], side)].extend(_votes(item))
    return judged


def _votes(item: ItemVotes) -> Iterator[tuple[str, str]]:
    against = item.second.run if item.second.side == "tuned" else item.second.side
    for who, votes in item.votes.items():
        counts = ", ".join(f"{votes[c]} {label}" for c, label in _CHOICES.items() if votes.get(c))
        yield f"{who}, against {against} at {item.length} tokens:", counts
