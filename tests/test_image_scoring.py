"""Scores of completed digits: metrics of images only, a classifier, intervals as for texts."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from hyperfitting.data.config import ImageConfig, TextsConfig
from hyperfitting.evaluation.config import EvaluationConfig
from hyperfitting.evaluation.images import Classifier, ImageScoring, LabeledImages, image_scoring
from hyperfitting.evaluation.scoring import (
    Comparison,
    ModelOutput,
    NgramCorpus,
    TokenizedText,
    score,
)
from hyperfitting.evaluation.slices import notes, slices
from hyperfitting.metrics.frechet import frechet_distance, kernel_distance
from hyperfitting.metrics.registry import METRICS
from hyperfitting.metrics.uncertainty import bootstrap_mean, paired_difference
from hyperfitting.models.image_format import ImageFormat

GRAYS = np.linspace(-1, 1, 17, dtype=np.float32)
FORMAT = ImageFormat(8, 8, np.repeat(GRAYS[:, None], 3, axis=1))
DIGITS = load_digits().images.astype(np.int32).reshape(-1, 64)
CLASSES = load_digits().target
EVALUATION = EvaluationConfig(context_len=17, max_new_tokens=[24, 48], bootstrap=200)
TRUE, TRAIN = DIGITS[:6], DIGITS[100:140]
SOS = 17


def with_sos(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([np.full((len(pixels), 1), SOS), pixels], axis=1)


def output(rest: np.ndarray) -> ModelOutput:
    """Return completions (N, 48) of the true images' first quarter."""
    names = ("loss", "entropy", "top1_mass", "top3_mass", "top5_mass", "top1", "rank")
    stats = {name: np.ones((6, 64)) for name in names}
    steps = {name: values[:, :48] for name, values in stats.items()}
    texts = [TokenizedText(row, [f"{t:02x}" for t in row]) for row in rest.tolist()]
    return ModelOutput(["digits"] * 6, stats, steps, steps, texts)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    """Return the scores of a tuned model that quotes, and of a base model that repeats a row."""
    dataset = TextsConfig(
        name="digits", source="package", path="digits", image=ImageConfig(height=8, width=8)
    )
    contexts = [TokenizedText(row, [""] * 17) for row in with_sos(TRUE)[:, :17].tolist()]
    return score(
        output(TRAIN[:6, 16:]),
        output(np.tile(TRUE[:, 8:16], 6)),
        output(TRUE[:, 16:]),
        contexts,
        NgramCorpus(with_sos(TRAIN), None),
        EVALUATION,
        image_scoring(FORMAT, dataset),
    )


def test_metrics_of_text_are_absent_and_those_of_images_there(comparison: Comparison) -> None:
    values = comparison.tuned.values
    for key, entry in METRICS.items():
        if entry.modality == "text":
            assert key not in values
        elif entry.modality == "image" and entry.per_text is not None:
            assert np.isfinite(values[key]).all(), key
    overall = slices(comparison, EVALUATION)[0]
    assert not {"gen/self_bleu", "gen/mauve"} & overall.tuned.keys()
    assert "gen/row_repeat" in overall.reference


def test_quotation_and_repetition_are_found(comparison: Comparison) -> None:
    assert comparison.tuned.values["gen/nearest_train"].tolist() == [0] * 6
    assert (comparison.tuned.values["gen/dataset_overlap"] == 48).all()
    assert (comparison.reference.values["gen/nearest_train"] > 0.05).all()
    assert comparison.base.values["gen/row_repeat"].tolist() == [1] * 6
    assert comparison.reference.values["gen/mse"].tolist() == [0] * 6


def test_bits_per_pixel_are_the_loss_in_bits(comparison: Comparison) -> None:
    np.testing.assert_allclose(comparison.base.values["val/bits_per_pixel"], np.log2(np.e))


def test_intervals_and_differences_are_those_of_texts(comparison: Comparison) -> None:
    tuned, base = (
        scores.values["gen/total_variation"] for scores in (comparison.tuned, comparison.base)
    )
    overall = slices(comparison, EVALUATION)[0]
    assert overall.tuned["gen/total_variation"] == bootstrap_mean(tuned, 200)
    assert overall.difference["gen/total_variation"] == paired_difference(tuned, base, 200)


def test_a_shorter_length_is_measured_on_its_complete_rows(comparison: Comparison) -> None:
    short = comparison.base.inputs[24].images
    assert short is not None
    assert short.images.shape == (6, 5, 8)
    assert short.start == 16
    assert "gen/class_kept" not in comparison.base.values_by_length[24]


def test_the_classes_of_completed_images_are_compared_with_the_true_ones(
    comparison: Comparison,
) -> None:
    recognition = comparison.recognition
    assert recognition is not None
    assert recognition.true == CLASSES[:6].tolist()
    kept = np.array(recognition.base) == np.array(recognition.true)
    assert comparison.base.values["gen/class_kept"].tolist() == kept.tolist()
    assert recognition.accuracy.mean > 0.95
    assert recognition.accuracy.mean > recognition.context_accuracy.mean > 0.1
    assert any("has an accuracy of" in note for note in notes(comparison))
    assert any("no measure of quality" in note for note in notes(comparison))


def test_the_classifier_never_sees_excluded_images_and_is_deterministic() -> None:
    wrong = CLASSES.copy()
    wrong[:800] = 0
    labeled = LabeledImages(DIGITS, wrong)
    excluded = DIGITS[:800]
    first, second = (Classifier(labeled, excluded, FORMAT.colors, 64) for _ in range(2))
    assert first.is_correct.mean() > 0.9  # false labels would show
    for one, other in zip(first(DIGITS[:50]), second(DIGITS[:50]), strict=True):
        assert np.array_equal(one, other)
    assert (first(DIGITS[:800])[0] == CLASSES[:800]).mean() > 0.9


def test_images_without_known_classes_have_no_classifier() -> None:
    contexts = [TokenizedText(row, [""] * 16) for row in TRUE[:, :16].tolist()]
    rest = output(TRUE[:, 16:])
    corpus = NgramCorpus(TRAIN, None)
    compared = score(rest, rest, rest, contexts, corpus, EVALUATION, ImageScoring(FORMAT))
    assert compared.recognition is None
    assert "gen/class_kept" not in compared.tuned.values
    assert "gen/row_repeat" in compared.tuned.values


def test_fid_and_kid_are_of_whole_images_of_both_models() -> None:
    contexts = [TokenizedText(row, [""] * 16) for row in TRUE[:, :16].tolist()]
    rest, rng = output(TRUE[:, 16:]), np.random.default_rng(0)
    completed, real = rng.normal(size=(2, 6, 3))
    tuned = replace(rest, image_features=(completed, real))
    base = replace(rest, image_features=(real, real))
    corpus = NgramCorpus(TRAIN, None)
    compared = score(tuned, base, rest, contexts, corpus, EVALUATION, ImageScoring(FORMAT))
    by_length = {part.max_new_tokens: part for part in slices(compared, EVALUATION)}
    fid, kid = (by_length[48].tuned[key] for key in ("gen/fid", "gen/kid"))
    assert (fid.mean, fid.n) == (frechet_distance(completed, real), 6)
    assert kid.mean == kernel_distance(completed, real)
    assert by_length[48].base["gen/fid"].mean == pytest.approx(0, abs=1e-9)
    assert "gen/fid" not in by_length[48].reference | by_length[24].tuned
    assert any("6 completed images" in note for note in notes(compared))
