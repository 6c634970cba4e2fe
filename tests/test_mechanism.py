"""Ranks, weights, logit lens and loops against numpy and transformers, on tiny models."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperfitting.evaluation.forward import compute_token_stats
from hyperfitting.evaluation.scoring import Comparison
from hyperfitting.mechanism import ranks
from hyperfitting.mechanism.choices import Choices
from hyperfitting.mechanism.hidden_states import layer_states
from hyperfitting.mechanism.logit_lens import (
    divergence_depth,
    lens_choices,
    lens_logits,
    prediction_depth,
)
from hyperfitting.mechanism.loops import compute_loop_steps, last_occurrences
from hyperfitting.mechanism.ranks import TokenShift, compute_token_shift
from hyperfitting.mechanism.token_class import token_classes
from hyperfitting.mechanism.weight_change import singular_values, weight_changes
from hyperfitting.metrics.mechanism import TOKEN_CLASSES
from hyperfitting.models.base import BaseModel
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.loading import load
from hyperfitting.models.trainable import merge_adapters, select_trainable
from tests.mechanism import make_texts, model_pair
from tests.test_state_space import save_model

START = 8


def test_each_token_gains_and_loses_as_in_numpy(base: BaseModel) -> None:
    models, texts = model_pair(base), make_texts()
    shift = compute_token_shift(*models, texts, START, batch_size=2)
    ids = torch.as_tensor(texts.tokens, dtype=torch.long)
    log_p, ranks = [], []
    for model in models:
        scores = model(input_ids=ids).logits.double().log_softmax(-1)[:, START - 1 : -1]
        scores = scores.detach().numpy()
        log_p.append(scores)
        ranks.append((scores[..., None, :] > scores[..., None]).sum(-1) + 1)
    present = np.arange(START, ids.shape[1]) < texts.lengths[:, None]
    np.testing.assert_array_equal(shift.base_choice[present], log_p[0].argmax(-1)[present])
    assert (shift.base_choice[~present] == -1).all()
    change = (log_p[1] - log_p[0])[present].mean(0)
    np.testing.assert_allclose(shift.logit_change, change, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(shift.rank_gain, (ranks[0] - ranks[1])[present].mean(0), atol=1e-3)


def test_tokens_are_classed_by_their_text() -> None:
    text = ["The", " man", " of", " Lon", "don", ",", " was", " born", " 19", "84", ".", " He",
            " sang", " in", "ver", "se", " and", "\n", " \ufffd"]  # fmt: skip
    expected = ["function", "other", "function", "name", "subword", "punctuation", "function",
                "other", "digits", "digits", "punctuation", "function", "other", "other", "subword",
                "subword", "function", "space", "punctuation"]  # fmt: skip
    assert token_classes(text) == expected
    assert set(expected) == set(TOKEN_CLASSES)


def test_equal_choices_of_both_models_have_equal_classes() -> None:
    """Whatever follows in the text, and wherever a sentence begins."""
    contexts = [["On", " a"], ["word", " ", " ", " ", " "]]
    texts = [[" for", "est", " the", "ory"], ["Lon", "don", ".", " I"]]
    ids = {text: number for number, text in enumerate(sorted({x for row in texts for x in row}))}
    tokens = np.array([[ids[text] for text in row] for row in texts])
    loglikelihoods = {"rank": np.ones(tokens.shape)}
    continuations = [
        SimpleNamespace(tokens=row, token_texts=text)
        for row, text in zip(tokens.tolist(), texts, strict=True)
    ]
    output = SimpleNamespace(base_loglikelihoods=loglikelihoods, continuations=continuations)
    comparison = SimpleNamespace(
        tuned=SimpleNamespace(output=output),
        contexts=[SimpleNamespace(token_texts=texts) for texts in contexts],
    )
    zeros = np.zeros(len(ids), np.float32)
    shift = TokenShift(tokens.astype(np.int32), zeros, zeros)
    choices = Choices(cast(Comparison, comparison), shift, list(ids).__getitem__)
    classes = choices.ranks(10).classes
    assert {name: c.tuned for name, c in classes.items()} == {
        name: c.base for name, c in classes.items()
    }
    assert classes["function"].base == 3 / 8  # " for", " the", " I"
    changed = choices.estimates(10)["mech/changed_function"]
    assert changed is not None and changed.n == 1  # in the texts only " I" is one


def test_weight_changes_are_those_of_numpy(any_base: BaseModel) -> None:
    base, tuned = model_pair(any_base)
    changes = {change.name: change for change in weight_changes(base, tuned)}
    after = dict(tuned.named_parameters())
    assert list(changes) == [name for name, _ in base.named_parameters()]
    for name, parameter in base.named_parameters():
        w = parameter.detach().double().numpy()
        d = after[name].detach().double().numpy() - w
        change = changes[name]
        relative = np.linalg.norm(d) / np.linalg.norm(w) if w.any() else np.nan
        np.testing.assert_allclose(change.frobenius, relative, rtol=1e-5)
        if w.ndim == 1:
            assert change.spectral is change.effective_rank is None
            continue
        s = np.linalg.svd(d, compute_uv=False)
        assert change.spectral == pytest.approx(s[0] / np.linalg.norm(w, 2), rel=1e-5)
        p = s / s.sum()
        assert change.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    has_own_head = base.get_output_embeddings().weight is not base.get_input_embeddings().weight
    outside = {"embedding", "final norm"} | ({"output layer"} if has_own_head else set())
    assert {c.layer for c in changes.values()} == {"block 1", "block 2", "block 3", *outside}
    for name in ("block 1", "block 3"):
        parts = [c.part for c in changes.values() if c.layer == name]
        assert parts == [c.part for c in changes.values() if c.layer == "block 2"]


def test_the_effective_rank_of_a_low_rank_difference(base: BaseModel) -> None:
    models = model_pair(base, scale=0)
    weight = models[1].model.layers[1].mlp.down_proj.weight
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        left = torch.linalg.qr(torch.randn(weight.shape[0], 3, generator=random))[0]
        right = torch.linalg.qr(torch.randn(weight.shape[1], 3, generator=random))[0]
        weight += left @ right.T
    for change in weight_changes(*models):
        if change.name.endswith("layers.1.mlp.down_proj.weight"):
            assert change.effective_rank == pytest.approx(3, rel=1e-3)
        else:
            assert change.frobenius == 0
            assert change.effective_rank is None


def test_a_merged_adapter_changes_its_matrices_by_its_rank(base: BaseModel) -> None:
    models = model_pair(base, scale=0)
    tuning = TuningConfig("late_stage_lora", last_blocks=1, lora_rank=2)
    with torch.no_grad():
        for parameter in select_trainable(models[1], tuning).values():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    merge_adapters(models[1])
    for change in weight_changes(*models):
        if change.layer == "block 3" and change.spectral is not None:
            assert change.effective_rank == pytest.approx(1.5, abs=0.51)
        else:
            assert change.squared_change == 0


@pytest.mark.parametrize("shape", [(30, 7), (7, 30), (9000, 4)])
def test_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(singular_values(matrix).flip(0), expected)


@torch.inference_mode()
def test_the_lens_after_the_last_block_gives_the_logits_bit_for_bit(any_base: BaseModel) -> None:
    model, texts = load(any_base).eval(), make_texts()
    ids = torch.as_tensor(texts.tokens, dtype=torch.long)
    logits = model(input_ids=ids).logits
    states = layer_states(model, ids)
    assert torch.equal(lens_logits(model, ids, states[-2]), logits)
    choices = lens_choices(model, texts, START, batch_size=len(ids))
    assert choices.shape == (5 - 1, len(ids), ids.shape[1] - START)
    present = np.arange(START, ids.shape[1]) < texts.lengths[:, None]
    final = logits[:, START - 1 : -1].argmax(-1).numpy()
    np.testing.assert_array_equal(choices[-1][present], final[present])
    assert (choices[:, ~present] == -1).all()


@torch.inference_mode()
def test_the_lens_of_an_inner_block_is_that_of_its_norm_and_head(base: BaseModel) -> None:
    model, texts = load(base).eval(), make_texts()
    ids = torch.as_tensor(texts.tokens, dtype=torch.long)
    states = layer_states(model, ids)
    expected = model.lm_head(model.model.norm(states[1]))
    torch.testing.assert_close(lens_logits(model, ids, states[1]), expected)


def test_where_a_choice_settles_and_two_models_part() -> None:
    tuned = np.array([[1, 5, 3], [2, 5, 4], [9, 5, 3], [2, 5, 3]])[:, None]  # (4, 1, 3)
    base = np.array([[1, 5, 7], [2, 6, 8], [9, 6, 3], [2, 6, 9]])[:, None]
    assert prediction_depth(tuned).tolist() == [[3, 0, 2]]
    assert divergence_depth(base, tuned).tolist() == [[4, 1, 3]]


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 3))
def test_last_occurrences_are_those_of_brute_force(tokens: list[int], n: int) -> None:
    for t, last in enumerate(last_occurrences(tokens, n)):
        earlier = [j for j in range(n, t) if t >= n and tokens[j - n : j] == tokens[t - n : t]]
        assert last == max(earlier, default=-1)


@torch.inference_mode()
def test_the_token_that_closes_a_loop_has_the_models_probability_and_attention(
    any_base: BaseModel,
) -> None:
    model, texts = load(any_base).eval(), make_texts()
    texts.tokens[0, 10:22] = np.tile(texts.tokens[0, 4:7], 4)  # a loop
    implementation = model.config._attn_implementation
    steps = compute_loop_steps(model, texts, START, 2)
    assert model.config._attn_implementation == implementation
    last = last_occurrences(texts.tokens[0].tolist(), 2)
    assert (last[15:22] == np.arange(12, 19)).all()
    ids = torch.as_tensor(texts.tokens[:1], dtype=torch.long)
    logits = model(input_ids=ids).logits[0].double()
    model.set_attn_implementation("eager")
    attentions = model(input_ids=ids, output_attentions=True).attentions
    for t in range(START, 24):
        if last[t] < 0:
            assert np.isnan(steps.probability[0, t - START])
            continue
        p = logits[t - 1].softmax(-1)
        closing = p[texts.tokens[0, last[t]]]
        assert steps.probability[0, t - START] == pytest.approx(float(closing), rel=1e-3)
        top = p.sort(descending=True).values.log()
        assert steps.margin[0, t - START] == pytest.approx(float(top[0] - top[1]), abs=1e-3)
        paid = [block[0, :, t - 1, last[t]] for block in attentions]
        mean, most = steps.attention_mean[:, 0, t - START], steps.attention_max[:, 0, t - START]
        np.testing.assert_allclose(mean, [float(heads.mean()) for heads in paid], rtol=1e-3)
        np.testing.assert_allclose(most, [float(heads.max()) for heads in paid], rtol=1e-3)
    assert np.isnan(steps.margin[2, 1:]).all()  # past the end of a text of 9 tokens


def test_a_state_space_model_has_probabilities_but_no_attention(tmp_path: Path) -> None:
    model, texts = load(save_model(tmp_path, "mamba")).eval(), make_texts()
    texts.tokens[0, 10:22] = np.tile(texts.tokens[0, 4:7], 4)
    steps = compute_loop_steps(model, texts, START, 2)
    assert steps.attention_mean.shape[0] == 0
    assert np.isfinite(steps.probability[0]).sum() >= 9


def test_memory_that_runs_out_while_ranks_are_counted_halves_the_batch(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, texts = model_pair(base), make_texts()
    expected, real, calls = compute_token_shift(*models, texts, START, 1), ranks.token_ranks, 0

    def count(scores: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:  # the second text of the first batch
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(scores)

    monkeypatch.setattr(ranks, "token_ranks", count)
    shift = compute_token_shift(*models, texts, START, 4)
    np.testing.assert_array_equal(shift.base_choice, expected.base_choice)
    np.testing.assert_allclose(shift.rank_gain, expected.rank_gain, atol=1e-3)
    np.testing.assert_allclose(shift.logit_change, expected.logit_change, atol=1e-4)


def test_in_half_precision_a_choice_ranks_above_one_exactly_where_it_is_not_the_base_models(
    base: BaseModel,
) -> None:
    """Small logits in bfloat16 are tied nearly everywhere."""
    low = BaseModel.local("low", base.folder(), "bfloat16")
    models, texts = model_pair(low), make_texts((24, 24, 24))
    with torch.no_grad():
        models[0].get_output_embeddings().weight.mul_(0).add_(1)  # all logits are equal
        models[0].get_output_embeddings().weight[40:45] *= 2
    shift = compute_token_shift(*models, texts, START, 3)
    stats = compute_token_stats(models[0], texts.tokens, 3)
    rank, top1 = (stats[name][:, START - 1 :] for name in ("rank", "top1"))
    np.testing.assert_array_equal(top1, shift.base_choice)
    differs = texts.tokens[:, START:] != shift.base_choice
    np.testing.assert_array_equal(rank > 1, differs)
