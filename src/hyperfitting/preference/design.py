"""The design of a study: which items there are, who judges which, in which order.

It is balanced by dataset, pair of systems and length, and no annotator meets a context twice (but
in a repeat), so that none sees one text in two items.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hyperfitting.errors import UserError
from hyperfitting.preference.items import (
    ANNOTATOR_NAME,
    JUDGMENTS_FILE,
    Annotator,
    ExclusionRule,
    Item,
    Origin,
    Question,
    Source,
    Task,
    Text,
    content_hash,
    read_task,
)
from hyperfitting.preference.judgments import read_judgments
from hyperfitting.preference.pairing import (
    REFERENCE,
    Context,
    Pair,
    common_contexts,
    pairs_of_systems,
    text_hashes,
)
from hyperfitting.preference.texts import cut_alike, normalize, scramble
from hyperfitting.record.schema import Record, Sample
from hyperfitting.record.texts import Continuation

MIN_GOLD_VOTES = 2
"""Judgments of an earlier item, all the same, that make it a gold item."""


@dataclass(frozen=True)
class Design:
    """How a study is laid out."""

    annotators: Mapping[str, Literal["person", "script"]]
    """By name."""
    votes: int = 3
    """Annotators for each item."""
    against: str = REFERENCE
    """What each run's tuned model is compared with: `reference`, `base`, or the name of a run."""
    lengths: tuple[int, ...] = ()
    """New tokens; empty: the longest that both sides have."""
    items: int | None = None
    """Normal items; none: as many as the contexts and annotators allow."""
    checks: int = 4
    """Attention checks, for every annotator."""
    repeats: int = 4
    """Items that each annotator judges a second time, sides swapped."""
    seed: int = 0


def make_task(
    sweep: str,
    records: Mapping[str, Record],
    design: Design,
    question: Question,
    gold: Sequence[Item] = (),
    exclusion: ExclusionRule | None = None,
) -> Task:
    """Return a study of some runs.

    Args:
        sweep: name of the sweep.
        records: by run.
        design: who judges how many items of which kind.
        question: what is asked.
        gold: items whose right answer is known, for every annotator.
        exclusion: which annotators the sensitivity analysis leaves out.

    Raises:
        UserError: the design cannot be had from these records.
    """
    _check(design)
    pairs = pairs_of_systems(records, design.against, design.lengths)
    gold_keys = {item.key for item in gold}
    contexts = [c for c in common_contexts(records, design.seed) if c.key not in gold_keys]
    if len(contexts) <= design.checks:
        raise UserError(
            f"the runs have {len(contexts)} contexts in common, and each check needs one",
            field="--checks",
            value=design.checks,
            valid=f"at most {len(contexts) - 1}" if contexts else "runs on the same contexts",
        )
    check_contexts, normal = contexts[: design.checks], contexts[design.checks :]
    length = max(pair.length for pair in pairs)
    checks = [_attention_check(records, context, length, design.seed) for context in check_contexts]
    items, assigned = _assign(records, normal, pairs, design)
    if not items:
        raise UserError(
            "no two texts can be compared: they are the same, or hold nothing that can be read",
            field="sweep",
            value=sweep,
            hint="--against base, or runs of a model that writes words",
        )
    repeats = _repeats(items, assigned, design)
    known = {item.id: item for item in (*items, *checks, *gold, *repeats.values())}
    return Task(
        sweep=sweep,
        question=question,
        seed=design.seed,
        votes=design.votes,
        exclusion=exclusion or ExclusionRule(),
        texts=dict(text_hashes(records)),
        annotators={
            name: Annotator(
                kind=kind,
                items=tuple(_order(name, assigned[name], [*checks, *gold], repeats, design)),
            )
            for name, kind in design.annotators.items()
        },
        items=tuple(known.values()),
    )


def _check(design: Design) -> None:
    for name in design.annotators:
        if not ANNOTATOR_NAME.fullmatch(name):
            raise UserError(
                "is no name of an annotator",
                field="--annotators",
                value=name,
                valid="up to 64 letters, digits and _.@+-",
            )
    if not 1 <= design.votes <= len(design.annotators):
        raise UserError(
            f"each item needs that many of the {len(design.annotators)} annotators",
            field="--votes",
            value=design.votes,
            valid=f"1 to {len(design.annotators)}",
            hint="more --annotators",
        )


