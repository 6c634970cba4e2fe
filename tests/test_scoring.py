"""Scores from model outputs, by dataset and length, also where texts have no value."""

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from hyperfitting.data.sequences import SplitSizes
from hyperfitting.evaluation.config import EvaluationConfig
from hyperfitting.evaluation.record_builder import RunResult, build_record, predictions
from hyperfitting.evaluation.scoring import (
    Comparison,
    ModelOutput,
    NgramCorpus,
    TokenizedText,
    score,
)
from hyperfitting.evaluation.slices import notes, per_text, slices
from hyperfitting.metrics.bleu import dataset_bleu, self_bleu
from hyperfitting.metrics.diversity import ROLLING_WINDOW
from hyperfitting.metrics.overlap import histogram
from hyperfitting.metrics.registry import METRICS, metric
from hyperfitting.metrics.uncertainty import bootstrap_mean, paired_difference
from hyperfitting.record.files import read_predictions, read_record, write_record
from hyperfitting.record.schema import ModelInfo
from hyperfitting.store.artifact import Store
from tests.records import make_config

RNG = np.random.default_rng(0)
TRAIN = RNG.integers(0, 5, (6, 20))
CONTEXTS = [TokenizedText([i] * 4, [f" c{i}"] * 4) for i in range(20)]
EVALUATION = EvaluationConfig(context_len=4, max_new_tokens=[6, 12], bootstrap=200, bleu_n=3)


def model_output(texts: list[list[int]], datasets: list[str], seed: int) -> ModelOutput:
    rng = np.random.default_rng(seed)
    n = len(texts)
    past_end = np.arange(12) >= np.array([len(text) for text in texts])[:, None]
    step_stats = {
        name: np.where(past_end, np.nan, rng.random((n, 12))) for name in ("entropy", "top1_mass")
    }
    ranks = np.where(past_end, np.nan, rng.integers(1, 300, (n, 12)))
    names = ("loss", "entropy", "top1_mass", "top3_mass", "top5_mass")
    token_stats = {name: rng.random((n, 15)) for name in names}
    return ModelOutput(
        datasets,
        token_stats | {name: rng.integers(1, 3, (n, 15)) for name in ("top1", "rank")},
        step_stats,
        {"loss": np.where(past_end, np.nan, rng.random((n, 12))), "rank": ranks},
        [TokenizedText(text, [f" w{t}" for t in text]) for text in texts],
    )


def compare(
    tuned: list[list[int]], base: list[list[int]], datasets: list[str], corpus: NgramCorpus
) -> Comparison:
    outputs = [
        model_output(texts, datasets, seed) for seed, texts in enumerate((tuned, base, base))
    ]
    return score(*outputs, CONTEXTS[: len(tuned)], corpus, EVALUATION)


def random_texts(n: int, length: int = 12) -> list[list[int]]:
    return RNG.integers(0, 5, (n, length)).tolist()


def test_slices_are_the_metrics_of_their_texts_cut_to_their_length() -> None:
    datasets = ["news"] * 4 + ["fiction"] * 3
    tuned, base = random_texts(7), random_texts(7)
    parts = slices(compare(tuned, base, datasets, NgramCorpus(TRAIN, None)), EVALUATION)
    assert [(part.dataset, part.max_new_tokens) for part in parts] == [
        (name, length) for length in (12, 6) for name in (None, "news", "fiction")
    ]
    for part in parts:
        rows = [i for i, name in enumerate(datasets) if part.dataset in (None, name)]
        by_tuned = [tuned[i][: part.max_new_tokens] for i in rows]
        by_base = [base[i][: part.max_new_tokens] for i in rows]
        for key, function in (
            ("gen/self_bleu", lambda texts: self_bleu(texts, 3)),
            ("gen/dataset_bleu", lambda texts: dataset_bleu(texts, list(TRAIN), 3)),
            ("gen/ttr", lambda texts: [len(set(text)) / len(text) for text in texts]),
        ):
            assert part.tuned[key] == bootstrap_mean(function(by_tuned), 200)
            assert part.base[key] == bootstrap_mean(function(by_base), 200)
            assert part.difference[key] == paired_difference(
                function(by_tuned), function(by_base), 200
            )
        assert ("val/loss" in part.tuned) == (part.max_new_tokens == 12)
        assert not any(key.startswith("val/") for key in part.reference)
        loss, perplexity = part.tuned["gen/base_loss"], part.tuned["gen/base_perplexity"]
        assert perplexity.mean == pytest.approx(math.exp(loss.mean))
        assert part.difference["gen/base_perplexity"].p == part.difference["gen/base_loss"].p


