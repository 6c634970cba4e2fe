"""ImageGPT: the losses and completions of transformers."""

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import ImageGPTForCausalImageModeling

from hyperfitting.decoding import generate
from hyperfitting.decoding.backends.cuda_graph import CudaGraphBackend
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.evaluation.forward import compute_token_stats
from hyperfitting.mechanism.static_bias import logit_means
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load
from hyperfitting.training.loss import NextTokenLoss
from tests.images import digit_sequences, imagegpt

__all__ = ["imagegpt"]


@pytest.mark.parametrize("prepend_sos", [True, False])
def test_the_loss_is_that_of_a_plain_loop(imagegpt: BaseModel, prepend_sos: bool) -> None:
    model = load(imagegpt).eval()
    sequences = digit_sequences(2, prepend_sos)
    expected = np.zeros((2, sequences.shape[1] - 1))
    with torch.no_grad():
        for n, sequence in enumerate(torch.tensor(sequences, dtype=torch.long)):
            for t in range(1, len(sequence)):
                logits = model(input_ids=sequence[None, :t]).logits[0, -1]
                expected[n, t - 1] = -torch.log_softmax(logits, -1)[sequence[t]]
        loss = NextTokenLoss(model)(torch.tensor(sequences, dtype=torch.long))
    assert float(loss) == pytest.approx(expected.sum(), rel=1e-5)
    losses = compute_token_stats(model, sequences, 2)["loss"]
    np.testing.assert_allclose(losses, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prepend_sos", [True, False])
def test_greedy_completions_are_those_of_transformers_generate(
    imagegpt: BaseModel, prepend_sos: bool
) -> None:
    model = load(imagegpt).eval()
    contexts = digit_sequences(5, prepend_sos)[:, : 16 + prepend_sos]
    decode = DecodeConfig(name="greedy", seed=0)
    continuations = continue_texts(model, contexts, 48, decode).tokens
    expected = model.generate(
        torch.tensor(contexts, dtype=torch.long), max_new_tokens=48, do_sample=False
    )
    assert len({tuple(tokens) for tokens in continuations}) > 1
    assert continuations == expected[:, contexts.shape[1] :].tolist()


def test_a_static_cache_gives_the_same_completions(
    imagegpt: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the CUDA graph, whose length ImageGPT's own mask takes for the number of tokens."""
    model = load(imagegpt)
    decode, backend = DecodeConfig("greedy", seed=0), CudaGraphBackend()
    contexts = digit_sequences(3)[:, :17]
    expected = continue_texts(model, contexts, 48, decode).tokens
    monkeypatch.setattr(generate, "select_backend", lambda *_: backend)
    assert continue_texts(model, contexts, 48, decode).tokens == expected
    model.config.is_decoder = False  # as in its config.json
    assert continue_texts(model, contexts, 48, decode).tokens != expected


def test_it_is_loaded_with_the_logits_of_transformers(imagegpt: BaseModel) -> None:
    tokens = torch.tensor(digit_sequences(3)[:, :64], dtype=torch.long)
    plain = ImageGPTForCausalImageModeling.from_pretrained(imagegpt.folder()).eval()
    with torch.no_grad():
        assert torch.equal(load(imagegpt).eval()(tokens).logits, plain(tokens).logits)


def test_a_repetition_penalty_ignores_sos_which_has_no_score(imagegpt: BaseModel) -> None:
    model = load(imagegpt).eval()
    contexts = digit_sequences(3)[:, :17]
    decode = DecodeConfig(name="penalty", seed=0, repetition_penalty=1.3)
    continuations = continue_texts(model, contexts, 4, decode).tokens
    for context, continuation in zip(contexts.tolist(), continuations, strict=True):
        tokens = list(context)
        for token in continuation:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([tokens])).logits[0, -1].numpy()
            for seen in set(tokens) - {17}:
                logits[seen] *= 1.3 if logits[seen] < 0 else 1 / 1.3
            assert token == logits.argmax()
            tokens.append(token)


def test_no_color_occurs_twice_although_sos_has_no_score(imagegpt: BaseModel) -> None:
    decode = DecodeConfig("greedy", no_repeat_ngram_size=1, seed=0)
    contexts = np.array([[17, 0, 1], [17, 2, 3]], np.int32)
    completions = continue_texts(load(imagegpt).eval(), contexts, 5, decode).tokens
    for context, tokens in zip(contexts.tolist(), completions, strict=True):
        assert len({*context, *tokens}) == 8


def test_mean_logits_leave_out_sos_which_has_none(imagegpt: BaseModel) -> None:
    model, sequences = load(imagegpt).eval(), digit_sequences(3)
    with torch.no_grad():
        inputs = torch.tensor(sequences[:, :-1], dtype=torch.long)
        logits = model(input_ids=inputs).logits.numpy()  # (3, 64, 17)
    means = logit_means(model, [sequences], batch_size=2)
    np.testing.assert_allclose(means.logits, logits.mean((0, 1)), rtol=1e-3, atol=1e-4)
    ranks = scipy.stats.rankdata(-logits, axis=-1, method="ordinal").mean((0, 1))
    np.testing.assert_allclose(means.rank, ranks, atol=0.02)  # rounding swaps near ties
