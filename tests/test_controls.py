"""Controls of Li et al. (ICML 2026): the temperature of equal entropy, and a static bias."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import entr, expit, log_softmax
from scipy.stats import rankdata

from hyperfitting.config import RunConfig
from hyperfitting.decoding.config import RANK_GAINS, DecodeConfig
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.errors import UserError
from hyperfitting.mechanism.entropy_matching import (
    TOLERANCE,
    matching_temperature,
    temperature_of,
)
from hyperfitting.mechanism.static_bias import (
    LogitMeans,
    logit_means,
    static_bias,
    tokens_that_gain,
)
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load
from hyperfitting.models.logit_transform import LogitTransform
from hyperfitting.pipeline.build import build_pipeline
from hyperfitting.record.files import RECORD_FILE, read_record
from hyperfitting.record.schema import Record
from tests.cli import hyperfit
from tests.conftest import Compose

CPU = torch.device("cpu")
TEXTS = [
    np.random.default_rng(seed).integers(0, 256, (n, 12), dtype=np.int32)
    for seed, n in ((0, 3), (1, 2))
]


@torch.no_grad()
def logits_of(base: BaseModel) -> NDArray[np.float64]:
    """Next-token logits (55, V) at every token of `TEXTS` but the first of each text."""
    model = load(base).eval()
    batches = [model(input_ids=torch.as_tensor(t).long()).logits[:, :-1] for t in TEXTS]
    return np.concatenate([batch.flatten(0, 1).double().numpy() for batch in batches])


def mean_entropy(logits: NDArray[np.float64], temperature: float) -> float:
    p = np.exp(log_softmax(logits / temperature, axis=-1))
    return float(entr(p).sum(-1).mean())


@pytest.mark.parametrize("factor", [0.4, 0.9, 1.3])
def test_the_temperature_of_equal_entropy_is_that_of_a_direct_search(
    base: BaseModel, factor: float
) -> None:
    logits = logits_of(base)
    target = factor * mean_entropy(logits, 1)
    expected = brentq(lambda t: mean_entropy(logits, t) - target, 0.05, 20, xtol=1e-10)
    temperature = temperature_of(load(base).eval(), TEXTS, target, batch_size=2)
    assert temperature == pytest.approx(expected, rel=1e-4)
    assert (temperature < 1) == (factor < 1)
    assert mean_entropy(logits, temperature) == pytest.approx(target, abs=TOLERANCE / 10)


@given(gap=st.floats(0.5, 5), temperature=st.floats(0.3, 10))
def test_the_temperature_of_a_known_entropy_is_found(gap: float, temperature: float) -> None:
    """Two tokens whose logits differ by ``gap``: their entropy is known in closed form."""

    def entropies_at(temperatures: NDArray[np.float64]) -> NDArray[np.float64]:
        p = expit(gap / temperatures)
        result: NDArray[np.float64] = entr(p) + entr(1 - p)
        return result

    target = float(entropies_at(np.array([temperature]))[0])
    matched = matching_temperature(entropies_at, target)
    assert entropies_at(np.array([matched]))[0] == pytest.approx(target, abs=TOLERANCE / 100)
    if 0.01 < target < 0.69:  # else the curve is flat, and many temperatures have this entropy
        assert matched == pytest.approx(temperature, rel=1e-3)


def test_an_entropy_that_no_temperature_gives_is_an_error(base: BaseModel) -> None:
    with pytest.raises(UserError, match=r"no temperature from 0\.02 to 50 gives the entropy 9"):
        temperature_of(load(base).eval(), TEXTS, 9.0, batch_size=2)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_mean_logits_and_ranks_are_scipys_over_all_positions(
    base: BaseModel, batch_size: int
) -> None:
    logits = logits_of(base)
    means = logit_means(load(base).eval(), TEXTS, batch_size)
    np.testing.assert_allclose(means.logits, logits.mean(0), atol=1e-5)
    ranks = rankdata(-logits, axis=-1)
    np.testing.assert_allclose(means.rank, ranks.mean(0), atol=0.05)
    np.testing.assert_allclose(means.log_rank, np.log(ranks).mean(0), atol=1e-3)
    np.testing.assert_allclose(means.reciprocal_rank, -(1 / ranks).mean(0), atol=1e-4)


def means_of(logits: list[float], **penalties: list[float]) -> LogitMeans:
    zeros = [0.0] * len(logits)
    ranks = {name: np.array(penalties.get(name, zeros)) for name in RANK_GAINS}
    return LogitMeans(np.array(logits), **ranks)


@pytest.mark.parametrize("gain", RANK_GAINS)
def test_the_gain_of_a_token_is_that_of_the_measure_that_is_asked_for(gain: str) -> None:
    base = means_of([0.0, 0, 0], **{gain: [3.0, 2, 1]})
    tuned = means_of([0.5, 0.25, 1], **{gain: [2.5, 0.5, 1]})
    assert tokens_that_gain(base, tuned, 2, gain).tolist() == [1, 0]


def test_a_static_bias_is_the_offset_of_the_tokens_that_gain_most_rank() -> None:
    base = means_of([1.0, 2, 3, 4, 5], rank=[5.0, 4, 3, 2, 1])
    tuned = means_of([2.0, 2, 3, 4.5, 1], rank=[4.0, 3.5, 3, 1.5, 3])
    tokens = tokens_that_gain(base, tuned, 3)
    assert tokens.tolist() == [0, 1, 3]  # gains 1, 0.5, 0.5
    np.testing.assert_allclose(static_bias(base, tuned, tokens[:2]), [1, 0, 0, 0, 0])
    np.testing.assert_allclose(static_bias(base, tuned, tokens), [1, 0, 0, 0.5, 0])
    shift = (1 + 0 + 0 + 0.5 - 4) / 5
    expected = [1 - shift, -shift, 0, 0.5 - shift, 0]
    np.testing.assert_allclose(static_bias(base, tuned, tokens, center=True), expected, rtol=1e-6)
    with pytest.raises(UserError, match=r"n_tokens=6(.|\n)*valid: 1 to 5"):
        tokens_that_gain(base, tuned, 6)


def test_transformed_logits_are_those_of_the_formula_at_every_position(base: BaseModel) -> None:
    plain, model = load(base).eval(), load(base).eval()
    bias = torch.randn(plain.config.vocab_size, generator=torch.Generator().manual_seed(0))
    LogitTransform(0.7, bias).attach(model)
    tokens = torch.as_tensor(TEXTS[0]).long()
    with torch.no_grad():
        expected = plain(input_ids=tokens).logits / 0.7 + bias
        torch.testing.assert_close(model(input_ids=tokens).logits, expected)


def test_a_model_at_a_temperature_samples_as_decoding_at_that_temperature(
    base: BaseModel,
) -> None:
    """And greedily it writes the same: a temperature keeps the order of the tokens."""
    plain, cooled = load(base).eval(), load(base).eval()
    LogitTransform(0.6).attach(cooled)
    contexts = TEXTS[0][:, :5]
    sampled = continue_texts(plain, contexts, 24, DecodeConfig("x", "sample", 0.6, seed=3)).tokens
    assert continue_texts(cooled, contexts, 24, DecodeConfig("x", "sample", seed=3)).tokens == (
        sampled
    )
    assert continue_texts(plain, contexts, 24, DecodeConfig("x", "sample", seed=3)).tokens != (
        sampled
    )
    greedy = [continue_texts(m, contexts, 24, DecodeConfig("x", seed=0)) for m in (plain, cooled)]
    assert greedy[0].tokens == greedy[1].tokens
    assert greedy[1].stats["entropy"].mean() < greedy[0].stats["entropy"].mean()


def test_controls_share_what_they_do_not_change(compose: Compose, tmp_path: Path) -> None:
    """The base model's artifacts are those of a run without control; all strengths share means."""

    def ids(*overrides: str) -> dict[str, str]:
        cfg: RunConfig = compose("preset=debug", f"store={tmp_path}", *overrides)
        return {name: artifact.id for name, artifact in build_pipeline(cfg, CPU).artifacts.items()}

    plain, weak = ids(), ids("decode=static_bias", "decode.control.strength=0.01")
    strong, matched = ids("decode=static_bias"), ids("decode=entropy_matched")
    for controlled in (weak, strong, matched):
        kept = {name: id for name, id in controlled.items() if name.startswith("base/")}
        assert kept == {name: id for name, id in plain.items() if name.startswith("base/")}
        assert controlled["tuned"] == plain["tuned"]
        assert controlled["tuned/token_stats/code_sample"] != plain["tuned/token_stats/code_sample"]
    assert weak["control"] != strong["control"]
    for side in ("base", "tuned"):
        assert weak[f"control/logit_means/{side}"] == strong[f"control/logit_means/{side}"]
    assert matched["control/token_stats/code_sample"] == plain["tuned/token_stats/code_sample"]