def test_ranks_are_shares_of_tokens() -> None:
    comparison = compare(random_texts(3), random_texts(3), ["a"] * 3, NgramCorpus(TRAIN, None))
    ranks = comparison.tuned.output.base_loglikelihoods["rank"]
    for k in (1, 10, 100):
        np.testing.assert_allclose(
            comparison.tuned.values[f"gen/base_rank_over_{k}"], (ranks > k).mean(axis=1)
        )


def test_validation_metrics_are_means_over_the_reference_texts() -> None:
    comparison = compare(random_texts(3), random_texts(3), ["a"] * 3, NgramCorpus(TRAIN, None))
    values, stats = comparison.tuned.values, comparison.tuned.output.token_stats
    for name in ("loss", "entropy", "top1_mass", "top3_mass", "top5_mass"):
        np.testing.assert_allclose(values[f"val/{name}"], stats[name].mean(axis=1))
    # the first token of a context is not predicted: 3 of 4 context tokens are
    np.testing.assert_allclose(values["val/context_loss"], stats["loss"][:, :3].mean(axis=1))
    base = comparison.base.output.token_stats["top1"]
    np.testing.assert_allclose(values["val/top1_agreement"], (stats["top1"] == base).mean(axis=1))
    assert comparison.base.values["val/top1_agreement"].tolist() == [1, 1, 1]


def test_an_empty_continuation_has_no_values_and_a_note_says_so() -> None:
    tuned = [[], *random_texts(2), [1, 2, 3]]
    comparison = compare(tuned, random_texts(4), ["a", "a", "a", "b"], NgramCorpus(TRAIN, None))
    overall = slices(comparison, EVALUATION)[0]
    for key in overall.tuned:
        if key.startswith("gen/") and not key.endswith("_4"):  # three tokens have no 4-gram
            assert overall.tuned[key].n == 3, key
            assert overall.difference[key].n == 3, key
    assert overall.tuned["val/loss"].n == 4
    values = per_text(comparison.tuned)
    assert values["gen/ttr"][0] is None
    assert values["gen/rep_4"][3] is None
    first, second = notes(comparison)
    assert "1 of 4 continuations of the tuned model are empty" in first
    assert "b has one text" in second
    single = next(part for part in slices(comparison, EVALUATION) if part.dataset == "b")
    assert "gen/self_bleu" not in single.tuned  # no other text to compare with
    assert single.tuned["gen/ttr"].ci95 is None
    assert single.difference["gen/ttr"].p is None


def test_shorter_references_are_noted() -> None:
    corpus = NgramCorpus(TRAIN, None)
    texts = random_texts(3)
    outputs = [
        model_output(side, ["a"] * 3, 0) for side in (texts, texts, [text[:8] for text in texts])
    ]
    comparison = score(*outputs, CONTEXTS[:3], corpus, EVALUATION)
    assert any("have 8 tokens only" in note for note in notes(comparison))
    assert notes(compare(texts, texts, ["a"] * 3, corpus)) == []


def test_words_are_counted_if_the_unit_is_words() -> None:
    words = NgramCorpus(TRAIN, lambda tokens: " ".join(f"w{t}" for t in tokens))
    tokens = NgramCorpus(TRAIN, None)
    texts = random_texts(4)
    # every token is one word here: both units give the same
    for a, b in zip(
        slices(compare(texts, texts, ["a"] * 4, words), EVALUATION),
        slices(compare(texts, texts, ["a"] * 4, tokens), EVALUATION),
        strict=True,
    ):
        assert a == b
    assert words.units(["The", " cat", "'s", " hat", "."], []) == words.units(
        ["The cat's hat."], []
    )
    assert len(words.units(["The", " cat", "'s", " hat", "."], [])) == 4


def test_overlaps_are_located_and_counted() -> None:
    copied = [TRAIN[2][3:15].tolist(), random_texts(1)[0]]
    comparison = compare(copied, random_texts(2), ["a", "a"], NgramCorpus(TRAIN, None))
    overlap = comparison.tuned.overlap
    assert (overlap.length[0], overlap.sequence[0], overlap.offset[0]) == (12, 2, 3)
    assert histogram(overlap.length)[12] == 1
    assert comparison.tuned.values["gen/dataset_overlap_over_10"].tolist() == [1, 0]


