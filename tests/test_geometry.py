"""Layer geometry against transformers' hidden states and plain numpy."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperfitting.mechanism.config import MechanismConfig
from hyperfitting.mechanism.geometry import TOKEN_MEANS, Geometry, compute_geometry
from hyperfitting.mechanism.hidden_states import layer_names, layer_states
from hyperfitting.mechanism.logit_lens import lens_logits
from hyperfitting.mechanism.moments import LayerMoments, PairMoments
from hyperfitting.mechanism.summaries import geometry_curves
from hyperfitting.models import layers
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load
from tests.mechanism import make_texts, model_pair
from tests.test_state_space import save_model

CFG = MechanismConfig(["geometry"], skip_tokens=1, outlier_dims=2)
KEYS = ("base_participation_ratio", "tuned_participation_ratio", "cka")
Array = np.ndarray


@torch.inference_mode()
def test_states_are_those_of_transformers_and_both_sides_of_the_norm(any_base: BaseModel) -> None:
    model = load(any_base).eval()
    ids = torch.randint(32, 127, (2, 12), generator=torch.Generator().manual_seed(0))
    states = layer_states(model, ids)
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(states) == len(layer_names(len(layers.blocks(model)))) == len(hidden) + 1
    for ours, theirs in zip(states[:-2], hidden[:-1], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(states[-1], hidden[-1])  # transformers' last one is after the norm
    assert not torch.allclose(states[-2], states[-1])
    for parameter in layers.final_norm(model):  # which only the last of them depends on
        parameter.data *= 2
    assert torch.equal(layer_states(model, ids)[-2], states[-2])
    assert not torch.allclose(layer_states(model, ids)[-1], states[-1])


@torch.inference_mode()
def test_a_state_space_model_has_states_too(tmp_path: Path) -> None:
    model = load(save_model(tmp_path, "mamba")).eval()
    ids = torch.randint(32, 127, (2, 12), generator=torch.Generator().manual_seed(0))
    states = layer_states(model, ids)
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    # transformers' list begins after the first block here, and ends after the norm all the same
    assert all(torch.equal(a, b) for a, b in zip(states[1:-1], hidden[:-1], strict=True))
    assert torch.equal(states[-1], hidden[-1])
    torch.testing.assert_close(model.backbone.norm_f(states[-2]), states[-1])
    torch.testing.assert_close(lens_logits(model, ids, states[-2]), model(input_ids=ids).logits)


def participation_ratio(x: Array) -> float:
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T))
    return float(eigenvalues.sum() ** 2 / np.square(eigenvalues).sum())


def hsic(k: Array, m: Array) -> float:
    """The unbiased estimator of Song et al. (2012), from the kernel matrices of all tokens."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    return float(
        np.trace(k @ m)
        + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        - 2 * (one @ k @ m @ one) / (n - 2)
    )


def debiased_cka(x: Array, y: Array) -> float:
    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def test_geometry_is_that_of_numpy_on_all_tokens_at_once(base: BaseModel) -> None:
    models, texts = model_pair(base), make_texts()
    geometry = compute_geometry(*models, texts, CFG, batch_size=2)
    assert list(geometry.layers) == ["embedding", "block 1", "block 2", "block 3", "final norm"]
    ids = torch.as_tensor(texts.tokens, dtype=torch.long)
    for layer, (x, y) in enumerate(zip(*(layer_states(m, ids) for m in models), strict=True)):
        rows = [
            (a[1:n].double().numpy(), b[1:n].double().numpy())
            for a, b, n in zip(x, y, texts.lengths, strict=True)
        ]
        all_x, all_y = (np.concatenate(states) for states in zip(*rows, strict=True))
        outliers = np.argsort(-np.square(rows[0][0]).mean(0))[:2]
        assert sorted(geometry.outlier_dims[layer]) == sorted(outliers)
        for trim in (False, True):
            kept = np.setdiff1d(np.arange(x.shape[-1]), outliers if trim else [])
            expected = [participation_ratio(s[:, kept]) for s in (all_x, all_y)]
            measured = geometry.participation_ratio[layer, :, int(trim)]
            np.testing.assert_allclose(measured, expected, rtol=1e-4)
            means = np.array([_token_means(a[:, kept], b[:, kept]) for a, b in rows]).T
            first = 4 * trim
            np.testing.assert_allclose(
                geometry.token_means[first : first + 4, layer], means, rtol=1e-4
            )
            cka = debiased_cka(all_x[:, kept], all_y[:, kept])
            assert geometry.cka[layer, int(trim)] == pytest.approx(cka, rel=1e-4)


