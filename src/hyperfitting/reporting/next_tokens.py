"""What comes next, before and after hyperfitting, at telling places of a text (Figure 4).

Read from the artefacts that `evaluation.top_tokens` leaves.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hyperfitting.results import Record


@dataclass(frozen=True)
class Place:
    """A place in a text: what stands before it, and the likeliest tokens there."""

    context: str
    original: list["Token"]
    hyperfitted: list["Token"]


@dataclass(frozen=True)
class Token:
    """A token that may come next."""

    text: str
    mass: float
    trained_on: bool
    """The training data has it."""


def sets(record: Record) -> list[str]:
    """Return the evaluation sets whose next tokens a record names, before and after."""
    prefix = "tuned_distributions/"
    return [name.removeprefix(prefix) for name in record["artefacts"] if name.startswith(prefix)]


def places(record: Record, texts: str, count: int) -> list[Place]:
    """Return places of a set's first text, in its order; none if the artefacts are gone.

    They are those where hyperfitting gave most mass to a token that the training data never had; if
    there are too few, any.
    """
    before, after = _read(record, "original", texts), _read(record, "tuned", texts)
    trained = _trained_on(record)
    if before is None or after is None or trained is None:
        return []

    def worth(place: int) -> tuple[bool, float]:
        token, mass = after["ids"][place][0], after["mass"][place][0]
        had = dict(zip(before["ids"][place], before["mass"][place], strict=True)).get(token, 0.0)
        return token in trained, had - mass

    chosen = sorted(sorted(range(len(after["ids"])), key=worth)[:count])
    return [
        Place(
            "".join(after["text"][: place + 1]),
            list(_tokens(before, place, trained)),
            list(_tokens(after, place, trained)),
        )
        for place in chosen
    ]


def _tokens(found: dict[str, Any], place: int, trained: set[int]) -> Iterator[Token]:
    for piece, token, mass in zip(
        found["pieces"][place], found["ids"][place], found["mass"][place], strict=True
    ):
        yield Token(piece, mass, token in trained)


def _read(record: Record, whose: str, texts: str) -> dict[str, Any] | None:
    folder = record["artefacts"].get(f"{whose}_distributions/{texts}")
    path = Path(folder or "") / "distributions.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def _trained_on(record: Record) -> set[int] | None:
    """Return the tokens that the training data has; none: it is no longer in the store."""
    path = Path(record["artefacts"]["corpus"]) / "train.npy"
    if not path.is_file():
        return None
    return set(np.unique(np.load(path, allow_pickle=False)).tolist())
