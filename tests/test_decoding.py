"""The decoding loop against transformers' `generate` and its samplers."""

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
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hyperfitting import models
from hyperfitting.config import DecodeConfig
from hyperfitting.decoding import sampling
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.decoding.likelihood import features, measure
from hyperfitting.decoding.sampling import inverse_cdf, sample
from hyperfitting.errors import UserError
from hyperfitting.models import BaseModel
from tests.conftest import tiny_model

GREEDY = DecodeConfig(name="greedy", seed=0)


def contexts(
    n: int, length: int, vocabulary: int = 256
) -> "np.ndarray[tuple[int, int], np.dtype[np.int32]]":
    return np.random.default_rng(0).integers(0, vocabulary, (n, length), dtype=np.int32)


def by_generate(
    model: PreTrainedModel, start: np.ndarray, new: int, **options: object
) -> list[list[int]]:
    given = torch.as_tensor(start, dtype=torch.long)
    made = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return [row[start.shape[1] :].tolist() for row in made]


def test_greedy_gives_the_tokens_of_generate(any_base: BaseModel) -> None:
    model = models.load(any_base).eval()
    start = contexts(5, 7)
    expected = by_generate(model, start, 24)
    assert len({token for row in expected for token in row}) > 5  # or the test could not fail
    for batch_size in (1, 2, 8):
        assert continue_texts(model, start, 24, GREEDY, batch_size).tokens == expected


def test_the_end_token_is_forbidden_or_ends_the_text(tmp_path: Path) -> None:
    start = contexts(6, 5)
    model = models.load(tiny_model(tmp_path / "a", "llama")).eval()
    free = continue_texts(model, start, 24, GREEDY, 8).tokens
    end = free[0][5]  # a token that does come
    model.generation_config.eos_token_id = end
    assert continue_texts(model, start, 24, GREEDY, 8).tokens == by_generate(
        model, start, 24, min_new_tokens=24
    )
    found = continue_texts(model, start, 24, DecodeConfig("greedy", stop_at_eos=True, seed=0), 8)
    assert found.tokens == [row[: row.index(end)] if end in row else row for row in free]
    for row, entropy in zip(found.tokens, found.measures["entropy"], strict=True):
        assert not np.isnan(entropy[: len(row)]).any()
        assert np.isnan(entropy[len(row) :]).all()


@pytest.mark.parametrize(
    ("decode", "options"),
    [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
        ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
        ({"no_repeat_ngram": 1}, {"no_repeat_ngram_size": 1}),
        ({"strategy": "beam", "num_beams": 4}, {"num_beams": 4}),
        (
            {"strategy": "beam", "num_beams": 3, "no_repeat_ngram": 2, "repetition_penalty": 1.2},
            {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
        ),
    ],
)
def test_constraints_and_beams_give_the_tokens_of_generate(
    any_base: BaseModel, decode: dict[str, Any], options: dict[str, Any]
) -> None:
    model = models.load(any_base).eval()
    start = contexts(3, 6)
    expected = by_generate(model, start, 40, **options)
    for batch_size in (2, 3):
        found = continue_texts(model, start, 40, DecodeConfig("x", **decode, seed=0), batch_size)
        assert found.tokens == expected
    if decode != {"no_repeat_ngram": 2}:  # some of these models repeat no 2-gram anyway
        assert expected != by_generate(model, start, 40)


def test_a_beam_finds_no_less_likely_texts_than_greedy(base: BaseModel) -> None:
    model, start = models.load(base).eval(), contexts(6, 5)
    beam = DecodeConfig("beam", "beam", num_beams=5, seed=0)
    greedy_loss = continue_texts(model, start, 12, GREEDY, 6).measures["loss"].sum(axis=1)
    beam_loss = continue_texts(model, start, 12, beam, 6).measures["loss"].sum(axis=1)
    assert beam_loss.sum() < greedy_loss.sum()


def test_a_beam_that_may_end_ends_as_the_best_full_search_does(tmp_path: Path) -> None:
    """With a beam as wide as there are texts, the search is exhaustive."""
    base = tiny_model(tmp_path / "small", "llama", vocab_size=4, eos_token_id=2)
    model = models.load(base).eval()
    start = np.array([[0, 1], [3, 3], [1, 0]], dtype=np.int32)
    decode = DecodeConfig("beam", "beam", num_beams=64, stop_at_eos=True, seed=0)
    found = continue_texts(model, start, 3, decode, 3)
    for context, tokens in zip(start, found.tokens, strict=True):
        worth: dict[tuple[int, ...], float] = {}
        for text in itertools.product(range(4), repeat=3):
            cut = text[: text.index(2) + 1] if 2 in text else text
            ids = torch.tensor([[*context, *cut]])
            log_p = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
            steps = [log_p[len(context) - 1 + i, token].item() for i, token in enumerate(cut)]
            worth[cut] = sum(steps) / len(cut)
        best = max(worth, key=lambda cut: worth[cut])
        assert tokens == [token for token in best if token != 2]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6, 1.0])
