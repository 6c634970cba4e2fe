"""On the real pre-trained model that a package ships: the effect itself. Minutes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyperfitting import models
from hyperfitting.config import DecodeConfig
from hyperfitting.data.corpus import Tokenizer, pieces
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.models import BaseModel
from hyperfitting.store import Store
from tests.conftest import Compose, hyperfit
from tests.test_decoding import by_generate
from tests.test_run import record

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model is converted, once for all tests here."""
    return tmp_path_factory.mktemp("real")


@pytest.fixture
def real(compose: Compose, folder: Path) -> BaseModel:
    return models.base_model(compose("model=smollm2_135m").model, Store(folder / "outputs/store"))


def test_the_converted_model_knows_the_world(real: BaseModel) -> None:
    tokenizer, model = real.tokenizer(), models.load(real).eval()
    context = np.array([tokenizer("The capital of France is").input_ids], dtype=np.int32)
    made = continue_texts(model, context, 3, DecodeConfig("greedy", seed=0), 1).tokens
    assert "Paris" in tokenizer.decode(made[0])
    text = 'Mr. Blunkett\'s "plan", 1,234 dollars — naïve?\n\nNew paragraph.'
    tokens = Tokenizer(real)(text)
    assert "".join(pieces(tokenizer.decode, tokens)) == tokenizer.decode(tokens) == text


@pytest.mark.parametrize(
    ("decode", "options"),
    [
        ({}, {}),
        ({"strategy": "beam", "num_beams": 4}, {"num_beams": 4}),
        (
            {"repetition_penalty": 1.2, "no_repeat_ngram": 3},
            {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
        ),
    ],
)
def test_we_write_what_generate_writes(
    real: BaseModel, decode: dict[str, Any], options: dict[str, Any]
) -> None:
    tokenizer, model = real.tokenizer(), models.load(real).eval()
    texts = ["The Prime Minister said today that the", "In the early hours of the morning,"]
    contexts = np.array([tokenizer(text).input_ids[:7] for text in texts], dtype=np.int32)
    ours = continue_texts(model, contexts, 24, DecodeConfig("x", **decode, seed=0), 8).tokens
    assert ours == by_generate(model, contexts, 24, min_new_tokens=24, **options)


def test_a_draw_does_not_depend_on_the_batch(real: BaseModel) -> None:
    tokenizer, model = real.tokenizer(), models.load(real).eval()
    texts = ["The Prime Minister said today that the", "In the early hours of the morning,"] * 2
    contexts = np.array([tokenizer(text).input_ids[:7] for text in texts], dtype=np.int32)
    contexts[2:, 0] = contexts[:2, 1]  # four different ones
    decode = DecodeConfig("x", "sample", temperature=0.7, top_k=50, top_p=0.9, seed=0)
    together = continue_texts(model, contexts, 16, decode, 4).tokens
    assert continue_texts(model, contexts, 16, decode, 3).tokens == together
    assert len(set(map(tuple, together))) == 4


def test_hyperfitting_makes_greedy_text_less_repetitive(folder: Path) -> None:
    result = hyperfit(
        folder, "hydra.run.dir=run", "dataset.n_train=12", "dataset.n_val=2",
        "trainer.epochs=4", "optimizer.lr=2.5e-4",
        "trainer.epoch_contexts=1", "trainer.epoch_new_tokens=16", "evaluation.n_texts=12",
        timeout=1200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = record(folder / "run")
    first, last = found["history"][0], found["history"][-1]
    after, before = found["metrics"], found["baseline"]
    assert last["train/loss"] < 0.3 * first["train/loss"]
    assert last["val/loss"] > first["val/loss"]
    assert after["gen/ttr"]["mean"] > before["gen/ttr"]["mean"] + 0.1
    assert after["gen/rep_2"]["mean"] < before["gen/rep_2"]["mean"] - 0.1
    assert after["val/entropy"]["mean"] < before["val/entropy"]["mean"] - 0.5
    assert after["val/top1_mass"]["mean"] > before["val/top1_mass"]["mean"]
    assert after["val/perplexity"]["mean"] > before["val/perplexity"]["mean"]