def _token_means(x: Array, y: Array) -> list[float]:
    norms = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    cosine = ((x * y).sum(1) / norms[0] / norms[1]).mean()
    return [cosine, np.linalg.norm(y - x, axis=1).mean(), norms[0].mean(), norms[1].mean()]


def test_the_batch_size_changes_nothing_but_rounding(base: BaseModel) -> None:
    models, texts = model_pair(base), make_texts()
    first, second = (compute_geometry(*models, texts, CFG, n) for n in (1, 5))
    for name, values in vars(first).items():
        if name != "layers":
            np.testing.assert_allclose(values, getattr(second, name), rtol=1e-3, atol=1e-3)


def test_equal_models_have_no_distance_and_cka_one(base: BaseModel) -> None:
    model = load(base).eval()
    geometry = compute_geometry(model, model, make_texts(), CFG, 8)
    np.testing.assert_allclose(geometry.cka, 1, rtol=1e-6)
    by_name = dict(zip(TOKEN_MEANS, geometry.token_means, strict=False))
    assert (by_name["l2"] == 0).all()
    np.testing.assert_allclose(by_name["cosine"], 1, rtol=1e-5)


def test_tokens_left_out_do_not_count(base: BaseModel) -> None:
    models, texts = model_pair(base), make_texts()
    skipped = compute_geometry(*models, texts, replace(CFG, skip_tokens=8), 8)
    assert np.isfinite(skipped.token_means).all()  # the text of 9 tokens has one left
    none_left = compute_geometry(*models, texts, replace(CFG, skip_tokens=9), 8)
    assert np.isnan(none_left.token_means[:, :, 2]).all()
    assert np.isfinite(none_left.cka).all()


def test_what_too_few_tokens_do_not_define_is_missing_not_nan(base: BaseModel) -> None:
    geometry = compute_geometry(*model_pair(base), make_texts((3,)), CFG, 8)
    curves = geometry_curves(geometry, 50)
    assert curves["cka"].mean == [None] * 5  # of two tokens
    assert curves["cka"].ci95 is curves["l2"].ci95 is None  # of one text
    for curve in curves.values():
        assert all(mean is None or np.isfinite(mean) for mean in curve.mean)


def moments_of(x: Array, y: Array, n_texts: int, noise: float = 0) -> PairMoments:
    """Sum the states (N * T, d) of texts of equal length."""
    d = x.shape[1]
    keep = torch.ones(d, dtype=torch.bool)
    centers = torch.as_tensor(np.stack([x.mean(0), y.mean(0)]) + noise)
    moments = PairMoments(n_texts, centers, keep, torch.device("cpu"))
    base, tuned = (torch.as_tensor(s).float().reshape(n_texts, -1, d) for s in (x, y))
    moments.update(slice(0, n_texts), base, tuned, torch.ones(base.shape[:2], dtype=torch.bool))
    return moments


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(-3, 3), st.floats(0.2, 5))
def test_cka_ignores_rotation_scale_and_shift(seed: int, shift: float, scale: float) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_normal((40, 6))
    y = x @ np.linalg.qr(random.standard_normal((6, 6)))[0] * scale + shift
    result = moments_of(x, y, 4, noise=0.3).finish()
    np.testing.assert_allclose(result.cka, 1, atol=1e-3)
    assert result.participation_ratio[0] == pytest.approx(result.participation_ratio[1], rel=1e-3)


def test_cka_of_unrelated_states_is_about_zero_although_there_are_few_tokens() -> None:
    """The plain estimator gives more than 0.3 here: it is biased when d is not far below n."""
    values = []
    for seed in range(40):
        x, y = np.random.default_rng(seed).standard_normal((2, 40, 20))
        values.append(moments_of(x, y, 4).finish().cka[0])
    assert abs(np.mean(values)) < 0.03


