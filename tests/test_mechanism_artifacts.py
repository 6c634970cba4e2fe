"""The measures as artifacts of a run, and what the record holds of them."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from hyperfitting.config import RunConfig
from hyperfitting.data.sequences import load_sequences
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.errors import UserError
from hyperfitting.evaluation import scoring
from hyperfitting.evaluation.artifacts import ModelArtifacts, model_artifacts
from hyperfitting.evaluation.config import EvaluationConfig
from hyperfitting.evaluation.outputs import contexts, model_output, reference_output
from hyperfitting.evaluation.scoring import Comparison, NgramCorpus
from hyperfitting.mechanism.artifacts import MechanismArtifacts, mechanism_artifacts
from hyperfitting.mechanism.config import MEASURES, MechanismConfig
from hyperfitting.mechanism.ranks import load_token_shift
from hyperfitting.mechanism.resampling import Resampling
from hyperfitting.mechanism.results import build_mechanism
from hyperfitting.mechanism.texts import TextSource
from hyperfitting.metrics.mechanism import METRICS
from hyperfitting.metrics.uncertainty import bootstrap_mean
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import ModelState
from hyperfitting.record.mechanism import Mechanism
from hyperfitting.runtime.config import HardwareConfig
from hyperfitting.runtime.files import write_json
from hyperfitting.store.artifact import Artifact, Step, Store
from tests.conftest import Compose
from tests.test_evaluation import lazy, load_evaluation_texts, setting_of, tuned_state


class Measured:
    """All measures of a tuned model, with the scores of the same texts."""

    def __init__(self, cfg: RunConfig, base: BaseModel, store: Store) -> None:
        self.setting = setting_of(cfg, store)
        self.base, self.tuned = lazy(ModelState(base)), lazy(tuned_state(base, store))
        models = {"base": self.base, "tuned": self.tuned}
        written = {s: self.evaluated(m) for s, m in models.items()}
        self.artifacts = self.steps(written, loop_ngram=1)
        for _, step in self.artifacts.named():
            step.ensure()
        self.comparison = self.compare(written)
        self.mechanism: Mechanism = build_mechanism(self.artifacts, self.comparison, chr, 300)

    def evaluated(self, model) -> ModelArtifacts:
        artifacts = model_artifacts(self.setting, model, self.base, None)
        for _, step in artifacts.named():
            step.ensure()
        return artifacts

    def steps(self, written: Mapping[str, ModelArtifacts], **fields: object) -> MechanismArtifacts:
        cfg = MechanismConfig(**{"measures": list(MEASURES), **fields})
        continuations = {side: artifacts.written for side, artifacts in written.items()}
        return mechanism_artifacts(cfg, self.setting, self.base, self.tuned, continuations)

    def compare(self, written: Mapping[str, ModelArtifacts]) -> Comparison:
        base = model_output(written["base"])
        references = [load_evaluation_texts(a) for a in self.setting.texts.values()]
        return scoring.score(
            model_output(written["tuned"]),
            base,
            reference_output(base, references, self.setting.evaluation),
            contexts(references, self.setting.evaluation),
            NgramCorpus(load_sequences(self.setting.sequences).train, None),
            self.setting.evaluation,
        )


@pytest.fixture(scope="module")
def measured(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    groups = SimpleNamespace(
        evaluation=EvaluationConfig(
            n_texts=4, context_len=6, max_new_tokens=[10], bootstrap=200, bleu_n=2
        ),
        decode=DecodeConfig("greedy", seed=0),
        hardware=HardwareConfig(),
    )
    return Measured(cast(RunConfig, groups), base, Store(tmp_path_factory.mktemp("store")))


def test_a_record_has_all_measures(measured: Measured) -> None:
    mechanism = measured.mechanism
    assert Mechanism.model_validate_json(mechanism.model_dump_json()) == mechanism
    measures = {key for key in METRICS if key.startswith("mech/")} - {"mech/changed"}  # per step
    # random bytes have names, digits, … by chance, and every metric is one of the registry
    assert measures >= set(mechanism.estimates)
    missing = measures - set(mechanism.estimates)
    assert all(key.startswith("mech/changed_") for key in missing)
    layers = ["embedding", "block 1", "block 2", "block 3", "final norm"]
    for texts in ("reference", "tuned", "base"):
        assert mechanism.per_layer[f"{texts}/l2"].layers == layers
    # what is tuned are the MLPs: the states that enter the first block are equal
    assert mechanism.per_layer["reference/l2"].mean[0] == 0
    assert all(value > 0 for value in mechanism.per_layer["reference/l2"].mean[1:])
    changed = mechanism.per_layer["weights/mlp.down_proj.weight"].mean
    assert all(value > 0 for value in changed)
    assert mechanism.per_layer["weights/mlp.up_proj.weight"].mean == [0, 0, 0]
    spectral = mechanism.per_layer["weights_spectral/mlp.down_proj.weight"].mean
    of_base, of_tuned = (
        [block.mlp.down_proj.weight.detach().double().numpy() for block in model().model.layers]
        for model in (measured.base, measured.tuned)
    )
    assert spectral == pytest.approx(
        [
            np.linalg.norm(tuned - base, 2) / np.linalg.norm(base, 2)
            for base, tuned in zip(of_base, of_tuned, strict=True)
        ]
    )
    decided = mechanism.per_layer["lens/tuned_final_choice"].mean
    assert decided == sorted(decided) and decided[-1] == 1
    assert mechanism.per_layer["lens/diverged"].mean[-1] == 1
    assert len(mechanism.per_step["mech/margin_base_tuned"]) == 10


def test_the_choices_are_those_whose_ranks_every_run_has(measured: Measured) -> None:
    """The new pass over both models agrees with the log-likelihoods that exist without it."""
    (step,) = measured.artifacts.ranks.values()
    choice = load_token_shift(step.artifact).base_choice
    output = measured.comparison.tuned.output
    tokens = np.array([text.tokens for text in output.continuations])
    rank = output.base_loglikelihoods["rank"]
    np.testing.assert_array_equal(choice != tokens, rank > 1)
    mechanism = measured.mechanism
    assert mechanism.ranks is not None
    assert sum(mechanism.ranks.counts) == (rank > 1).sum() > 0
    by_step = mechanism.per_step["mech/changed"]
    assert by_step == pytest.approx((rank > 1).mean(0))
    share = measured.comparison.tuned.values["gen/base_rank_over_1"].mean()
    assert np.mean([value or 0 for value in by_step]) == pytest.approx(share)
    over_10 = mechanism.estimates["mech/changed_over_10"].mean
    assert over_10 == pytest.approx((rank > 10).sum() / (rank > 1).sum())
    assert mechanism.estimates["mech/changed_max_rank"].mean == rank.max()
    classes = mechanism.ranks.classes.values()
    assert sum(c.tuned for c in classes) == pytest.approx(1)
    assert sum(c.base for c in classes) == pytest.approx(1)
    for token in mechanism.ranks.gained:
        assert token.tuned == (tokens == token.id).sum() > token.base == (choice == token.id).sum()


def test_an_id_holds_what_changes_the_numbers_and_nothing_else(measured: Measured) -> None:
    written = {s: measured.evaluated(getattr(measured, s)) for s in ("base", "tuned")}

    def ids(**fields: object) -> dict[str, str]:
        steps = measured.steps(written, **fields)
        return {name: step.artifact.id for name, step in steps.named()}

    first = ids()
    assert len(set(first.values())) == len(first)
    measured.setting.hardware.evaluation_batch_size = 1
    assert ids() == first
    readers = {
        "skip_tokens": "geometry", "outlier_dims": "geometry", "lens_texts": "lens",
        "loop_texts": "loops", "loop_ngram": "loops",
    }  # fmt: skip
    for name, measure in readers.items():
        other = ids(**{name: 7})
        assert {n for n in first if other[n] != first[n]} == {
            n for n in first if n.startswith(f"{measure}/")
        }


def test_the_first_texts_are_those_of_each_dataset(measured: Measured) -> None:
    texts = TextSource(measured.setting, measured.base, "reference", {}).load()
    assert texts.datasets == ["news"] * 4 + ["fiction"] * 3
    assert texts.first(2).datasets == ["news"] * 2 + ["fiction"] * 2
    assert texts.first(2).tokens.tolist() == texts.tokens[[0, 1, 4, 5]].tolist()


def test_texts_that_are_trained_on_are_left_out(measured: Measured, store: Store) -> None:
    tokenizer = measured.base.state.base.tokenizer()
    letters = np.random.default_rng(0).integers(97, 123, (3, 20))
    words = [" ".join(map(chr, row)) for row in letters.tolist()]
    tokens = np.array(tokenizer(words, add_special_tokens=False).input_ids, np.int32)  # (3, 39)

    def build_texts(work: Path) -> None:
        np.save(work / "texts.npy", tokens)
        write_json(work / "token_texts.json", [list(text) for text in words])

    def sequences(row: int) -> Artifact:
        def build(work: Path) -> None:
            np.save(work / "train.npy", tokens[[row]])
            np.save(work / "val.npy", tokens[:1])

        artifact = store.artifact("sequences", version=1, config={"row": row}, inputs={})
        return Step(artifact, build).ensure()

    artifact = store.artifact("evaluation_texts", version=1, config={}, inputs={})
    news = Step(artifact, build_texts).ensure()
    setting = replace(measured.setting, texts={"news": news}, sequences=sequences(1))
    source = TextSource(setting, measured.base, "reference", {})
    assert source.load().tokens.tolist() == tokens[[0, 2]].tolist()
    assert source.load().lengths.tolist() == [39, 39]
    # so are those of the tuning that a task vector is of
    other = replace(setting, other_sequences=(sequences(2),))
    with_other = TextSource(other, measured.base, "reference", {})
    assert with_other.load().tokens.tolist() == tokens[[0]].tolist()
    assert with_other.inputs != source.inputs


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mechanism=all", "tuning=none"], "needs a tuned model"),
        (["mechanism.measures=[geometri]"], "did you mean geometry"),
        (["mechanism.skip_tokens=2"], "changes nothing without the measure geometry"),
        (["mechanism=all", "mechanism.outlier_dims=-1"], "0 or more"),
        (["mechanism=all", "mechanism.skip_tokens=16"], "below evaluation.context_len=16"),
    ],
)
def test_a_config_that_cannot_be_measured_is_refused(
    compose: Compose, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compose("preset=debug", *overrides)


def test_by_default_nothing_is_measured(compose: Compose) -> None:
    assert compose("preset=debug").mechanism.measures == []
    everything = compose("preset=debug", "mechanism=all").mechanism
    assert asdict(everything) == asdict(MechanismConfig(list(MEASURES)))


def test_intervals_are_those_of_scipys_bootstrap() -> None:
    values = np.random.default_rng(0).gamma(2, size=40)
    values[3] = np.nan
    ours, scipys = Resampling(40, 5000).mean(values), bootstrap_mean(values, 5000)
    assert ours is not None
    assert scipys is not None
    assert (ours.mean, ours.n) == (pytest.approx(scipys.mean), scipys.n)
    assert ours.ci95 == pytest.approx(scipys.ci95, abs=0.03)


def test_resampled_squared_norms_vary_as_those_of_new_texts_do() -> None:
    """Their spread is that of other samples of texts, and they are not too large on average."""
    random = np.random.default_rng(0)
    n, d = 60, 8

    def gram() -> np.ndarray:
        x = random.standard_normal((n, 25, d)) * np.linspace(0.5, 1.5, d)
        x *= random.uniform(0.5, 1.5, (n, 1, 1))
        scatter = np.einsum("nta,ntb->nab", x, x).reshape(n, -1)
        return scatter @ scatter.T

    new_samples = np.array([gram().sum() for _ in range(300)])
    relative = new_samples.std() / new_samples.mean()
    resampled = [Resampling(n, 400).squared_norms(gram()) for _ in range(10)]
    assert np.mean([norms.std() for norms in resampled]) == pytest.approx(relative, rel=0.15)
    assert np.mean([norms.mean() for norms in resampled]) == pytest.approx(1, abs=0.01)
