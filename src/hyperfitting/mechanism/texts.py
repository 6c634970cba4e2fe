"""The texts that both models are compared on: references or generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hyperfitting.data.sequences import EvaluationTexts, load_evaluation_texts
from hyperfitting.evaluation.arrays import append_continuations, load_continuations
from hyperfitting.evaluation.contamination import contaminated, training_texts
from hyperfitting.evaluation.setting import LazyModel, Setting
from hyperfitting.record.schema import Side
from hyperfitting.store.artifact import Artifact


@dataclass(frozen=True)
class Texts:
    """N token sequences of all evaluation datasets, those that are scored."""

    tokens: NDArray[np.int32]
    """(N, T) token ids, zeros past the end of a text."""
    lengths: NDArray[np.int64]
    """(N,) tokens of each."""
    token_texts: list[list[str]]
    """Texts of the tokens of each, as many as its length."""
    datasets: list[str]
    """(N) evaluation dataset of each."""

    def first(self, n: int) -> Texts:
        """Return the first ``n`` texts of each dataset."""
        seen: dict[str, int] = {}
        rows = []
        for row, dataset in enumerate(self.datasets):
            seen[dataset] = seen.get(dataset, 0) + 1
            if seen[dataset] <= n:
                rows.append(row)
        return Texts(
            self.tokens[rows],
            self.lengths[rows],
            [self.token_texts[row] for row in rows],
            [self.datasets[row] for row in rows],
        )


@dataclass(frozen=True)
class TextSource:
    """Where texts come from; they are read when a step is built."""

    setting: Setting
    base: LazyModel
    side: Side
    """`reference`: the evaluation texts; else contexts with that model's continuations."""
    continuations: Mapping[str, Artifact]
    """Of that model, by dataset; of `reference`: empty."""

    @property
    def inputs(self) -> dict[str, str]:
        """The ids of what the texts are read from."""
        ids = {f"texts/{name}": artifact.id for name, artifact in self.setting.texts.items()}
        ids |= {f"continuations/{n}": artifact.id for n, artifact in self.continuations.items()}
        ids["sequences"] = self.setting.sequences.id
        others = enumerate(self.setting.other_sequences)
        return ids | {f"other_sequences/{n}": artifact.id for n, artifact in others}

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        evaluation = self.setting.evaluation
        return evaluation.reference_len if self.side == "reference" else evaluation.total_len

    def load(self) -> Texts:
        """Return the texts, without those that the training sequences contain.

        Raises:
            DamagedArtifactError: one of the artifacts is damaged or not built.
        """
        references = {n: load_evaluation_texts(a) for n, a in self.setting.texts.items()}
        decode = self.base.state.base.tokenizer().decode
        left_out = contaminated(references, training_texts(self.setting.trained_on, decode))
        parts = [
            self._part(name, texts, np.flatnonzero(~left_out[name]))
            for name, texts in references.items()
        ]
        return Texts(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            [texts for part in parts for texts in part.token_texts],
            [name for part in parts for name in part.datasets],
        )

    def _part(self, name: str, references: EvaluationTexts, rows: NDArray[np.int64]) -> Texts:
        tokens, token_texts = references.tokens, references.token_texts
        if self.side != "reference":
            start = self.setting.evaluation.context_len
            samples = load_continuations(self.continuations[name])
            tokens = append_continuations(
                tokens[:, :start], [sample["tokens"] for sample in samples], self.length
            )
            token_texts = [
                context[:start] + sample["token_texts"]
                for context, sample in zip(token_texts, samples, strict=True)
            ]
        kept = [token_texts[row] for row in rows]
        lengths = np.array([len(texts) for texts in kept], np.int64)
        return Texts(tokens[rows], lengths, kept, [name] * len(rows))