def test_projections_give_the_inner_products_of_the_scatter_matrices() -> None:
    random = np.random.default_rng(0)
    d, n_texts, length = 24, 12, 30
    scales = random.uniform(0.5, 2, (n_texts, 1, 1)) * np.linspace(0.3, 2, d)
    x = (random.standard_normal((n_texts, length, d)) * scales).reshape(-1, d)
    result = moments_of(x, 2 * x, n_texts).finish()
    centered = (x - x.mean(0)).reshape(n_texts, length, d)
    scatter = centered.transpose(0, 2, 1) @ centered
    exact = np.einsum("iab,jab->ij", scatter, scatter)
    np.testing.assert_allclose(result.trace[0, 0], np.trace(scatter, axis1=1, axis2=2), rtol=1e-4)
    np.testing.assert_allclose(result.trace[1, 1], 4 * result.trace[0, 0], rtol=1e-4)
    # what intervals use: the ratio of a resample's squared norm to that of all texts
    weights = random.multinomial(n_texts, np.full(n_texts, 1 / n_texts), 500)
    ratios = [
        np.einsum("bi,ij,bj->b", weights, gram, weights) / gram.sum()
        for gram in (exact, result.gram[0, 0], result.cross_gram[0])
    ]
    assert np.corrcoef(ratios[0], ratios[1])[0, 1] > 0.97
    np.testing.assert_allclose(ratios[0].std(), ratios[1].std(), rtol=0.15)
    np.testing.assert_allclose(ratios[1], ratios[2], rtol=1e-3)


def test_intervals_are_as_wide_as_new_texts_vary() -> None:
    """Of participation ratio and CKA, computed plainly on other samples of texts."""
    random = np.random.default_rng(0)
    n_texts, length, d = 30, 15, 6
    mixing = np.eye(d) + 0.5 * random.standard_normal((d, d))

    def sample() -> tuple[Array, Array]:
        scales = random.uniform(0.3, 2, (n_texts, 1, d)) * np.linspace(0.5, 1.5, d)
        x = random.standard_normal((n_texts, length, d)) * scales
        y = x @ mixing + random.standard_normal(x.shape) * random.uniform(0.3, 2, (n_texts, 1, 1))
        return x.reshape(-1, d), y.reshape(-1, d)

    plain = [
        (participation_ratio(x), participation_ratio(y), debiased_cka(x, y))
        for x, y in (sample() for _ in range(150))
    ]
    expected = dict(zip(KEYS, np.std(plain, axis=0), strict=True))
    widths: dict[str, list[float]] = {key: [] for key in KEYS}
    for _ in range(20):
        curves = geometry_curves(of_one_layer(moments_of(*sample(), n_texts).finish()), 400)
        for key in KEYS:
            ((low, high),) = curves[key].ci95 or []
            assert low < (curves[key].mean[0] or 0) < high
            widths[key].append(high - low)
    for key in KEYS:
        assert np.mean(widths[key]) / (2 * 1.96) == pytest.approx(expected[key], rel=0.2)


def of_one_layer(moments: LayerMoments) -> Geometry:
    """The geometry of a model with a single layer, without means over tokens."""
    return Geometry(
        layers=np.array(["block 1"]),
        token_means=np.ones((8, 1, moments.trace.shape[-1])),
        outlier_dims=np.zeros((1, 0), np.int64),
        **{name: np.array(values)[None] for name, values in vars(moments).items()},
    )


def test_memory_that_runs_out_while_states_are_added_changes_nothing_but_rounding(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third layer, when two layers have had the batch."""
    models, texts = model_pair(base), make_texts()
    expected, real, sizes = compute_geometry(*models, texts, CFG, 2), PairMoments.update, []

    def update(self: PairMoments, rows: slice, *states: torch.Tensor) -> None:
        sizes.append(rows.stop - rows.start)
        if len(sizes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        real(self, rows, *states)

    monkeypatch.setattr(PairMoments, "update", update)
    geometry = compute_geometry(*models, texts, CFG, 4)
    assert sizes[:3] == [4, 4, 4]
    assert set(sizes[3:]) == {1, 2}
    for name, values in vars(expected).items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(getattr(geometry, name), values, rtol=1e-4, atol=1e-5)
