"""The tuned model's choices beside the base model's at the same positions: ranks and classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperfitting.evaluation.scoring import Comparison
from hyperfitting.mechanism.ranks import TokenShift
from hyperfitting.mechanism.resampling import Resampling
from hyperfitting.mechanism.summaries import step_means
from hyperfitting.mechanism.token_class import choice_classes, token_classes
from hyperfitting.metrics.estimate import Estimate
from hyperfitting.metrics.mechanism import TOKEN_CLASSES
from hyperfitting.record.mechanism import ClassShift, RankShift, TokenChange

RANK_EDGES = [2, 3, 6, 11, 31, 101, 1001]
"""Lowest rank of each bin of the changed choices."""
_LISTED = 20
"""Tokens that gain, and tokens that lose, in the record."""

TokenText = Callable[[int], str]


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
            for model, ids in enumerate((shift.base_choice[row, :n].tolist(), text.tokens)):
                by_choice = choice_classes(list(map(token_text, ids)), token_texts)
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

    def ranks(self, resamples: int) -> RankShift:
        """Return the distribution of the ranks, and which classes and tokens gain and lose."""
        by_class = self.estimates(resamples)
        total = max(int(self._present.sum()), 1)
        counts = np.histogram(self._rank[self._changed], [*RANK_EDGES, np.inf])[0]
        return RankShift(
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
