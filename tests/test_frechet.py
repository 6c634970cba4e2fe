"""FID and KID: the formulas against independent ones, and Inception's features as artifacts."""

import json
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hyperfitting.config import RunConfig
from hyperfitting.data.modality import held_out_step, read_step
from hyperfitting.data.sequences import load_evaluation_texts
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.errors import UserError
from hyperfitting.evaluation.arrays import load_arrays
from hyperfitting.evaluation.image_features import (
    FeatureNetwork,
    image_features_steps,
    inception,
)
from hyperfitting.evaluation.setting import Setting
from hyperfitting.metrics.frechet import frechet_distance, kernel_distance
from hyperfitting.models.base import BaseModel
from hyperfitting.models.image_format import Pixels
from hyperfitting.progress import no_op
from hyperfitting.runtime.config import HardwareConfig
from hyperfitting.store.artifact import Step, Store
from tests.conftest import Compose
from tests.images import DIGITS, digits, imagegpt, random_images

__all__ = ["digits", "imagegpt"]


def features(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + shift
    return mixed.astype(np.float32)


@settings(max_examples=25)
@given(n=st.integers(2, 30), m=st.integers(2, 30), d=st.integers(1, 12), shift=st.floats(-3, 3))
def test_fid_is_the_formula_with_a_matrix_root(n: int, m: int, d: int, shift: float) -> None:
    a, b = features(n, d, 0), features(m, d, 1, shift)
    cov_a, cov_b = (np.atleast_2d(np.cov(x.astype(np.float64), rowvar=False)) for x in (a, b))
    root = _root(_root(cov_a) @ cov_b @ _root(cov_a))
    difference = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
    expected = difference @ difference + np.trace(cov_a + cov_b - 2 * root)
    scale = np.trace(cov_a + cov_b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5, abs=1e-5 * scale)


def _root(matrix: np.ndarray) -> np.ndarray:
    """Return the root of a covariance, which is symmetric."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


@settings(max_examples=25)
@given(n=st.integers(2, 8), m=st.integers(2, 8), d=st.integers(1, 5))
def test_kid_is_a_sum_over_pairs(n: int, m: int, d: int) -> None:
    a, b = features(n, d, 2).astype(float), features(m, d, 3).astype(float)

    def kernel(u: np.ndarray, v: np.ndarray) -> float:
        return float((sum(x * y for x, y in zip(u, v, strict=True)) / d + 1) ** 3)

    within_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j)
    within_b = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j)
    across = sum(kernel(u, v) for u in a for v in b)
    expected = within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * across / (n * m)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_distances_of_equal_sets_shifted_sets_and_single_images() -> None:
    a = features(40, 6, 4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, a + 2) == pytest.approx(24, rel=1e-5)  # 6 dimensions, 2 each
    many = [kernel_distance(features(60, 4, s), features(60, 4, s)[::-1]) for s in range(3)]
    assert max(many) < 0  # of the same images: below the unbiased estimate's mean
    assert np.isnan([frechet_distance(a[:1], a), kernel_distance(a, a[:1])]).all()


def mean_colors(pixels: Pixels) -> np.ndarray:
    """Stands for a network: the mean color of the upper and of the lower half."""
    upper, lower = np.split(pixels.astype(np.float32), 2, axis=1)
    return np.concatenate([upper.mean((1, 2)), lower.mean((1, 2))], axis=1)


def test_features_are_of_whole_images_as_they_are_shown(
    digits: RunConfig, imagegpt: BaseModel, store: Store
) -> None:
    images = read_step(digits.dataset, store)
    images.ensure()
    texts = held_out_step(digits.dataset, images.artifact, imagegpt, store, n_texts=4, length=65)
    texts.ensure()
    setting = Setting(
        digits.evaluation, DecodeConfig("greedy", seed=0), HardwareConfig(),
        {"digits": texts.artifact}, texts.artifact, store, no_op,
    )  # fmt: skip
    continuations = _black_continuations(store)
    network = FeatureNetwork("mean colors", lambda: mean_colors)
    steps = dict(
        image_features_steps(setting, network, imagegpt, {"digits": continuations.ensure()})
    )
    for step in steps.values():
        step.ensure()
    completed, real = (
        load_arrays({"": steps[f"{kind}/digits"]}, ("features",))["features"]
        for kind in ("continuation", "reference")
    )
    tokens = load_evaluation_texts(texts.artifact).tokens[:, 1:].copy()
    np.testing.assert_allclose(real, mean_colors(DIGITS.render(tokens)), rtol=1e-6)
    tokens[:, 16:] = 0
    np.testing.assert_allclose(completed, mean_colors(DIGITS.render(tokens)), rtol=1e-6)


def _black_continuations(store: Store) -> Step:
    def build(work: Path) -> None:
        (work / "continuations.json").write_text(json.dumps([{"tokens": [0] * 48}] * 4))

    return Step(store.artifact("continuations", version=0, config={}, inputs={}), build)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("preset=debug",), "for models of images"),
        (("preset=images", "evaluation.max_new_tokens=[8]"), "needs whole images"),
    ],
)
def test_fid_of_texts_or_of_parts_of_images_is_refused(
    compose: Compose, overrides: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        compose(*overrides, "evaluation.fid_weights=inception.safetensors")


def test_a_missing_file_of_weights_is_named_and_nothing_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.safetensors: there is no such file"):
        inception(tmp_path / "none.safetensors", torch.device("cpu"))


@pytest.fixture
def torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package without its __init__, which imports torchvision for other networks."""
    spec = find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("torch-fidelity is not installed")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations or [])
    package.__spec__ = spec
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)


@pytest.mark.slow
@pytest.mark.usefixtures("torch_fidelity")
def test_inception_reads_its_weights_from_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with monkeypatch.context() as patch:  # its own loading is left out: random weights
        patch.setattr(module.torch, "load", lambda *_, **__: {})
        extractor = module.FeatureExtractorInceptionV3
        patch.setattr(extractor, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        random = extractor("random", ["2048"], "unused")
    path = tmp_path / "inception.safetensors"
    save_file(random.state_dict(), path)
    network = inception(path, torch.device("cpu"))
    images = random_images(3, 32, 32)
    expected = random(torch.tensor(images).permute(0, 3, 1, 2))[0].numpy()
    assert expected.shape == (3, 2048)
    np.testing.assert_array_equal(network.load()(images), expected)
    save_file({"fc.bias": torch.zeros(1008)}, path)
    with pytest.raises(UserError, match="does not hold Inception's weights"):
        inception(path, torch.device("cpu")).load()
