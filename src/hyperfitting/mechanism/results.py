"""From the artifacts of the measures to the record's `mechanism`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperfitting.evaluation.scoring import Comparison
from hyperfitting.mechanism.artifacts import MechanismArtifacts
from hyperfitting.mechanism.geometry import load_geometry
from hyperfitting.mechanism.logit_lens import load_lens_choices
from hyperfitting.mechanism.loops import load_loop_steps
from hyperfitting.mechanism.ranks import TokenShift, load_token_shift
from hyperfitting.mechanism.resampling import Resampling
from hyperfitting.mechanism.summaries import (
    Curves,
    geometry_curves,
    geometry_estimates,
    lens_curves,
    loop_curves,
    step_mean,
    step_means,
    weight_curves,
    weight_estimates,
)
from hyperfitting.mechanism.token_class import choice_classes, token_classes
from hyperfitting.mechanism.weight_change import load_weight_changes
from hyperfitting.metrics.estimate import Estimate
from hyperfitting.metrics.mechanism import TOKEN_CLASSES
from hyperfitting.record.mechanism import ClassShift, Mechanism, Ranks, TokenChange

RANK_EDGES = [2, 3, 6, 11, 31, 101, 1001]
"""Lowest rank of each bin of the changed choices."""
_LISTED = 20
"""Tokens that gain, and tokens that lose, in the record."""

TokenText = Callable[[int], str]


def build_mechanism(
    artifacts: MechanismArtifacts, comparison: Comparison, token_text: TokenText, resamples: int
) -> Mechanism:
    """Return what the record holds of the measures.

    Args:
        artifacts: of the measures; built.
        comparison: the scores, whose texts are those of the measures.
        token_text: the text of a token id inside a text.
        resamples: bootstrap resamples of the texts.
    """
    estimates: dict[str, Estimate | None] = {}
    curves: Curves = {}
    per_step: dict[str, list[float | None]] = {}
    ranks = None
    for texts, step in artifacts.geometry.items():
        geometry = load_geometry(step.artifact)
        of_texts = geometry_curves(geometry, resamples)
        curves |= {f"{texts}/{name}": curve for name, curve in of_texts.items()}
        if texts == "reference":
            estimates |= geometry_estimates(of_texts, geometry.trace.shape[-1])
    for step in artifacts.ranks.values():
        choices = Choices(comparison, load_token_shift(step.artifact), token_text)
        ranks = choices.ranks(resamples)
        estimates |= choices.estimates(resamples)
        per_step["mech/changed"] = choices.changed_by_step()
    for step in artifacts.weights.values():
        changes = load_weight_changes(step.artifact)
        curves |= {f"weights/{name}": curve for name, curve in weight_curves(changes).items()}
        estimates |= weight_estimates(changes)
    for step in artifacts.lens.values():
        of_lens, means = lens_curves(load_lens_choices(step.artifact), resamples)
        curves |= {f"lens/{name}": curve for name, curve in of_lens.items()}
        estimates |= means
    for name, step in artifacts.loops.items():
        texts, model = name.split("/")
        steps = load_loop_steps(step.artifact)
        attention = loop_curves(steps, model, resamples)
        curves |= {f"loops/{texts}/{key}": curve for key, curve in attention.items()}
        for quantity, rows in (("loop_probability", steps.probability), ("margin", steps.margin)):
            key = f"mech/{quantity}_{texts}_{model}"
            estimates[key] = step_mean(rows, resamples)
            per_step[key] = step_means(rows)
    return Mechanism(
        estimates={key: value for key, value in estimates.items() if value is not None},
        per_layer=curves,
        per_step=per_step,
        ranks=ranks,
    )


class Choices:
    """The tuned model's choices along its continuations, and the base model's there.

    Args:
        comparison: has the continuations, and their ranks under the base model.
        shift: the base model's own choices, and the change of every token.
        token_text: the text of a token id inside a text.
    """

    def __init__(self, comparison: Comparison, shift: TokenShift, token_text: TokenText) -> None:
        output = comparison.tuned.output
        self._shift, self._token_text = shift, token_text
        self._rank: NDArray[Any] = output.base_loglikelihoods["rank"]  # (N, T), NaN past the end
        self._tokens = np.full(self._rank.shape, -1, np.int64)
        classes = list(TOKEN_CLASSES)
        self._class = np.full(self._rank.shape, -1)  # of the tuned model's, within the text
        self._choice_class = np.full((2, *self._rank.shape), -1)  # of the base's and the tuned's
        for row, (context, text) in enumerate(
            zip(comparison.contexts, output.continuations, strict=True)
        ):
            n = len(text.tokens)
            self._tokens[row, :n] = text.tokens
            token_texts = context.token_texts + text.token_texts
            by_text = token_classes(token_texts)[len(context.token_texts) :]
            self._class[row, :n] = list(map(classes.index, by_text))
            for model, tokens in enumerate((shift.base_choice, self._tokens)):
                choices = [token_text(token) for token in tokens[row, :n].tolist()]
                by_choice = choice_classes(choices, token_texts)
                self._choice_class[model, row, :n] = list(map(classes.index, by_choice))
        self._present = ~np.isnan(self._rank)
        self._changed = self._present & (self._rank > 1)

    def changed_by_step(self) -> list[float | None]:
        """Return at each new token the share of choices that are not the base model's."""
        return step_means(np.where(self._present, self._changed, np.nan))

    def estimates(self, resamples: int) -> dict[str, Estimate | None]:
        """Return the metrics of the ranks, and of each class of tokens."""
        resampling = Resampling(len(self._rank), resamples)
        changed = self._changed.sum(1)
        estimates = {
            f"mech/changed_over_{k}": resampling.ratio(
                (self._present & (self._rank > k)).sum(1), changed
            )
            for k in (10, 100)
        }
        n_texts = int(self._present.any(1).sum())
        if n_texts:
            highest = float(np.nanmax(self._rank))
            estimates["mech/changed_max_rank"] = Estimate(highest, None, n_texts)
        for index, name in enumerate(TOKEN_CLASSES):
            of_class = self._class == index
            estimates[f"mech/changed_{name}"] = resampling.ratio(
                (of_class & self._changed).sum(1), of_class.sum(1)
            )
        return estimates

    def ranks(self, resamples: int) -> Ranks:
        """Return the distribution of the ranks, and which classes and tokens gain and lose."""
        by_class = self.estimates(resamples)
        total = max(int(self._present.sum()), 1)
        counts = np.histogram(self._rank[self._changed], [*RANK_EDGES, np.inf])[0]
        return Ranks(
            edges=RANK_EDGES,
            counts=counts.tolist(),
            classes={
                name: ClassShift(
                    changed=by_class[f"mech/changed_{name}"],
                    tuned=float((self._choice_class[1] == index).sum() / total),
                    base=float((self._choice_class[0] == index).sum() / total),
                )
                for index, name in enumerate(TOKEN_CLASSES)
            },
            gained=self._token_changes(1),
            lost=self._token_changes(-1),
        )

    def _token_changes(self, sign: int) -> list[TokenChange]:
        """Return the tokens that gain (1) or lose (-1) most positions, most first."""
        tuned = Counter(self._tokens[self._present].tolist())
        base = Counter(self._shift.base_choice[self._present].tolist())
        gains = {token: sign * (tuned[token] - base[token]) for token in tuned | base}
        ordered = sorted(gains, key=lambda token: (-gains[token], token))
        return [
            TokenChange(
                text=self._token_text(token),
                id=token,
                tuned=tuned[token],
                base=base[token],
                logit_change=float(self._shift.logit_change[token]),
                rank_gain=float(self._shift.rank_gain[token]),
            )
            for token in ordered[:_LISTED]
            if gains[token] > 0
        ]
