"""`hyperfit-preference plan`: how many judgments a difference between two systems needs.

A share p of N judgments, m for each item, by A annotators has the variance

    p (1 - p) / N  *  (1 + (m - 1) r_item + (N / A - 1) r_annotator),

Kish's design effect for two crossed clusters: judgments of one item correlate by r_item, those of
one annotator about one system by r_annotator. What an annotator gives to all systems alike cancels
in a difference, and is no part of r_annotator; that systems share contexts helps, and is left out.
Two shares are told apart by a two-sided z-test.
"""

import argparse
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import NormalDist, median

import numpy as np
from numpy.typing import NDArray

from hyperfitting.errors import UserError
from hyperfitting.fields import above_zero, at_least, fraction, in_range
from hyperfitting.preference.analyze import study_folder
from hyperfitting.preference.items import JUDGMENTS_FILE, read_task
from hyperfitting.preference.judgments import read_judgments, validate

LEVEL = 0.05
"""Two-sided significance level."""
ITEM_CORRELATION, ANNOTATOR_CORRELATION, SECONDS = 0.2, 0.005, 40.0
"""Assumed where no study says better."""
_VOTES = (1, 2, 3, 5)


@dataclass(frozen=True)
class Variation:
    """How judgments correlate, and how long one takes."""

    item: float = ITEM_CORRELATION
    """Correlation of two judgments of one item."""
    annotator: float = ANNOTATOR_CORRELATION
    """Correlation of two judgments by one annotator about one system, beyond those about others."""
    seconds: float = SECONDS
    """For each judgment."""


@dataclass(frozen=True)
class Effect:
    """Two shares to be told apart, and how surely."""

    low: float = 0.34
    high: float = 0.38
    power: float = 0.8

    @property
    def tolerated_variance(self) -> float:
        """Variance of the difference at which a z-test has the power."""
        normal = NormalDist()
        z = normal.inv_cdf(1 - LEVEL / 2) + normal.inv_cdf(self.power)
        return ((self.high - self.low) / z) ** 2

    @property
    def variance(self) -> float:
        """Variance of the difference of one judgment each."""
        return self.low * (1 - self.low) + self.high * (1 - self.high)


def items_needed(effect: Effect, variation: Variation, votes: int, annotators: int) -> int | None:
    """Return the items of each system that tell two shares apart; None: no number does.

    Args:
        effect: the shares, and the power.
        variation: of the judgments.
        votes: annotators for each item.
        annotators: in all; each judges as many items of both systems.
    """
    floor = effect.variance * variation.annotator / annotators  # is left with any number of items
    if floor >= effect.tolerated_variance:
        return None
    per_judgment = effect.variance * (1 + (votes - 1) * variation.item - variation.annotator)
    return ceil(per_judgment / (votes * (effect.tolerated_variance - floor)))


def annotators_needed(effect: Effect, variation: Variation) -> int:
    """Return the number of annotators below which no number of items is enough."""
    return int(effect.variance * variation.annotator / effect.tolerated_variance) + 1


def observed_variation(
    liked: Sequence[bool],
    items: Sequence[Hashable],
    annotators: Sequence[Hashable],
    systems: Sequence[Hashable],
    seconds: float,
) -> Variation:
    """Return the correlations in judgments, by moments; negative ones count as 0.

    Args:
        liked: whether each judgment prefers the system or finds both equally good.
        items: the item of each judgment.
        annotators: the annotator of each.
        systems: the system of each.
        seconds: for each judgment.
    """
    values = np.asarray(liked, dtype=np.float64)
    system, item, annotator = (_codes(names) for names in (systems, items, annotators))
    shares = np.bincount(system, weights=values) / np.bincount(system)
    spread = np.sqrt(np.maximum(shares * (1 - shares), 1e-12))
    residuals = (values - shares[system]) / spread[system]
    by_system = _codes(list(zip(annotator.tolist(), system.tolist(), strict=True)))
    own, n_own = _pair_products(residuals, by_system)
    every, n_every = _pair_products(residuals, annotator)
    of_items, n_items = _pair_products(residuals, item)
    across = (every - own) / (n_every - n_own) if n_every > n_own else 0.0
    same = own / n_own if n_own else 0.0
    return Variation(
        item=max(of_items / n_items, 0.0) if n_items else 0.0,
        annotator=max(same - across, 0.0),
        seconds=seconds,
    )


def _codes(names: Sequence[Hashable]) -> NDArray[np.intp]:
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([index[name] for name in names], dtype=np.intp)


