"""Decoding strategies and sampling, against transformers' `generate` and its logits processors."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hyperfitting.decoding import sampling
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.constraints import Constraints
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.decoding.sampling import inverse_cdf, sample_tokens
from hyperfitting.errors import UserError
from hyperfitting.evaluation.forward import compute_token_stats, last_hidden_states
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load
from tests.conftest import tiny_model

GREEDY = DecodeConfig(name="greedy", seed=0)


def contexts(
    n: int, length: int, vocab_size: int = 256
) -> "np.ndarray[tuple[int, int], np.dtype[np.int32]]":
    return np.random.default_rng(0).integers(0, vocab_size, (n, length), dtype=np.int32)


def by_generate(
    model: PreTrainedModel, prompts: np.ndarray, max_new_tokens: int, **options: object
) -> list[list[int]]:
    input_ids = torch.as_tensor(prompts, dtype=torch.long)
    output_ids = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return [row[prompts.shape[1] :].tolist() for row in output_ids]


def test_greedy_matches_generate(any_base: BaseModel) -> None:
    model = load(any_base).eval()
    start = contexts(5, 7)
    expected = by_generate(model, start, 24)
    assert len({token for row in expected for token in row}) > 5  # or the test could not fail
    for batch_size in (1, 2, 8):
        assert continue_texts(model, start, 24, GREEDY, batch_size).tokens == expected


def test_eos_is_forbidden_or_ends_the_text(tmp_path: Path) -> None:
    start = contexts(6, 5)
    model = load(tiny_model(tmp_path / "a", "llama")).eval()
    unconstrained = continue_texts(model, start, 24, GREEDY, 8).tokens
    eos = unconstrained[0][5]  # a token that occurs
    model.generation_config.eos_token_id = eos
    assert continue_texts(model, start, 24, GREEDY, 8).tokens == by_generate(
        model, start, 24, min_new_tokens=24
    )
    stopping = DecodeConfig("greedy", stop_at_eos=True, seed=0)
    continuations = continue_texts(model, start, 24, stopping, 8)
    assert continuations.tokens == [
        row[: row.index(eos)] if eos in row else row for row in unconstrained
    ]
    for row, entropy in zip(continuations.tokens, continuations.stats["entropy"], strict=True):
        assert not np.isnan(entropy[: len(row)]).any()
        assert np.isnan(entropy[len(row) :]).all()


@pytest.mark.parametrize(
    ("decode", "options"),
    [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
        ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}),
        ({"strategy": "beam", "num_beams": 4}, {"num_beams": 4}),
        (
            {
                "strategy": "beam",
                "num_beams": 3,
                "no_repeat_ngram_size": 2,
                "repetition_penalty": 1.2,
            },
            {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
        ),
    ],
)
def test_constraints_and_beam_search_match_generate(
    any_base: BaseModel, decode: dict[str, Any], options: dict[str, Any]
) -> None:
    model = load(any_base).eval()
    start = contexts(3, 6)
    expected = by_generate(model, start, 40, **options)
    for batch_size in (2, 3):
        cfg = DecodeConfig("x", **decode, seed=0)
        assert continue_texts(model, start, 40, cfg, batch_size).tokens == expected
    if decode != {"no_repeat_ngram_size": 2}:  # some of these models never repeat a 2-gram
        assert expected != by_generate(model, start, 40)


@given(st.integers(0, 10_000), st.floats(0.5, 2.0), st.none() | st.integers(1, 5))
def test_constraints_are_bit_identical_to_logits_processors(
    seed: int, penalty: float, ngram_size: int | None
) -> None:
    rng = np.random.default_rng(seed)
    input_ids = torch.as_tensor(rng.integers(0, 6, (4, 20)))
    scores = torch.as_tensor(rng.normal(0, 2, (4, 40)), dtype=torch.float32)
    processors = LogitsProcessorList()
    if penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    if ngram_size is not None:
        processors.append(NoRepeatNGramLogitsProcessor(ngram_size))
    expected = processors(input_ids, scores)
    decode = DecodeConfig(
        "x", repetition_penalty=penalty, no_repeat_ngram_size=ngram_size, stop_at_eos=True, seed=0
    )
    unchanged = scores.clone()
    assert torch.equal(Constraints(decode, [], context_len=5)(input_ids, scores), expected)
    assert torch.equal(scores, unchanged)


def test_beam_search_texts_are_at_least_as_likely_as_greedy_ones(base: BaseModel) -> None:
    model, start = load(base).eval(), contexts(6, 5)
    beam = DecodeConfig("beam", "beam", num_beams=5, seed=0)
    greedy_loss = continue_texts(model, start, 12, GREEDY, 6).stats["loss"].sum(axis=1)
    beam_loss = continue_texts(model, start, 12, beam, 6).stats["loss"].sum(axis=1)
    assert beam_loss.sum() < greedy_loss.sum()


def test_beam_search_with_eos_matches_exhaustive_search(tmp_path: Path) -> None:
    """With a beam as wide as the number of possible texts, beam search is exhaustive."""
    base = tiny_model(tmp_path / "small", "llama", vocab_size=4, eos_token_id=2)
    model = load(base).eval()
    start = np.array([[0, 1], [3, 3], [1, 0]], dtype=np.int32)
    decode = DecodeConfig("beam", "beam", num_beams=64, stop_at_eos=True, seed=0)
    continuations = continue_texts(model, start, 3, decode, 3)
    for context, tokens in zip(start, continuations.tokens, strict=True):
        mean_log_p: dict[tuple[int, ...], float] = {}
        for text in itertools.product(range(4), repeat=3):
            cut = text[: text.index(2) + 1] if 2 in text else text
            ids = torch.tensor([[*context, *cut]])
            log_p = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
            steps = [log_p[len(context) - 1 + i, token].item() for i, token in enumerate(cut)]
            mean_log_p[cut] = sum(steps) / len(cut)
        best = max(mean_log_p, key=lambda cut: mean_log_p[cut])
        assert tokens == [token for token in best if token != 2]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6, 1.0])
def test_contrastive_search_matches_its_definition_without_a_cache(
    any_base: BaseModel, alpha: float
) -> None:
    model, start = load(any_base).eval(), contexts(3, 6)
    decode = DecodeConfig("contrastive", "contrastive", top_k=4, penalty_alpha=alpha, seed=0)
    continuations = continue_texts(model, start, 10, decode, 2).tokens
    for context, tokens in zip(start.tolist(), continuations, strict=True):
        text = list(context)
        for token in tokens:
            p = torch.softmax(model(input_ids=torch.tensor([text])).logits[0, -1].float(), -1)
            objective = {}
            for candidate in p.topk(4).indices.tolist():
                ids = torch.tensor([[*text, candidate]])
                states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
                similarity = torch.cosine_similarity(states[-1:], states[:-1], dim=-1).max()
                objective[candidate] = ((1 - alpha) * p[candidate] - alpha * similarity).item()
            assert objective[token] == pytest.approx(max(objective.values()), abs=1e-5)
            text.append(token)


SAMPLING_FIELDS = [
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"top_k": 20},
    {"temperature": 0.7},
    {"min_p": 0.1},
    {"typical_p": 0.9},
]


@pytest.mark.parametrize("fields", SAMPLING_FIELDS)
def test_draws_depend_on_seed_and_context_not_on_the_batch(
    base: BaseModel, fields: dict[str, Any]
) -> None:
    model = load(base).eval()
    start = contexts(7, 6)

    def sampled(order: slice, batch_size: int, seed: int = 3) -> list[list[int]]:
        decode = DecodeConfig("x", "sample", **fields, seed=seed)
        return continue_texts(model, start[order].copy(), 12, decode, batch_size).tokens

    one_batch = sampled(slice(None), 7)
    assert sampled(slice(None), 2) == sampled(slice(None), 7) == one_batch
    assert sampled(slice(None, None, -1), 3) == one_batch[::-1]
    assert sampled(slice(4, 6), 1) == one_batch[4:6]
    assert sampled(slice(None), 7, seed=4) != one_batch


def test_a_shorter_continuation_is_a_prefix_of_a_longer_one(any_base: BaseModel) -> None:
    model, start = load(any_base).eval(), contexts(4, 6)
    for decode in (GREEDY, DecodeConfig("x", "sample", **SAMPLING_FIELDS[0], seed=0)):
        long = continue_texts(model, start, 30, decode, 4).tokens
        assert continue_texts(model, start, 13, decode, 4).tokens == [row[:13] for row in long]


@pytest.fixture(params=[4, 1024], ids=["full sort", "partial sort"])
def partial_sort(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_PARTIAL_SORT", request.param)


@pytest.mark.usefixtures("partial_sort")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 10_000),
    st.floats(0.2, 3.0),
    st.none() | st.integers(1, 60),
    st.floats(0.05, 1.0),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.sampled_from([1.0, 0.9, 0.4]),
)
def test_sampling_distribution_matches_logits_warpers(
    seed: int, temperature: float, top_k: int | None, top_p: float, min_p: float, typical_p: float
) -> None:
    logits = torch.as_tensor(np.random.default_rng(seed).normal(0, 2, (3, 40)), dtype=torch.float64)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(min_p))
    if typical_p < 1:
        warpers.append(TypicalLogitsWarper(typical_p))
    expected = torch.softmax(warpers(torch.zeros(3, 1, dtype=torch.long), logits), -1)
    decode = DecodeConfig(
        "x", "sample", temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        typical_p=typical_p, seed=0,
    )  # fmt: skip
    # draws at 400 evenly spaced u recover the probabilities
    n = 400
    u = (torch.arange(n) + 0.5) / n
    for row in range(3):
        tokens = sample_tokens(logits[row].expand(n, -1), decode, u)
        frequencies = torch.bincount(tokens, minlength=40) / n
        assert not frequencies[expected[row] == 0].any()
        torch.testing.assert_close(frequencies, expected[row].float(), atol=1.01 / n, rtol=0)


def test_inverse_cdf_draws_have_the_given_distribution() -> None:
    p = torch.tensor([0.5, 0.0, 0.25, 0.15, 0.1, 0.0])
    n = 20_000
    u = torch.as_tensor(np.random.default_rng(0).random(n))
    counts = torch.bincount(inverse_cdf(p.expand(n, -1), u), minlength=6).numpy()
    assert counts[1] == counts[5] == 0
    possible = p.numpy() > 0
    expected = n * p.numpy()[possible] / p.sum().item()
    assert stats.chisquare(counts[possible], expected).pvalue > 1e-3


def test_inverse_cdf_accepts_both_ends_of_the_unit_interval() -> None:
    p = torch.tensor([[0.0, 0.9, 0.1, 0.0]])
    assert inverse_cdf(p, torch.tensor([0.0])).item() == 1
    assert inverse_cdf(p, torch.tensor([1.0])).item() == 2


@pytest.mark.parametrize(
    "decode",
    [
        GREEDY,
        DecodeConfig("x", "sample", top_p=0.9, seed=0),
        DecodeConfig("x", "beam", num_beams=3, seed=0),
        DecodeConfig("x", "contrastive", top_k=3, penalty_alpha=0.6, seed=0),
        DecodeConfig("x", "greedy", repetition_penalty=1.3, no_repeat_ngram_size=2, seed=0),
    ],
)
def test_step_stats_match_those_of_a_forward_pass_over_the_whole_text(
    any_base: BaseModel, decode: DecodeConfig
) -> None:
    model, start = load(any_base).eval(), contexts(5, 6)
    continuations = continue_texts(model, start, 12, decode, 3)
    step_stats = continuations.stats
    texts = np.concatenate([start, np.array(continuations.tokens, dtype=np.int32)], axis=1)
    expected = compute_token_stats(model, texts, batch_size=5)
    for name in ("loss", "entropy", "top1_mass"):
        np.testing.assert_allclose(step_stats[name], expected[name][:, 5:], rtol=1e-3, atol=1e-4)
    same_rank = step_stats["rank"] == expected["rank"][:, 5:]
    assert same_rank.mean() > 0.95  # near ties may flip


def test_an_error_is_raised_if_every_token_is_forbidden(tmp_path: Path) -> None:
    model = load(tiny_model(tmp_path / "small", "llama", vocab_size=4)).eval()
    start = np.array([[0, 1]], dtype=np.int32)
    for fields in (
        {"strategy": "greedy"},
        {"strategy": "sample"},
        {"strategy": "sample", "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9},
        {"strategy": "sample", "top_k": 3},
        {"strategy": "beam", "num_beams": 3},
        {"strategy": "contrastive", "top_k": 3, "penalty_alpha": 0.6},
    ):
        decode = DecodeConfig("x", no_repeat_ngram_size=1, **fields, seed=0)
        with pytest.raises(UserError, match="every token is forbidden after 2 new ones"):
            continue_texts(model, start, 5, decode, 1)
    with pytest.raises(ValueError, match="these have none"):
        continue_texts(model, start[:, :0], 5, decode, 1)


def test_an_error_is_raised_if_logits_are_nan(base: BaseModel) -> None:
    model = load(base).eval()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="NaN at new token 1"):
        continue_texts(model, contexts(2, 4), 3, GREEDY, 2)


def test_token_losses_match_the_models_own_loss(any_base: BaseModel) -> None:
    model = load(any_base).eval()
    texts = contexts(5, 16)
    token_stats = compute_token_stats(model, texts, batch_size=2)
    for row, loss in zip(texts, token_stats["loss"], strict=True):
        ids = torch.as_tensor(row[None], dtype=torch.long)
        assert loss.mean() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    np.testing.assert_allclose(
        compute_token_stats(model, texts, batch_size=5)["entropy"],
        token_stats["entropy"],
        rtol=1e-5,
    )


def test_last_hidden_states_do_not_depend_on_the_batch(any_base: BaseModel) -> None:
    model = load(any_base).eval()
    texts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    states = last_hidden_states(model, texts, batch_size=2)
    for text, state in zip(texts, states, strict=True):
        ids = torch.tensor([text])
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        np.testing.assert_allclose(state, expected.detach(), rtol=1e-4, atol=1e-5)