def test_contrastive_search_is_its_definition_without_a_cache(
    any_base: BaseModel, alpha: float
) -> None:
    model, start = models.load(any_base).eval(), contexts(3, 6)
    decode = DecodeConfig("contrastive", "contrastive", top_k=4, alpha=alpha, seed=0)
    found = continue_texts(model, start, 10, decode, 2).tokens
    for context, tokens in zip(start.tolist(), found, strict=True):
        text = list(context)
        for token in tokens:
            p = torch.softmax(model(input_ids=torch.tensor([text])).logits[0, -1].float(), -1)
            worth = {}
            for candidate in p.topk(4).indices.tolist():
                ids = torch.tensor([[*text, candidate]])
                states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
                likeness = torch.cosine_similarity(states[-1:], states[:-1], dim=-1).max()
                worth[candidate] = ((1 - alpha) * p[candidate] - alpha * likeness).item()
            assert worth[token] == pytest.approx(max(worth.values()), abs=1e-5)
            text.append(token)


SAMPLED = [
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"top_k": 20},
    {"temperature": 0.7},
    {"min_p": 0.1},
    {"typical_p": 0.9},
]


@pytest.mark.parametrize("fields", SAMPLED)
def test_a_draw_depends_on_seed_and_context_not_on_the_batch(
    base: BaseModel, fields: dict[str, Any]
) -> None:
    model = models.load(base).eval()
    start = contexts(7, 6)

    def made(order: slice, batch_size: int, seed: int = 3) -> list[list[int]]:
        decode = DecodeConfig("x", "sample", **fields, seed=seed)
        return continue_texts(model, start[order].copy(), 12, decode, batch_size).tokens

    together = made(slice(None), 7)
    assert made(slice(None), 2) == made(slice(None), 7) == together
    assert made(slice(None, None, -1), 3) == together[::-1]
    assert made(slice(4, 6), 1) == together[4:6]
    assert made(slice(None), 7, seed=4) != together


def test_the_shorter_continuation_is_a_prefix_of_the_longer(any_base: BaseModel) -> None:
    model, start = models.load(any_base).eval(), contexts(4, 6)
    for decode in (GREEDY, DecodeConfig("x", "sample", **SAMPLED[0], seed=0)):
        long = continue_texts(model, start, 30, decode, 4).tokens
        assert continue_texts(model, start, 13, decode, 4).tokens == [row[:13] for row in long]


@pytest.fixture(params=[4, 1024], ids=["sorts all", "looks at a few"])
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_FEW", request.param)


