"""What models predict and generate on the evaluation texts, against transformers on them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

from hyperfitting.config import RunConfig
from hyperfitting.data.sequences import Sequences, load_evaluation_texts, load_sequences
from hyperfitting.decoding.config import CitationBlockerConfig, DecodeConfig
from hyperfitting.evaluation.artifacts import ModelArtifacts, continuations_step, model_artifacts
from hyperfitting.evaluation.config import EvaluationConfig
from hyperfitting.evaluation.outputs import contexts, model_output, reference_output
from hyperfitting.evaluation.scoring import Comparison, NgramCorpus, score
from hyperfitting.evaluation.setting import LazyModel, Setting
from hyperfitting.evaluation.slices import slices
from hyperfitting.metrics.per_text import row_means
from hyperfitting.models.base import BaseModel
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.loading import ModelState, load
from hyperfitting.progress import no_op
from hyperfitting.runtime.files import write_json
from hyperfitting.store.artifact import Artifact, Step, Store
from hyperfitting.training.validation import validate
from tests.conftest import Compose
from tests.test_decoding import by_generate

DATASETS = {"news": 4, "fiction": 3}
CONTEXT, NEW = 6, [5, 10]


def texts(store: Store, name: str, n: int) -> Artifact:
    tokens = np.random.default_rng(len(name)).integers(32, 127, (n, 16), dtype=np.int32)

    def build(work: Any) -> None:
        np.save(work / "texts.npy", tokens)
        write_json(work / "token_texts.json", [[chr(i) for i in row] for row in tokens.tolist()])

    artifact = store.artifact("evaluation_texts", version=1, config={"name": name}, inputs={})
    return Step(artifact, build).ensure()


def sequences(store: Store) -> Artifact:
    tokens = np.random.default_rng(0).integers(32, 127, (5, 12), dtype=np.int32)

    def build(work: Any) -> None:
        np.save(work / "train.npy", tokens)
        np.save(work / "val.npy", tokens)

    return Step(store.artifact("sequences", version=1, config={}, inputs={}), build).ensure()


def tuned_state(base: BaseModel, store: Store) -> ModelState:
    """A tuned model that differs from the base model."""
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(1)
        weights = {
            name: value + 0.1 * torch.randn_like(value)
            for name, value in load(base).state_dict().items()
            if name.endswith("mlp.down_proj.weight")
        }
    step = Step(
        store.artifact("tuned", version=1, config={}, inputs={}),
        lambda work: save_file(weights, work / "last.safetensors"),
    )
    return ModelState(base, TuningConfig(), step.ensure(), "last.safetensors")


@pytest.fixture
def config(compose: Compose, store: Store) -> RunConfig:
    cfg = compose("preset=debug", f"store={store.folder}")
    cfg.evaluation = EvaluationConfig(
        n_texts=4, context_len=CONTEXT, max_new_tokens=NEW, bootstrap=200, bleu_n=2
    )
    return cfg


def setting_of(cfg: RunConfig, store: Store, batch: int = 4, **more: Artifact) -> Setting:
    cfg.hardware.generation_batch_size = cfg.hardware.evaluation_batch_size = batch
    datasets = {name: texts(store, name, n) for name, n in DATASETS.items()} | more
    return Setting(
        cfg.evaluation, cfg.decode, cfg.hardware, datasets, sequences(store), store, no_op
    )


def lazy(state: ModelState) -> LazyModel:
    return LazyModel(state, torch.device("cpu"), None)


@dataclass
class Evaluated:
    references: np.ndarray
    tuned: ModelState
    comparison: Comparison


def evaluate(setting: Setting, base: BaseModel, features: bool = False) -> Evaluated:
    """Build everything that is asked of a tuned and the base model, and score it."""

    def built(artifacts: ModelArtifacts) -> ModelArtifacts:
        for _, step in artifacts.named():
            step.ensure()
        return artifacts

    state, base_model = tuned_state(base, setting.store), lazy(ModelState(base))
    reader = base_model if features else None
    tuned = built(model_artifacts(setting, lazy(state), base_model, reader))
    base_output = model_output(built(model_artifacts(setting, base_model, base_model, reader)))
    references = [load_evaluation_texts(artifact) for artifact in setting.texts.values()]
    comparison = score(
        model_output(tuned),
        base_output,
        reference_output(base_output, references, setting.evaluation),
        contexts(references, setting.evaluation),
        NgramCorpus(load_sequences(setting.sequences).train, None),
        setting.evaluation,
    )
    tokens = np.concatenate([dataset.tokens for dataset in references])
    return Evaluated(tokens, state, comparison)


def test_every_number_is_what_transformers_gives_on_the_same_texts(
    config: RunConfig, base: BaseModel, store: Store
) -> None:
    evaluated = evaluate(setting_of(config, store), base)
    comparison, whole = evaluated.comparison, evaluated.references
    labels = ["news"] * 4 + ["fiction"] * 3
    assert comparison.tuned.output.datasets == comparison.base.output.datasets == labels
    plain = {"base": load(base).eval(), "tuned": evaluated.tuned.load(torch.device("cpu"))}
    logits = {
        name: model(input_ids=torch.as_tensor(whole, dtype=torch.long)).logits.detach().double()
        for name, model in plain.items()
    }
    agreement = (logits["tuned"].argmax(-1) == logits["base"].argmax(-1))[:, :-1].double()
    for name, scores in (("tuned", comparison.tuned), ("base", comparison.base)):
        written = by_generate(plain[name], whole[:, :CONTEXT], max(NEW))
        assert [sample.tokens for sample in scores.output.continuations] == written
        log_p = torch.log_softmax(logits[name][:, :-1], -1)
        loss = -log_p.gather(-1, torch.as_tensor(whole[:, 1:, None], dtype=torch.long))[..., 0]
        near = {"rtol": 1e-4}
        np.testing.assert_allclose(scores.values["val/loss"], loss.mean(1), **near)
        context_loss = loss[:, : CONTEXT - 1].mean(1)
        np.testing.assert_allclose(scores.values["val/context_loss"], context_loss, **near)
        entropy = Categorical(logits=logits[name][:, :-1]).entropy().mean(1)
        np.testing.assert_allclose(scores.values["val/entropy"], entropy, **near)
        for length in NEW:
            ttr = [len(set(row[:length])) / length for row in written]
            np.testing.assert_allclose(scores.values_by_length[length]["gen/ttr"], ttr)
        # the base model's log-likelihoods of the continuations
        ids = torch.as_tensor(np.concatenate([whole[:, :CONTEXT], written], 1), dtype=torch.long)
        scored = plain["base"](input_ids=ids).logits[:, CONTEXT - 1 : -1].detach().double()
        chosen = scored.gather(-1, ids[:, CONTEXT:, None])
        base_loss = (torch.logsumexp(scored, -1) - chosen[..., 0]).mean(1)
        np.testing.assert_allclose(scores.values["gen/base_loss"], base_loss, **near)
        for rank in (1, 10, 100):
            beyond = ((scored > chosen).sum(-1) + 1 > rank).double().mean(1)
            np.testing.assert_allclose(scores.values[f"gen/base_rank_over_{rank}"], beyond)
        own = plain[name](input_ids=ids).logits[:, CONTEXT - 1 : -1].detach().double()
        own_entropy = Categorical(logits=own).entropy()
        np.testing.assert_allclose(scores.values["gen/entropy"], own_entropy.mean(1), **near)
        np.testing.assert_allclose(
            row_means(scores.output.step_stats["entropy"].T), own_entropy.mean(0), **near
        )
    measured = comparison.tuned.values["val/top1_agreement"]
    np.testing.assert_allclose(measured, agreement.mean(1))
    assert 0 < measured.mean() < 1
    assert (comparison.base.values["val/top1_agreement"] == 1).all()
    assert (comparison.base.values["gen/base_rank_over_1"] == 0).all()
    # the references
    references = [sample.tokens for sample in comparison.reference.output.continuations]
    assert references == whole[:, CONTEXT:].tolist()
    log_p = torch.log_softmax(logits["base"][:, CONTEXT - 1 : -1], -1)
    loss = -log_p.gather(-1, torch.as_tensor(whole[:, CONTEXT:, None], dtype=torch.long))[..., 0]
    np.testing.assert_allclose(comparison.reference.values["gen/base_loss"], loss.mean(1), **near)


def test_validation_is_that_of_the_authors_code(compose: Compose, base: BaseModel) -> None:
    """Mean loss and entropy over held-out sequences; TTR over the last tokens of a greedy text."""
    cfg = compose("preset=debug")
    cfg.trainer.val_prompts, cfg.trainer.val_prompt_len = 4, 8
    cfg.trainer.val_max_new_tokens = 24
    model = load(base).eval()
    val = np.random.default_rng(0).integers(0, 256, (6, 32), dtype=np.int32)
    metrics = validate(model, Sequences(val, val), cfg.trainer, cfg.hardware, no_op)
    losses, entropies = [], []
    for row in val:
        ids = torch.as_tensor(row[None], dtype=torch.long)
        output = model(input_ids=ids, labels=ids)
        losses.append(output.loss.item())
        entropies.append(Categorical(logits=output.logits[:, :-1]).entropy().mean().item())
    assert metrics["val/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["val/entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
    texts = by_generate(model, val[:4, :8], 24)
    assert metrics["gen/ttr"] == pytest.approx(np.mean([len(set(text)) / 24 for text in texts]))


def id_of(
    cfg: RunConfig, base: BaseModel, store: Store, decode: DecodeConfig, tuned: bool, batch: int
) -> str:
    cfg.decode = decode
    state = tuned_state(base, store) if tuned else ModelState(base)
    return continuations_step(setting_of(cfg, store, batch), lazy(state), "news").artifact.id


def test_only_what_changes_the_tokens_is_in_the_id(
    config: RunConfig, base: BaseModel, store: Store
) -> None:
    def of(decode: DecodeConfig, tuned: bool = False, batch: int = 4) -> str:
        return id_of(config, base, store, decode, tuned, batch)

    greedy = of(DecodeConfig("greedy", seed=0))
    assert greedy == of(DecodeConfig("renamed", seed=5), batch=2)
    block = CitationBlockerConfig(enabled=True)
    # the base model has no training data to quote
    assert greedy == of(DecodeConfig("greedy", citation_blocker=block, seed=0))
    different = [
        DecodeConfig("x", stop_at_eos=True, seed=0),
        DecodeConfig("x", repetition_penalty=1.2, seed=0),
        DecodeConfig("x", no_repeat_ngram_size=3, seed=0),
        DecodeConfig("x", "sample", seed=0),
        DecodeConfig("x", "sample", seed=1),
        DecodeConfig("x", "sample", min_p=0.1, seed=0),
        DecodeConfig("x", "sample", typical_p=0.9, seed=0),
        DecodeConfig("x", "beam", num_beams=2, seed=0),
        DecodeConfig("x", "contrastive", top_k=4, penalty_alpha=0.6, seed=0),
    ]
    assert len({greedy, *map(of, different)}) == 1 + len(different)
    plain = of(DecodeConfig("x", seed=0), tuned=True)
    blocked = [
        of(
            DecodeConfig("x", citation_blocker=CitationBlockerConfig(True, **fields), seed=0),
            tuned=True,
        )
        for fields in ({}, {"n": 4}, {"whole_words": False}, {"count_context": True})
    ]
    assert len({plain, *blocked}) == 5


def test_mauve_is_measured_with_a_models_features(
    config: RunConfig, base: BaseModel, store: Store
) -> None:
    pytest.importorskip("mauve")
    config.evaluation.n_texts = 120
    setting = setting_of(config, store, news=texts(store, "many", 120))
    comparison = evaluate(setting, base, features=True).comparison
    parts = slices(comparison, config.evaluation)
    assert 0 < parts[0].tuned["gen/mauve"].mean < 1
    assert parts[0].tuned["gen/mauve"].n == 123
    by_dataset = {s.dataset: s.tuned for s in parts if s.max_new_tokens == max(NEW)}
    assert "gen/mauve" in by_dataset["news"]
    assert "gen/mauve" not in by_dataset["fiction"]  # 3 texts say nothing