def _assign(
    records: Mapping[str, Record], contexts: Sequence[Context], pairs: Sequence[Pair], d: Design
) -> tuple[list[Item], dict[str, list[Item]]]:
    """Return the normal items, and those of each annotator.

    A context has as many items as there are annotators for, since nobody meets it twice. Pairs take
    turns within each dataset; an item goes to those who have judged its pair least.
    """
    per_context = min(len(d.annotators) // d.votes, len(pairs))
    turn: Counter[str] = Counter()
    load: Counter[tuple[str, Pair | None]] = Counter()
    items: list[Item] = []
    assigned: dict[str, list[Item]] = {name: [] for name in d.annotators}
    for context in contexts:
        free = list(d.annotators)
        for _ in range(per_context):
            pair = pairs[turn[context.dataset] % len(pairs)]
            turn[context.dataset] += 1
            item = _item(records, context, pair)
            if item.first.text == item.second.text:
                continue  # nothing to choose
            if d.items is not None and len(items) == d.items:
                return items, assigned
            items.append(item)
            free.sort(key=lambda a: (load[a, pair], load[a, None], content_hash([a, item.id])))
            for name in free[: d.votes]:
                assigned[name].append(item)
                load.update([(name, pair), (name, None)])
            del free[: d.votes]
    if d.items is not None and len(items) < d.items:
        raise UserError(
            f"the contexts and annotators allow {len(items)}",
            field="--items",
            value=d.items,
            valid=f"at most {len(items)}",
            hint="more --annotators, or fewer --votes",
        )
    return items, assigned


def _item(records: Mapping[str, Record], context: Context, pair: Pair) -> Item:
    (first, first_ended), (second, second_ended) = (
        _text(_sample(records, context, run), side, pair.length)
        for run, side in (pair.first, pair.second)
    )
    shown = cut_alike(first, second, (first_ended, second_ended))
    texts = [
        Text(text=text, origin=Origin(run=run, side=side, sample=context.samples[run]))
        for text, (run, side) in zip(shown, (pair.first, pair.second), strict=True)
    ]
    return Item(
        dataset=context.dataset,
        length=pair.length,
        context=context.key[1],
        first=texts[0],
        second=texts[1],
    )


def _sample(records: Mapping[str, Record], context: Context, run: str) -> Sample:
    return records[run].samples[context.samples[run]]


def _text(sample: Sample, side: Source, length: int) -> tuple[str, bool]:
    """Return a continuation of at most ``length`` tokens, and whether it ended by itself."""
    continuation: Continuation = getattr(sample, side)
    text = normalize("".join(continuation.token_texts[:length]))
    return text, len(continuation.tokens) < length


def _attention_check(
    records: Mapping[str, Record], context: Context, length: int, seed: int
) -> Item:
    """Return a reference against its own words in another order."""
    run = next(iter(records))
    text, _ = _text(_sample(records, context, run), "reference", length)
    real, _ = cut_alike(text, text, (False, False))
    origins = [
        Origin(run=run, side=side, sample=context.samples[run])
        for side in ("reference", "scrambled")
    ]
    return Item(
        kind="attention_check",
        dataset=context.dataset,
        length=length,
        context=context.key[1],
        first=Text(text=real, origin=origins[0]),
        second=Text(text=scramble(real, seed), origin=origins[1]),
        expected="first",
    )


def _repeats(
    items: Sequence[Item], assigned: Mapping[str, Sequence[Item]], design: Design
) -> dict[str, Item]:
    """Return the repeats by the id of what they repeat: of each annotator's first items."""
    chosen = {
        item.id
        for name in design.annotators
        for item in _shuffled(name, assigned[name], design.seed)[: design.repeats]
    }
    return {
        item.id: Item(**item.model_dump(exclude={"id"}) | {"kind": "repeat", "repeats": item.id})
        for item in items
        if item.id in chosen
    }


def _shuffled(name: str, items: Sequence[Item], seed: int) -> list[Item]:
    return sorted(items, key=lambda item: content_hash([seed, "order", name, item.id]))


def _order(
    name: str,
    items: Sequence[Item],
    for_all: Sequence[Item],
    repeats: Mapping[str, Item],
    design: Design,
) -> Iterator[str]:
    """Yield the ids of an annotator's items in order.

    What is repeated comes in the first half, its repeat in the second; checks are anywhere.
    """
    shuffled = _shuffled(name, items, design.seed)
    repeated = shuffled[: design.repeats]
    rest = _shuffled(name, [*shuffled[design.repeats :], *for_all], design.seed + 1)
    half = len(rest) // 2
    for part in (
        [*repeated, *rest[:half]],
        [*(repeats[item.id] for item in repeated), *rest[half:]],
    ):
        yield from (item.id for item in _shuffled(name, part, design.seed + 2))


def gold_items(folder: Path) -> list[Item]:
    """Return the items of an earlier study on which all people agreed, as gold items.

    Raises:
        UserError: the folder holds no study, or a damaged one.
    """
    task = read_task(folder)
    choices: dict[str, list[str]] = {}
    for judgment in read_judgments(folder / JUDGMENTS_FILE):
        annotator = task.annotators.get(judgment.annotator)
        if annotator is not None and annotator.kind == "person":
            choices.setdefault(judgment.item, []).append(judgment.choice)
    return [
        Item(**item.model_dump(exclude={"id"}) | {"kind": "gold", "expected": choices[item.id][0]})
        for item in task.items
        if item.kind == "normal"
        and len(choices.get(item.id, ())) >= MIN_GOLD_VOTES
        and len(set(choices[item.id])) == 1
    ]