@pytest.mark.usefixtures("few")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 10_000),
    st.floats(0.2, 3.0),
    st.none() | st.integers(1, 60),
    st.floats(0.05, 1.0),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.sampled_from([1.0, 0.9, 0.4]),
)
def test_sampling_keeps_and_weighs_what_transformers_does(
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
    theirs = torch.softmax(warpers(torch.zeros(3, 1, dtype=torch.long), logits), -1)
    decode = DecodeConfig(
        "x", "sample", temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        typical_p=typical_p, seed=0,
    )  # fmt: skip
    # the distribution of a sampler is the inverse of its draws: drawn at 400 even places
    n = 400
    u = (torch.arange(n) + 0.5) / n
    for row in range(3):
        drawn = sample(logits[row].expand(n, -1), decode, u)
        ours = torch.bincount(drawn, minlength=40) / n
        assert not ours[theirs[row] == 0].any()
        torch.testing.assert_close(ours, theirs[row].float(), atol=1.01 / n, rtol=0)


def test_draws_have_the_distribution_they_are_drawn_from() -> None:
    p = torch.tensor([0.5, 0.0, 0.25, 0.15, 0.1, 0.0])
    n = 20_000
    u = torch.as_tensor(np.random.default_rng(0).random(n))
    counts = torch.bincount(inverse_cdf(p.expand(n, -1), u), minlength=6).numpy()
    assert counts[1] == counts[5] == 0
    kept = p.numpy() > 0
    assert stats.chisquare(counts[kept], n * p.numpy()[kept] / p.sum().item()).pvalue > 1e-3


def test_the_ends_of_the_unit_interval_are_drawable() -> None:
    p = torch.tensor([[0.0, 0.9, 0.1, 0.0]])
    assert inverse_cdf(p, torch.tensor([0.0])).item() == 1
    assert inverse_cdf(p, torch.tensor([1.0])).item() == 2


@pytest.mark.parametrize(
    "decode",
    [
        GREEDY,
        DecodeConfig("x", "sample", top_p=0.9, seed=0),
        DecodeConfig("x", "beam", num_beams=3, seed=0),
        DecodeConfig("x", "contrastive", top_k=3, alpha=0.6, seed=0),
        DecodeConfig("x", "greedy", repetition_penalty=1.3, no_repeat_ngram=2, seed=0),
    ],
)
def test_what_is_kept_of_each_step_is_what_a_second_reading_finds(
    any_base: BaseModel, decode: DecodeConfig
) -> None:
    model, start = models.load(any_base).eval(), contexts(5, 6)
    found = continue_texts(model, start, 12, decode, 3)
    whole = np.concatenate([start, np.array(found.tokens, dtype=np.int32)], axis=1)
    again = measure(model, whole, batch_size=5)
    for name in ("loss", "entropy", "top1_mass"):
        np.testing.assert_allclose(found.measures[name], again[name][:, 5:], rtol=1e-3, atol=1e-4)
    assert (found.measures["rank"] == again["rank"][:, 5:]).mean() > 0.95  # near ties may turn


def test_when_all_is_forbidden_it_is_said(tmp_path: Path) -> None:
    model = models.load(tiny_model(tmp_path / "small", "llama", vocab_size=4)).eval()
    start = np.array([[0, 1]], dtype=np.int32)
    for fields in (
        {"strategy": "greedy"},
        {"strategy": "sample"},
        {"strategy": "sample", "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9},
        {"strategy": "sample", "top_k": 3},
        {"strategy": "beam", "num_beams": 3},
        {"strategy": "contrastive", "top_k": 3, "alpha": 0.6},
    ):
        decode = DecodeConfig("x", no_repeat_ngram=1, **fields, seed=0)
        with pytest.raises(UserError, match="every token is forbidden after 2 new ones"):
            continue_texts(model, start, 5, decode, 1)
    with pytest.raises(ValueError, match="these have none"):
        continue_texts(model, start[:, :0], 5, decode, 1)


def test_nan_logits_are_an_error_not_a_text(base: BaseModel) -> None:
    model = models.load(base).eval()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="NaN at new token 1"):
        continue_texts(model, contexts(2, 4), 3, GREEDY, 2)


def test_likelihoods_agree_with_the_models_own_loss(any_base: BaseModel) -> None:
    model = models.load(any_base).eval()
    texts = contexts(5, 16)
    found = measure(model, texts, batch_size=2)
    for row, loss in zip(texts, found["loss"], strict=True):
        ids = torch.as_tensor(row[None], dtype=torch.long)
        assert loss.mean() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    np.testing.assert_allclose(
        measure(model, texts, batch_size=5)["entropy"], found["entropy"], rtol=1e-5
    )


def test_features_are_the_last_state_of_each_text(any_base: BaseModel) -> None:
    model = models.load(any_base).eval()
    texts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    found = features(model, texts, batch_size=2)
    for text, state in zip(texts, found, strict=True):
        ids = torch.tensor([text])
        alone = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        np.testing.assert_allclose(state, alone.detach(), rtol=1e-4, atol=1e-5)
