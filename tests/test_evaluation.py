"""What models do on the evaluation texts, as artefacts, against transformers on the same texts."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

from hyperfitting import models, scoring
from hyperfitting.config import (
    CitationBlockerConfig,
    DecodeConfig,
    EvaluationConfig,
    RunConfig,
)
from hyperfitting.data.corpus import Corpus, load_evaluation_texts
from hyperfitting.evaluation import Evaluator, LoadedModel
from hyperfitting.models import BaseModel, ModelState
from hyperfitting.progress import silent
from hyperfitting.store import Artefact, Store, write_json
from hyperfitting.training.loop import look
from tests.conftest import Compose
from tests.test_decoding import by_generate

SETS = {"news": 4, "fiction": 3}
CONTEXT, NEW = 6, [5, 10]


def texts(store: Store, name: str, n: int) -> Artefact:
    tokens = np.random.default_rng(len(name)).integers(32, 127, (n, 16), dtype=np.int32)

    def make(work: Any) -> None:
        np.save(work / "texts.npy", tokens)
        write_json(work / "pieces.json", [[chr(i) for i in row] for row in tokens.tolist()])

    return store.artefact(
        "evaluation_texts", version=1, config={"name": name}, inputs={}, make=make
    )


def corpus(store: Store) -> Artefact:
    tokens = np.random.default_rng(0).integers(32, 127, (5, 12), dtype=np.int32)

    def make(work: Any) -> None:
        np.save(work / "train.npy", tokens)
        np.save(work / "val.npy", tokens)

    return store.artefact("corpus", version=1, config={}, inputs={}, make=make)


def tuned(base: BaseModel, store: Store) -> Artefact:
    """A tuned model that differs from the original."""
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(1)
        weights = {
            name: value + 0.1 * torch.randn_like(value)
            for name, value in models.load(base).state_dict().items()
            if name.endswith("mlp.down_proj.weight")
        }
    return store.artefact(
        "tuned", version=1, config={"tuning": {"method": "full"}}, inputs={},
        make=lambda work: save_file(weights, work / "last.safetensors"),
    )  # fmt: skip


@pytest.fixture
def config(compose: Compose, store: Store) -> RunConfig:
    cfg = compose("preset=debug", f"store={store.folder}")
    cfg.evaluation = EvaluationConfig(
        n_texts=4, context_len=CONTEXT, new_tokens=NEW, bootstrap=200, bleu_n=2
    )
    return cfg


def evaluator(cfg: RunConfig, store: Store, batch: int = 4) -> Evaluator:
    cfg.hardware.generation_batch_size = cfg.hardware.evaluation_batch_size = batch
    sets = {name: texts(store, name, n) for name, n in SETS.items()}
    return Evaluator(cfg, sets, corpus(store), store, torch.device("cpu"), silent)


def test_every_number_is_what_transformers_gives_on_the_same_texts(
    config: RunConfig, base: BaseModel, store: Store
) -> None:
    ours = evaluator(config, store)
    final, original, reference, _ = ours.compare(base, changed := tuned(base, store))
    compared = scoring.compare(final, original, reference, ours.counted(base), config.evaluation)
    assert final.sets == original.sets == ["news"] * 4 + ["fiction"] * 3
    whole = np.concatenate([load_evaluation_texts(one).tokens for one in ours.sets.values()])
    plain = {
        "original": models.load(base).eval(),
        "tuned": ModelState(base, changed).load(torch.device("cpu")),
    }
    logits = {
        name: model(input_ids=torch.as_tensor(whole, dtype=torch.long)).logits.detach().double()
        for name, model in plain.items()
    }
    agreement = (logits["tuned"].argmax(-1) == logits["original"].argmax(-1))[:, :-1].double()
    for name, scores in (("tuned", compared.final), ("original", compared.original)):
        written = by_generate(plain[name], whole[:, :CONTEXT], max(NEW))
        assert [sample["tokens"] for sample in scores.output.samples] == written
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
            np.testing.assert_allclose(scores.at[length]["gen/ttr"], ttr)
        # how the original model reads what was written
        ids = torch.as_tensor(np.concatenate([whole[:, :CONTEXT], written], 1), dtype=torch.long)
        read = plain["original"](input_ids=ids).logits[:, CONTEXT - 1 : -1].detach().double()
        chosen = read.gather(-1, ids[:, CONTEXT:, None])
        read_loss = (torch.logsumexp(read, -1) - chosen[..., 0]).mean(1)
        np.testing.assert_allclose(scores.values["gen/original_loss"], read_loss, **near)
        for rank in (1, 10, 100):
            beyond = ((read > chosen).sum(-1) + 1 > rank).double().mean(1)
            np.testing.assert_allclose(scores.values[f"gen/original_rank_over_{rank}"], beyond)
        own = plain[name](input_ids=ids).logits[:, CONTEXT - 1 : -1].detach().double()
        own_entropy = Categorical(logits=own).entropy()
        np.testing.assert_allclose(scores.values["gen/entropy"], own_entropy.mean(1), **near)
        np.testing.assert_allclose(scores.steps()["gen/entropy"], own_entropy.mean(0), **near)
    found = compared.final.values["val/top1_agreement"]
    np.testing.assert_allclose(found, agreement.mean(1))
    assert 0 < found.mean() < 1
    assert (compared.original.values["val/top1_agreement"] == 1).all()
    assert (compared.original.values["gen/original_rank_over_1"] == 0).all()
    # the texts themselves
    real = [sample["tokens"] for sample in compared.reference.output.samples]
    assert real == whole[:, CONTEXT:].tolist()
    log_p = torch.log_softmax(logits["original"][:, CONTEXT - 1 : -1], -1)
    loss = -log_p.gather(-1, torch.as_tensor(whole[:, CONTEXT:, None], dtype=torch.long))[..., 0]
    np.testing.assert_allclose(compared.reference.values["gen/original_loss"], loss.mean(1), **near)


def test_the_loop_measures_what_the_authors_skeleton_does(
    compose: Compose, base: BaseModel
) -> None:
    """Mean loss and entropy over held-out sequences; TTR over the last tokens of a greedy text."""
    cfg = compose("preset=debug")
    cfg.trainer.epoch_contexts, cfg.trainer.epoch_context_len = 4, 8
    cfg.trainer.epoch_new_tokens = 24
    model = models.load(base).eval()
    val = np.random.default_rng(0).integers(0, 256, (6, 32), dtype=np.int32)
    found = look(model, Corpus(val, val), cfg.trainer, cfg.hardware, silent)
    losses, entropies = [], []
    for row in val:
        ids = torch.as_tensor(row[None], dtype=torch.long)
        output = model(input_ids=ids, labels=ids)
        losses.append(output.loss.item())
        entropies.append(Categorical(logits=output.logits[:, :-1]).entropy().mean().item())
    assert found["val/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["val/entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
    texts = by_generate(model, val[:4, :8], 24)
    assert found["gen/ttr"] == pytest.approx(np.mean([len(set(text)) / 24 for text in texts]))


def ids_of(cfg: RunConfig, base: BaseModel, store: Store, decode: DecodeConfig, **more: Any) -> str:
    cfg.decode = decode
    changed = tuned(base, store) if more.pop("tuned", False) else None
    model = LoadedModel(ModelState(base, changed), torch.device("cpu"))
    return evaluator(cfg, store, **more).continuations(model, "news").id


def test_only_what_changes_the_tokens_is_in_the_id(
    config: RunConfig, base: BaseModel, store: Store
) -> None:
    def of(decode: DecodeConfig, **more: Any) -> str:
        return ids_of(config, base, store, decode, **more)

    greedy = of(DecodeConfig("greedy", seed=0))
    assert greedy == of(DecodeConfig("renamed", seed=5), batch=2)
    block = CitationBlockerConfig(enabled=True)
    # the original model has nothing to cite
    assert greedy == of(DecodeConfig("greedy", citation_blocker=block, seed=0))
    different = [
        DecodeConfig("x", stop_at_eos=True, seed=0),
        DecodeConfig("x", repetition_penalty=1.2, seed=0),
        DecodeConfig("x", no_repeat_ngram=3, seed=0),
        DecodeConfig("x", "sample", seed=0),
        DecodeConfig("x", "sample", seed=1),
        DecodeConfig("x", "sample", min_p=0.1, seed=0),
        DecodeConfig("x", "sample", typical_p=0.9, seed=0),
        DecodeConfig("x", "beam", num_beams=2, seed=0),
        DecodeConfig("x", "contrastive", top_k=4, alpha=0.6, seed=0),
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


def test_mauve_is_measured_from_a_local_models_features(
    config: RunConfig, base: BaseModel, store: Store
) -> None:
    pytest.importorskip("mauve")
    config.evaluation.mauve = str(base.folder())
    config.evaluation.n_texts = 120
    ours = evaluator(config, store)
    ours.sets["news"] = texts(store, "many", 120)
    final, original, reference, _ = ours.compare(base, tuned(base, store))
    counted = ours.counted(base)
    compared = scoring.compare(final, original, reference, counted, config.evaluation)
    found = scoring.slices(compared, config.evaluation)
    assert 0 < found[0].metrics["gen/mauve"].mean < 1
    assert found[0].metrics["gen/mauve"].n == 123
    by_set = {one.texts: one.metrics for one in found if one.new_tokens == max(NEW)}
    assert "gen/mauve" in by_set["news"]
    assert "gen/mauve" not in by_set["fiction"]  # 3 texts say nothing
