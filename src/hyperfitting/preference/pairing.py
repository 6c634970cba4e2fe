"""Which texts a study compares: pairs of systems, at which lengths, on which contexts."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest

from hyperfitting.errors import UserError, no_such
from hyperfitting.preference.items import Source, content_hash
from hyperfitting.preference.texts import normalize
from hyperfitting.record.schema import SIDES, Record, Side

REFERENCE, BASE = "reference", "base"
"""What runs are compared with, other than another run."""


@dataclass(frozen=True)
class Pair:
    """Two systems, and the length of their texts."""

    first: tuple[str, Source]
    """Run and side."""
    second: tuple[str, Source]
    length: int


@dataclass(frozen=True)
class Context:
    """A context that all runs continue."""

    dataset: str
    samples: Mapping[str, int]
    """By run, the index of its sample."""
    key: tuple[str, str]
    """As `Item.key`."""


def pairs_of_systems(
    records: Mapping[str, Record], against: str, lengths: Collection[int]
) -> list[Pair]:
    """Return the pairs of systems at each length.

    Args:
        records: by run.
        against: what each run's tuned model is compared with: `reference`, `base`, or a run.
        lengths: in new tokens; empty: the longest that both sides of all runs have.

    Raises:
        UserError: there is no such run or length.
    """
    sides = (REFERENCE, BASE, *records)
    if against not in sides:
        raise no_such("run", "--against", against, sides)
    systems: list[tuple[tuple[str, Source], tuple[str, Source]]] = []
    for run, record in records.items():
        if against == REFERENCE:
            systems.append(((run, "tuned"), (run, "reference")))
        elif against == BASE and record.is_tuned:
            systems.append(((run, "tuned"), (run, "base")))
        elif against not in (BASE, run):
            systems.append(((run, "tuned"), (against, "tuned")))
    if not systems:
        raise UserError(
            "leaves nothing to compare", field="--against", value=against, valid=REFERENCE
        )
    return [Pair(*pair, n) for n in _lengths(records, against, lengths) for pair in systems]


def _lengths(records: Mapping[str, Record], against: str, lengths: Collection[int]) -> list[int]:
    """Return the lengths of the texts, checked to be ones that every run has."""
    available = set.intersection(
        *({part.max_new_tokens for part in record.slices} for record in records.values())
    )
    if against == REFERENCE:
        references = [s.reference for record in records.values() for s in record.samples]
        longest = min(len(reference.tokens) for reference in references)
        available = {length for length in available if length <= longest}
    for length in lengths:
        if length not in available:
            raise UserError(
                "not every run has texts of this length",
                field="--lengths",
                value=length,
                valid=" ".join(map(str, sorted(available))),
                hint="evaluation.text_len and evaluation.max_new_tokens",
            )
    if not available:
        raise UserError(
            "the references are shorter than every scored length",
            field="--against",
            value=against,
            hint="a larger evaluation.text_len, or --against base",
        )
    return sorted(set(lengths)) or [max(available)]


def common_contexts(records: Mapping[str, Record], seed: int) -> list[Context]:
    """Return the contexts that all runs continue, in random order, datasets in turn."""
    rows: list[dict[tuple[str, str], int]] = []
    for record in records.values():
        keys = [(s.dataset, normalize(s.context.text)) for s in record.samples]
        rows.append({key: i for i, key in reversed(list(enumerate(keys)))})
    common = [key for key in rows[0] if all(key in other for other in rows)]
    by_dataset: dict[str, list[Context]] = {}
    for key in sorted(common, key=lambda key: content_hash([seed, *key])):
        samples = {run: row[key] for run, row in zip(records, rows, strict=True)}
        by_dataset.setdefault(key[0], []).append(Context(key[0], samples, key))
    turns = zip_longest(*(by_dataset[dataset] for dataset in sorted(by_dataset)))
    return [context for turn in turns for context in turn if context is not None]


def text_hashes(records: Mapping[str, Record]) -> Iterator[tuple[str, str]]:
    """Yield `run/side` and the hash of its texts, as `Task.texts` has them."""
    for run, record in records.items():
        for side in SIDES:
            yield f"{run}/{side}", text_hash(record, side)


def text_hash(record: Record, side: Side) -> str:
    """Return the hash of one side's texts in a record."""
    return content_hash([getattr(sample, side).text for sample in record.samples])
