"""The decoding loop against transformers' `generate` and its samplers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hyperfitting import models
from hyperfitting.config import DecodeConfig
from hyperfitting.decoding.generate import continue_texts, inverse_cdf, nucleus
from hyperfitting.decoding.likelihood import measure
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
        assert continue_texts(model, start, 24, GREEDY, batch_size) == expected


def test_the_end_token_is_forbidden_or_ends_the_text(tmp_path: Path) -> None:
    start = contexts(6, 5)
    model = models.load(tiny_model(tmp_path / "a", "llama")).eval()
    free = continue_texts(model, start, 24, GREEDY, 8)
    end = free[0][5]  # a token that does come
    model.generation_config.eos_token_id = end
    assert continue_texts(model, start, 24, GREEDY, 8) == by_generate(
        model, start, 24, min_new_tokens=24
    )
    stopped = continue_texts(model, start, 24, DecodeConfig("greedy", stop_at_eos=True, seed=0), 8)
    assert stopped == [row[: row.index(end)] if end in row else row for row in free]


def test_a_draw_does_not_depend_on_the_batch(base: BaseModel) -> None:
    model = models.load(base).eval()
    start = contexts(7, 6)
    sample = DecodeConfig("top_p", "sample", temperature=0.7, top_k=50, top_p=0.9, seed=3)
    together = continue_texts(model, start, 12, sample, 7)
    assert continue_texts(model, start, 12, sample, 2) == together
    assert continue_texts(model, start, 12, sample, 7) == together
    other = DecodeConfig("top_p", "sample", temperature=0.7, top_k=50, top_p=0.9, seed=4)
    assert continue_texts(model, start, 12, other, 7) != together


@given(
    st.integers(0, 10_000),
    st.floats(0.2, 3.0),
    st.none() | st.integers(1, 60),
    st.floats(0.05, 1.0),
)
def test_nucleus_keeps_what_transformers_keeps(
    seed: int, temperature: float, top_k: int | None, top_p: float
) -> None:
    logits = torch.as_tensor(np.random.default_rng(seed).normal(0, 2, (3, 40)), dtype=torch.float64)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    theirs = torch.softmax(warpers(torch.zeros(3, 1, dtype=torch.long), logits), -1)
    p, ids = nucleus(logits / temperature, top_k, top_p)
    ours = torch.zeros_like(logits).scatter(-1, ids, p / p.sum(-1, keepdim=True))
    torch.testing.assert_close(ours, theirs)


def test_draws_have_the_distribution_they_are_drawn_from() -> None:
    p = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    n = 20_000
    u = torch.as_tensor(np.random.default_rng(0).random(n), dtype=torch.float32)
    drawn = inverse_cdf(p.expand(n, -1), torch.arange(5).expand(n, -1), u)
    counts = torch.bincount(drawn, minlength=5).numpy()
    assert counts[4] == 0
    assert stats.chisquare(counts[:4], n * p[:4].numpy()).pvalue > 1e-3


def test_the_ends_of_the_unit_interval_are_drawable() -> None:
    p, ids = torch.tensor([[0.9, 0.1, 0.0]]), torch.tensor([[7, 8, 9]])
    assert inverse_cdf(p, ids, torch.tensor([0.0])).item() == 7
    assert inverse_cdf(p, ids, torch.tensor([1.0])).item() == 8


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
        assert loss == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    np.testing.assert_allclose(
        measure(model, texts, batch_size=5)["entropy"], found["entropy"], rtol=1e-5
    )