def record(folder: Path) -> Record:
    return read_record(folder / RECORD_FILE)


def test_the_base_model_at_the_tuned_models_entropy_writes_its_own_texts(debug_run: Path) -> None:
    plain = record(debug_run / "run").overall
    for name, options in (
        ("cooled", ["decode=entropy_matched"]),
        ("heated", ["decode=entropy_matched", "decode.control.model=tuned"]),
    ):
        result = hyperfit(debug_run, "preset=debug", f"hydra.run.dir={name}", *options)
        assert result.returncode == 0, result.stderr
        assert "entropy_matched model" in result.stdout
    cooled, heated = record(debug_run / "cooled"), record(debug_run / "heated")
    for sample in cooled.samples:
        assert sample.tuned.tokens == sample.base.tokens
    for key, target in (("val/entropy", plain.tuned), ("val/top1_agreement", plain.base)):
        assert cooled.overall.tuned[key].mean == pytest.approx(target[key].mean, abs=TOLERANCE)
    assert heated.overall.tuned["val/entropy"].mean == pytest.approx(
        plain.base["val/entropy"].mean, abs=TOLERANCE
    )
    assert [s.tuned.tokens for s in heated.samples] == [
        s.tuned.tokens for s in record(debug_run / "run").samples
    ]
    assert cooled.overall.base == plain.base
    assert "the base model at temperature 0." in cooled.notes[0]


def test_a_static_bias_is_evaluated_in_the_tuned_models_place(debug_run: Path) -> None:
    result = hyperfit(
        debug_run, "preset=debug", "hydra.run.dir=biased", "decode=static_bias",
        "decode.control.n_tokens=50", "decode.control.strength=5",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    biased = record(debug_run / "biased")
    assert 0 < biased.overall.tuned["val/top1_agreement"].mean < 1
    assert "5 times the mean logit offset of the 50 tokens" in biased.notes[0]
    result = hyperfit(debug_run, "preset=debug", "decode=static_bias", "hydra.run.dir=too_many")
    assert result.returncode == 1
    assert "more tokens than the vocabulary has" in result.stderr
