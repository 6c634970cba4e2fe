"""What a record alone cannot prove: which of its numbers are taken as recorded, and whether those
are consistent with each other."""

from collections.abc import Iterator

from hyperfitting.config import RunConfig
from hyperfitting.formatting import listed
from hyperfitting.metrics.registry import METRICS
from hyperfitting.record.schema import SIDES, Record
from hyperfitting.verify.check import Check
from hyperfitting.verify.scores import ATOL, RTOL

_OVERLAP = "gen/dataset_overlap"
_NEEDED = {"gen/mauve": "mauve", "gen/fid": "fid_weights", "gen/kid": "fid_weights"}
"""Metrics of a whole set, and the field of `evaluation` without which they are not measured."""


def check_consistency(record: Record, config: RunConfig) -> Check:
    """Compare a record's numbers with each other, and name the parts that only artifacts give."""
    problems = [*_differences(record), *_overlaps(record), *_sets(record, config)]
    if problems:
        return Check("consistency", "failed", listed(problems))
    detail = "differences, lengths and sets"
    if parts := list(_only_recorded(record)):
        detail += f"; only `record from artifacts` checks {', '.join(parts)}"
    return Check("consistency", "passed", detail)


def _differences(record: Record) -> Iterator[str]:
    """Yield the differences that are not those of the two models' means over the same texts."""
    for i, part in enumerate(record.slices):
        for key, difference in part.difference.items():
            tuned, base = part.tuned.get(key), part.base.get(key)
            if tuned is None or base is None or not tuned.n == base.n == difference.n:
                continue
            expected = tuned.mean - base.mean
            if abs(difference.mean - expected) > ATOL + RTOL * max(abs(tuned.mean), abs(base.mean)):
                yield f"slices[{i}].difference.{key} is {difference.mean}, not {expected}"


def _overlaps(record: Record) -> Iterator[str]:
    """Yield the slices whose longest overlaps are longer than those of longer continuations."""
    for i, part in enumerate(record.slices):
        for longer in record.slices:
            if longer.dataset != part.dataset or longer.max_new_tokens <= part.max_new_tokens:
                continue
            for side in SIDES:
                short, long = (p.estimates(side).get(_OVERLAP) for p in (part, longer))
                if short is not None and long is not None and short.mean > long.mean + ATOL:
                    yield f"slices[{i}].{side}.{_OVERLAP} is above that of longer continuations"


def _sets(record: Record, config: RunConfig) -> Iterator[str]:
    """Yield the metrics of whole sets that the config does not ask for."""
    for key, field in _NEEDED.items():
        is_there = any(key in part.tuned or key in part.base for part in record.slices)
        if is_there and getattr(config.evaluation, field) is None:
            yield f"{METRICS[key].label} without evaluation.{field}"


def _only_recorded(record: Record) -> Iterator[str]:
    parts = {
        "history": record.history,
        "notes": record.notes,
        "per_step": record.per_step.tuned,
        "next_tokens": record.next_tokens,
        "mechanism": record.mechanism,
        "downstream": record.downstream,
        "recognition": record.recognition,
        "the scores of chat": record.chat,
    }
    yield from (name for name, part in parts.items() if part)
