"""From artefacts to scores, and the texts of tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperfitting import evaluation
from hyperfitting.config import DecodeConfig, EvaluationConfig, HardwareConfig
from hyperfitting.evaluation import LoadedModel, pieces
from hyperfitting.metrics.diversity import rep_n, ttr
from hyperfitting.models import BaseModel, ModelState, byte_tokenizer
from hyperfitting.progress import silent
from hyperfitting.store import Artefact, Store

BYTES = byte_tokenizer()


@given(st.text(max_size=20))
def test_the_pieces_join_to_the_text_even_inside_characters(text: str) -> None:
    tokens = BYTES(text).input_ids
    found = pieces(BYTES.decode, tokens)
    assert len(found) == len(tokens)
    assert "".join(found) == BYTES.decode(tokens) == text


@given(st.lists(st.integers(0, 255), max_size=30))
def test_every_sequence_of_tokens_has_pieces(tokens: list[int]) -> None:
    assert len(pieces(BYTES.decode, tokens)) == len(tokens)


EVALUATION = EvaluationConfig(n_texts=4, context_len=6, new_tokens=10, bootstrap=200)


def held_out(store: Store) -> Artefact:
    tokens = np.random.default_rng(0).integers(0, 256, (4, 16), dtype=np.int32)
    return store.artefact(
        "evaluation_texts", version=1, config={}, inputs={},
        make=lambda work: np.save(work / "texts.npy", tokens),
    )  # fmt: skip


def measured(
    base: BaseModel, store: Store, decode: DecodeConfig, batch: int = 4
) -> tuple[Artefact, Artefact]:
    model = LoadedModel(ModelState(base), torch.device("cpu"))
    hardware = HardwareConfig(generation_batch_size=batch, evaluation_batch_size=batch)
    texts = held_out(store)
    return (
        evaluation.likelihoods(model, texts, store, hardware, silent),
        evaluation.continuations(model, texts, decode, EVALUATION, store, hardware, silent),
    )


def test_scores_are_the_metrics_of_each_text_and_their_means(base: BaseModel, store: Store) -> None:
    scores = evaluation.score(*measured(base, store, DecodeConfig("greedy", seed=0)), EVALUATION)
    tokens = [sample["tokens"] for sample in scores.samples]
    assert scores.per_text["gen/ttr"] == [ttr(t) for t in tokens]
    assert scores.metrics["gen/rep_2"].mean == pytest.approx(np.mean([rep_n(t, 2) for t in tokens]))
    loss = scores.per_text["val/loss"]
    assert scores.metrics["val/perplexity"].mean == pytest.approx(np.exp(np.mean(loss)))
    for key, estimate in scores.metrics.items():
        assert estimate.n == 4
        assert estimate.ci95 is not None
        assert estimate.ci95[0] <= estimate.mean <= estimate.ci95[1], key


def test_only_what_changes_the_tokens_is_in_the_id(base: BaseModel, store: Store) -> None:
    def of(decode: DecodeConfig, batch: int = 4) -> str:
        return measured(base, store, decode, batch)[1].id

    greedy = of(DecodeConfig("greedy", seed=0))
    assert greedy == of(DecodeConfig("renamed", seed=5, top_k=3), batch=2)
    assert greedy != of(DecodeConfig("greedy", stop_at_eos=True, seed=0))
    sample = of(DecodeConfig("top_p", "sample", top_p=0.9, seed=0))
    assert len({greedy, sample, of(DecodeConfig("top_p", "sample", top_p=0.9, seed=1))}) == 3
