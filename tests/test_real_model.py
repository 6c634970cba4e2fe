"""On the real pre-trained model that a package ships: the effect itself. Minutes."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hyperfitting.config import conf_dir
from hyperfitting.data.tokenization import DocumentTokenizer, token_texts
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.models.base import BaseModel, base_model
from hyperfitting.models.config import ModelConfig
from hyperfitting.models.gguf import gguf_folder
from hyperfitting.models.loading import load
from hyperfitting.store.artifact import Store
from tests.cli import hyperfit
from tests.test_decoding import by_generate
from tests.test_run import record

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model is converted, once for all tests here."""
    return tmp_path_factory.mktemp("real")


class Real(NamedTuple):
    """The model, converted and loaded once for all tests here."""

    cfg: ModelConfig
    base: BaseModel
    tokenizer: Any
    model: PreTrainedModel


@pytest.fixture(scope="module")
def real(folder: Path) -> Real:
    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "model/smollm2_135m.yaml"))
    cfg = ModelConfig(**values)
    base = base_model(cfg, Store(folder / "outputs/store"))
    base.ensure()
    return Real(cfg, base, base.tokenizer(), load(base).eval())


@pytest.mark.exhaustive
def test_a_gguf_file_is_converted_to_what_transformers_reads(real: Real) -> None:
    """Bit by bit, with the same tokenizer."""
    folder, name = gguf_folder(real.cfg), str(real.cfg.gguf_file)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    expected, actual = model.state_dict(), real.model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert real.tokenizer.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    fields = model.config.to_dict()
    assert (
        real.base.transformers_config().to_dict().items()
        >= {
            name: fields[name]
            for name in ("rope_parameters", "num_key_value_heads", "eos_token_id")
        }.items()
    )


def test_the_converted_model_predicts_facts_and_its_token_texts_join(real: Real) -> None:
    tokenizer, model = real.tokenizer, real.model
    context = np.array([tokenizer("The capital of France is").input_ids], dtype=np.int32)
    continuations = continue_texts(model, context, 3, DecodeConfig("greedy", seed=0), 1).tokens
    assert "Paris" in tokenizer.decode(continuations[0])
    text = 'Mr. Blunkett\'s "plan", 1,234 dollars — naïve?\n\nNew paragraph.'
    tokens = DocumentTokenizer(real.base)(text)
    assert "".join(token_texts(tokenizer.decode, tokens)) == tokenizer.decode(tokens) == text


@pytest.mark.parametrize(
    ("decode", "options"),
    [
        ({}, {}),
        ({"strategy": "beam", "num_beams": 4}, {"num_beams": 4}),
        (
            {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
            {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
        ),
    ],
)
def test_continuations_equal_those_of_generate(
    real: Real, decode: dict[str, Any], options: dict[str, Any]
) -> None:
    tokenizer, model = real.tokenizer, real.model
    texts = ["The Prime Minister said today that the", "In the early hours of the morning,"]
    contexts = np.array([tokenizer(text).input_ids[:7] for text in texts], dtype=np.int32)
    ours = continue_texts(model, contexts, 16, DecodeConfig("x", **decode, seed=0), 8).tokens
    assert ours == by_generate(model, contexts, 16, min_new_tokens=16, **options)


def test_a_draw_does_not_depend_on_the_batch(real: Real) -> None:
    tokenizer, model = real.tokenizer, real.model
    texts = ["The Prime Minister said today that the", "In the early hours of the morning,"] * 2
    contexts = np.array([tokenizer(text).input_ids[:7] for text in texts], dtype=np.int32)
    contexts[2:, 0] = contexts[:2, 1]  # four different ones
    decode = DecodeConfig("x", "sample", temperature=0.7, top_k=50, top_p=0.9, seed=0)
    together = continue_texts(model, contexts, 16, decode, 4).tokens
    assert continue_texts(model, contexts, 16, decode, 3).tokens == together
    assert len(set(map(tuple, together))) == 4


def test_hyperfitting_makes_greedy_text_less_repetitive(folder: Path) -> None:
    result = hyperfit(
        folder, "hydra.run.dir=run", "dataset.n_train=8", "dataset.n_val=2", "dataset.seq_len=48",
        "trainer.batch_size=4", "trainer.epochs=4", "optimizer.lr=3e-4", "trainer.val_prompts=1",
        "trainer.val_max_new_tokens=8", "trainer.eval_every_epochs=2", "evaluation.n_texts=8",
        "evaluation.max_new_tokens=[96]", "evaluation.text_len=128",
        timeout=1200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    result_record = record(folder / "run")
    first, last = result_record.history[0], result_record.history[-1]
    validated = [row["val/loss"] for row in result_record.history if "val/loss" in row]
    tuned, base = (
        {key: estimate.mean for key, estimate in result_record.overall.estimates(side).items()}
        for side in ("tuned", "base")
    )
    assert last["train/loss"] < 0.3 * first["train/loss"]
    assert len(validated) == 2
    assert validated[1] > validated[0]  # after four epochs and after two
    assert tuned["gen/ttr"] > base["gen/ttr"] + 0.1
    assert tuned["gen/rep_2"] < base["gen/rep_2"] - 0.1
    assert tuned["val/entropy"] < base["val/entropy"] - 0.5
    assert tuned["val/top1_mass"] > base["val/top1_mass"]
    assert tuned["val/perplexity"] > base["val/perplexity"]
