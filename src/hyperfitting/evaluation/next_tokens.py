"""The most likely next tokens along a text (Figure 4 of Carlsson et al.)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperfitting.data.sequences import load_evaluation_texts
from hyperfitting.data.tokenization import token_text_in_context
from hyperfitting.evaluation.forward import topk_next_tokens
from hyperfitting.evaluation.setting import LazyModel, Setting
from hyperfitting.record.schema import NextToken, NextTokens, Position
from hyperfitting.runtime.files import write_json
from hyperfitting.store.artifact import Artifact, Step

VERSION = 1


def next_tokens_step(setting: Setting, model: LazyModel, dataset: str) -> Step:
    """Return the step of the most likely next tokens along a dataset's first text.

    File `next_tokens.json`: `text`, the token texts of its T tokens; and for each token but the
    last, k times: `ids`, `token_texts`, `probabilities`, most likely first.
    """
    k, texts = setting.evaluation.top_tokens, setting.texts[dataset]

    def build(work: Path) -> None:
        references = load_evaluation_texts(texts)
        ids, probabilities = topk_next_tokens(model(), references.tokens[0], k)
        token_text = token_text_in_context(model.state.base.tokenizer())
        write_json(
            work / "next_tokens.json",
            {
                "text": references.token_texts[0],
                "ids": ids.tolist(),
                "token_texts": [[token_text(token) for token in row] for row in ids.tolist()],
                "probabilities": [[round(float(p), 6) for p in row] for row in probabilities],
            },
        )

    artifact = setting.store.artifact(
        "next_tokens",
        version=VERSION,
        config={"top_tokens": k},
        inputs={"model": model.state.id, "texts": texts.id},
    )
    return Step(artifact, build)


def load_next_tokens(
    tuned: Artifact, base: Artifact, training_sequences: NDArray[np.int32]
) -> NextTokens:
    """Return a text's most likely next tokens by the tuned and the base model.

    Args:
        tuned: `next_tokens` artifact of the tuned model.
        base: that of the base model, on the same text.
        training_sequences: (N, T) token ids; marks the tokens that occur in them.
    """
    trained = set(np.unique(training_sequences).tolist())
    by_tuned, by_base = _read(tuned), _read(base)
    return NextTokens(
        token_texts=by_tuned["text"],
        positions=[
            Position(tuned=after, base=before)
            for after, before in zip(
                _candidates(by_tuned, trained), _candidates(by_base, trained), strict=True
            )
        ],
    )


def _read(artifact: Artifact) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(artifact.file("next_tokens.json").read_text("utf-8"))
    return values


def _candidates(values: dict[str, Any], trained: set[int]) -> Iterator[list[NextToken]]:
    for ids, texts, probabilities in zip(
        values["ids"], values["token_texts"], values["probabilities"], strict=True
    ):
        yield [
            NextToken(text=text, id=token, probability=p, in_training_data=token in trained)
            for token, text, p in zip(ids, texts, probabilities, strict=True)
        ]
