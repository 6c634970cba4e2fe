"""Forward passes over texts when GPU memory runs out."""

from typing import Any

import numpy as np
import pytest
import torch

from hyperfitting.evaluation import forward
from hyperfitting.evaluation.forward import compute_token_stats, last_hidden_states
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load

TEXTS = np.random.default_rng(0).integers(0, 256, (11, 7), dtype=np.int32)


class SmallMemory:
    """A model that runs out of memory with more than so many texts at once.

    Args:
        base: the model.
        fitting: texts that fit.
    """

    def __init__(self, base: BaseModel, fitting: int) -> None:
        self._model, self._fitting = load(base).eval(), fitting
        self.batches: list[int] = []
        self.parameters, self.config = self._model.parameters, self._model.config

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> Any:
        self.batches.append(len(input_ids))
        if len(input_ids) > self._fitting:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self._model(input_ids=input_ids, **options)


def test_logits_without_a_distribution_are_an_error(base: BaseModel) -> None:
    model = load(base).eval()
    model.get_input_embeddings().weight.data[int(TEXTS[5, 2])] = torch.nan
    with pytest.raises(FloatingPointError, match="no distribution"):
        compute_token_stats(model, TEXTS, 3)


def test_out_of_memory_halves_the_batch_and_scores_every_text(
    base: BaseModel, caplog: pytest.LogCaptureFixture
) -> None:
    expected = compute_token_stats(load(base).eval(), TEXTS, 3)
    model: Any = SmallMemory(base, 3)
    reported = 0

    def advance(n: int, **_: float) -> None:
        nonlocal reported
        reported += n

    stats = compute_token_stats(model, TEXTS, 8, advance)
    assert model.batches == [8, 4, 2, 2, 2, 2, 2, 1]
    assert reported == TEXTS.size
    assert "retrying with batches of 2 texts" in caplog.text
    for name, values in expected.items():
        np.testing.assert_allclose(stats[name], values, rtol=1e-5, atol=1e-6)


def test_out_of_memory_halves_the_batch_of_hidden_states(base: BaseModel) -> None:
    texts = [text[: 3 + i % 4].tolist() for i, text in enumerate(TEXTS)]
    expected = last_hidden_states(load(base).eval(), texts, 3)
    model: Any = SmallMemory(base, 4)
    np.testing.assert_allclose(last_hidden_states(model, texts, 5), expected, rtol=1e-5, atol=1e-6)
    assert model.batches == [5, 3, 3, 3, 2]


@pytest.mark.parametrize("sharded", [False, True])
def test_out_of_memory_is_raised_when_nothing_is_left_to_halve(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    """A sharded model runs on all ranks alike: one of them cannot repeat a batch."""
    monkeypatch.setattr(forward, "is_sharded", lambda _: sharded)
    model: Any = SmallMemory(base, 2 if sharded else 0)
    with pytest.raises(torch.OutOfMemoryError):
        compute_token_stats(model, TEXTS, 4)
    assert model.batches == ([4] if sharded else [4, 2, 1])


def test_other_errors_are_not_repeated(base: BaseModel) -> None:
    with pytest.raises(IndexError):
        compute_token_stats(load(base).eval(), TEXTS + 1000, 4)