def test_every_metric_is_scored_described_and_formatted() -> None:
    # by the trainer; by 100 texts or more; at each step; of answers; by patching; of both models
    elsewhere = {"train/loss", "train/accuracy", "gen/n_tokens", f"gen/ttr_last_{ROLLING_WINDOW}"}
    elsewhere |= {key for key in METRICS if key.startswith(("mech/", "down/"))}
    patched = {key for key in METRICS if key.startswith("patch/")}
    of_images = {key for key, entry in METRICS.items() if entry.modality == "image"}
    measured_elsewhere = {*elsewhere, *patched, *of_images, "gen/mauve"}
    comparison = compare(random_texts(3), random_texts(3), ["a"] * 3, NgramCorpus(TRAIN, None))
    overall = slices(comparison, EVALUATION)[0]
    assert set(overall.tuned) == set(METRICS) - measured_elsewhere
    assert list(overall.tuned) == [key for key in METRICS if key in overall.tuned]
    assert set(per_text(comparison.tuned)) == set(overall.tuned)
    for key, entry in METRICS.items():
        assert entry.key == key
        assert entry.label
        assert entry.description
        assert float(entry.format.format(2)) == 2
        sources = (entry.per_text, entry.per_set, entry.exp_of or None)
        expected = key not in elsewhere
        assert sum(source is not None for source in sources) == expected


def test_a_key_of_another_tool_is_labelled_by_itself() -> None:
    assert metric("val/loss").axis_label == "validation loss, nats"
    assert metric("custom/score").axis_label == "custom/score"


def test_a_record_holds_the_comparison_and_is_read_back_as_written(
    store: Store, tmp_path: Path
) -> None:
    tuned = [[], *random_texts(2)]
    datasets = ["a", "a", "b"]
    comparison = compare(tuned, random_texts(3), datasets, NgramCorpus(TRAIN, None))
    documents = store.artifact("documents", version=1, config={}, inputs={"source": "x@1"})
    unbuilt = store.artifact("tuned", version=1, config={}, inputs={})
    with documents.building():
        pass
    resumed = store.artifact("resumed", version=1, config={}, inputs={})
    with pytest.raises(KeyError), resumed.building():
        raise KeyError
    with resumed.building():
        pass
    result = RunResult(
        mechanism=None,
        image=None,
        downstream=None,
        chat=None,
        config=make_config(dataset={"name": "news"}),
        comparison=comparison,
        history=[{"epoch": 1, "step": 3, "train/loss": 0.5}],
        next_tokens={},
        model=ModelInfo(name="m", id="0", location="here"),
        split_sizes=SplitSizes(9, 8, 7, 2, 1, 5, 1),
        artifacts={"documents": documents, "tuned": unbuilt, "resumed": resumed},
        notes=["of the data"],
        seconds=1.234,
        device="cpu",
        generation_batches={"tuned/continuations/a": [2, 1]},
    )
    record = build_record(result, EVALUATION)
    assert (record.dataset.fingerprint, record.dataset.source) == (documents.id, "x@1")
    assert record.model.location == "here"
    assert (record.timings.run_seconds, set(record.timings.build_seconds)) == (1.23, {"documents"})
    finished = datetime.fromisoformat(str(record.timings.finished_at))
    assert abs(datetime.now(UTC) - finished) < timedelta(minutes=1)
    assert record.generation_batches == {"tuned/continuations/a": [2, 1]}
    assert record.notes == ["of the data", *notes(comparison)]
    assert record.slices == slices(comparison, EVALUATION)
    assert record.per_text.tuned == per_text(comparison.tuned)
    entropy = np.nanmean(comparison.tuned.output.step_stats["entropy"], axis=0)
    assert record.per_step.tuned["gen/entropy"] == pytest.approx(entropy)
    assert record.dataset.near_duplicate_train_sequences == 1
    assert [sample.dataset for sample in record.samples] == datasets
    assert [sample.context.tokens for sample in record.samples] == [[i] * 4 for i in range(3)]
    references = comparison.reference.output.continuations
    assert [s.reference.tokens for s in record.samples] == [text.tokens for text in references]
    assert record.samples[0].context.text == " c0" * 4
    for sample, tokens in zip(record.samples, tuned, strict=True):
        assert sample.tuned.tokens == tokens
        assert sample.tuned.text == "".join(f" w{token}" for token in tokens)
    assert record.overlap_histogram.tuned == histogram(comparison.tuned.overlap.length)

    write_record(tmp_path, record, predictions(comparison))
    assert read_record(tmp_path / "results.json") == record
    arrays = read_predictions(tmp_path)
    assert arrays is not None
    for side, scores in (("tuned", comparison.tuned), ("base", comparison.base)):
        for name, values in scores.output.token_stats.items():
            np.testing.assert_array_equal(arrays[f"{side}/{name}"], values)