def _pair_products(residuals: NDArray[np.float64], codes: NDArray[np.intp]) -> tuple[float, float]:
    """Return the sum of products over ordered pairs within clusters, and the number of pairs."""
    sums = np.bincount(codes, weights=residuals)
    squares = np.bincount(codes, weights=residuals**2)
    sizes = np.bincount(codes)
    return float((sums**2 - squares).sum()), float((sizes**2 - sizes).sum())


def read_variation(path: Path) -> Variation:
    """Return the variation in the judgments of people, or of scripts, in a study.

    Raises:
        UserError: there is no study, or it has no judgments.
    """
    folder = study_folder(path)
    task = read_task(folder)
    accepted, _ = validate(task, read_judgments(folder / JUDGMENTS_FILE))
    pairs = [(task.item(judgment.item), judgment) for judgment in accepted]
    judged = [(i, j) for i, j in pairs if i and i.kind == "normal" and not j.is_model]
    if not judged:
        raise UserError("has no judgments", field="--study", value=folder)
    seconds = [judgment.seconds for _, judgment in judged if judgment.seconds]
    return observed_variation(
        [judgment.choice != "second" for _, judgment in judged],
        [item.id for item, _ in judged],
        [judgment.annotator for _, judgment in judged],
        [(item.first.origin.run, item.first.origin.side, item.length) for item, _ in judged],
        median(seconds) if seconds else SECONDS,
    )


def _run(arguments: argparse.Namespace) -> None:
    for name in ("low", "high", "power"):
        fraction(f"--{name}", getattr(arguments, name))
    at_least("--annotators", arguments.annotators, 1)
    above_zero("--pay", arguments.pay)
    if arguments.low >= arguments.high:
        raise UserError(
            "is not below --high", field="--low", value=arguments.low, valid=f"< {arguments.high}"
        )
    effect = Effect(arguments.low, arguments.high, arguments.power)
    seen = read_variation(arguments.study) if arguments.study else Variation()
    variation = Variation(
        seen.item if arguments.item_correlation is None else arguments.item_correlation,
        seen.annotator
        if arguments.annotator_correlation is None
        else arguments.annotator_correlation,
        seen.seconds if arguments.seconds is None else arguments.seconds,
    )
    for name in ("item", "annotator"):
        in_range(f"--{name}-correlation", getattr(variation, name), 0, 1)
    above_zero("--seconds", variation.seconds)
    origin = f"of {arguments.study}" if arguments.study else "assumed"
    print(
        f"to tell {effect.low:.1%} from {effect.high:.1%} with {effect.power:.0%} power, by "
        f"{arguments.annotators} annotators\n({origin}: correlation within an item "
        f"{variation.item:.3f}, within an annotator {variation.annotator:.4f}, "
        f"{variation.seconds:.0f} s per judgment)\n"
    )
    needed = annotators_needed(effect, variation)
    if arguments.annotators < needed:
        print(f"no number of items is enough: {needed} annotators or more are")
        return
    _print_table(effect, variation, arguments.annotators, arguments.pay)


def _print_table(effect: Effect, variation: Variation, annotators: int, pay: float) -> None:
    """Print what two systems cost, by the number of votes for each item."""
    print("votes  items per system  judgments in all  hours in all     cost")
    for votes in (votes for votes in _VOTES if votes <= annotators):
        items = items_needed(effect, variation, votes, annotators)
        if items is not None:
            judgments = 2 * votes * items
            hours = judgments * variation.seconds / 3600
            print(
                f"{votes:>5}  {items:>16,}  {judgments:>16,}  {hours:>12,.0f}  {hours * pay:>7,.0f}"
            )


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `plan`."""
    parser = commands.add_parser("plan", help="how many judgments a difference needs")
    parser.add_argument("--low", type=float, default=0.34, help="one share (%(default)s)")
    parser.add_argument("--high", type=float, default=0.38, help="the other (%(default)s)")
    parser.add_argument("--power", type=float, default=0.8, help="(%(default)s)")
    parser.add_argument("--annotators", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--pay", type=float, default=10.0, help="for an hour (%(default)s)")
    parser.add_argument("--study", type=Path, help="take correlations and times from its judgments")
    parser.add_argument(
        "--item-correlation", type=float, help=f"within an item ({ITEM_CORRELATION})"
    )
    parser.add_argument(
        "--annotator-correlation",
        type=float,
        help=f"within an annotator's judgments of a system ({ANNOTATOR_CORRELATION})",
    )
    parser.add_argument("--seconds", type=float, help=f"for a judgment ({SECONDS:.0f})")
    parser.set_defaults(run=_run)
