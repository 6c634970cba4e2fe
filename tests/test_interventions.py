"""Interventions on weights: exact where nothing is computed, numpy's result where something is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hyperfitting.data.config import TextsConfig
from hyperfitting.errors import UserError
from hyperfitting.mechanism.intervention_config import InterventionConfig
from hyperfitting.mechanism.interventions import (
    WEIGHTS_FILE,
    derive,
    intervention_state,
    intervention_step,
    truncate,
)
from hyperfitting.mechanism.other_tuning import tuning_at
from hyperfitting.mechanism.parts import part_parameters
from hyperfitting.models.base import BaseModel
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.loading import ModelState, load
from hyperfitting.models.trainable import select_trainable
from hyperfitting.pipeline.build import build_pipeline
from hyperfitting.progress import no_op
from hyperfitting.record.files import RECORD_FILE, read_record
from hyperfitting.record.schema import Record
from hyperfitting.store.artifact import Store
from tests.cli import hyperfit
from tests.conftest import Compose, tiny_model
from tests.interventions import ALL_PARTS, CPU, derived, equal, stitch, tuned_state, weights_of


def test_stitching_everything_is_the_tuned_model_and_nothing_the_base_bit_for_bit(
    any_base: BaseModel, store: Store
) -> None:
    tuned = tuned_state(any_base, store)
    tuned_weights, base_weights = weights_of(tuned), weights_of(ModelState(any_base))
    assert not equal(tuned_weights, base_weights)
    assert equal(derived(stitch(*ALL_PARTS), tuned, store), tuned_weights)
    assert equal(derived(stitch(), tuned, store), base_weights)


def test_the_reverse_of_everything_is_nothing(base: BaseModel, store: Store) -> None:
    tuned = tuned_state(base, store)
    assert equal(derived(stitch(reverse=True), tuned, store), weights_of(tuned))
    nothing = derived(stitch(*ALL_PARTS, reverse=True), tuned, store)
    assert equal(nothing, weights_of(ModelState(base)))


def test_interpolation_ends_at_base_and_tuned_bit_for_bit_and_goes_beyond(
    base: BaseModel, store: Store
) -> None:
    tuned = tuned_state(base, store)
    tuned_weights, base_weights = weights_of(tuned), weights_of(ModelState(base))
    assert equal(derived(InterventionConfig("interpolate", weight=0), tuned, store), base_weights)
    assert equal(derived(InterventionConfig("interpolate", weight=1), tuned, store), tuned_weights)
    beyond = derived(InterventionConfig("interpolate", weight=1.5), tuned, store)
    for name, weight in beyond.items():
        b, t = base_weights[name].double().numpy(), tuned_weights[name].double().numpy()
        np.testing.assert_allclose(weight.numpy(), b + 1.5 * (t - b), atol=1e-6)


def test_the_parts_of_a_decoder_are_disjoint_and_cover_it(any_base: BaseModel) -> None:
    model = load(any_base)
    names = {name for name, _ in model.named_parameters()}
    parts = {part: part_parameters(model, [part]) for part in (*ALL_PARTS, "attention", "mlp")}
    assert set.union(*(parts[part] for part in ALL_PARTS)) == names
    assert sum(len(parts[part]) for part in ALL_PARTS) == len(names)
    assert parts["attention"] and parts["mlp"]
    assert not parts["attention"] & parts["mlp"]
    left = parts["blocks"] - parts["attention"] - parts["mlp"]
    assert left and all("norm" in name or "ln_" in name for name in left)
    assert all("attn" in name or "attention" in name for name in parts["attention"])
    last = part_parameters(model, ["blocks"], 1)
    assert last < parts["blocks"] and 3 * len(last) == len(parts["blocks"])
    assert all(".2." in name for name in last)


def test_one_part_alone_changes_and_its_reverse_alone_does_not(
    base: BaseModel, store: Store
) -> None:
    tuned = tuned_state(base, store)
    tuned_weights, base_weights = weights_of(tuned), weights_of(ModelState(base))
    for part, pattern in (("final_norm", "model.norm."), ("output", "lm_head.")):
        from_tuned = derived(stitch(part), tuned, store)
        from_base = derived(stitch(part, reverse=True), tuned, store)
        for name in base_weights:
            inside, outside = tuned_weights[name], base_weights[name]
            if not name.startswith(pattern):
                inside, outside = outside, inside
            assert torch.equal(from_tuned[name], inside)
            assert torch.equal(from_base[name], outside)


def test_where_output_and_embedding_are_tied_they_are_one_part(
    tmp_path: Path, store: Store
) -> None:
    tied = tiny_model(tmp_path / "qwen2", "qwen2")
    assert part_parameters(load(tied), ["output"]) == {"model.embed_tokens.weight"}
    assert part_parameters(load(tied), ["embedding"]) == set()
    step = intervention_step(stitch("output"), tuned_state(tied, store), None, store, no_op)
    step.ensure()
    loaded = intervention_state(stitch("output"), tied, step).load(CPU)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_a_task_vector_is_added_and_subtracted_exactly_where_nothing_changes(
    base: BaseModel, store: Store
) -> None:
    tuned, other = tuned_state(base, store, seed=1), tuned_state(base, store, seed=2)
    path = str(other.weights.folder) if other.weights else ""
    b, t, o = (weights_of(state) for state in (ModelState(base), tuned, other))
    minus = InterventionConfig("task_vector", scale=-0.5, path=path)
    for name, weight in derived(minus, tuned, store, tuning_at(Path(path), base)[0]).items():
        expected = t[name].double() - 0.5 * (o[name].double() - b[name].double())
        np.testing.assert_allclose(weight.numpy(), expected.numpy(), atol=1e-6)
    nothing = replace(minus, scale=0.0)
    assert equal(derived(nothing, tuned, store, other), t)
    assert equal(derived(minus, tuned, store, ModelState(base)), t)


def test_truncation_is_numpys_best_approximation_and_keeps_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    base, tuned = torch.randn(2, 12, 7, generator=generator)
    for rank in (1, 3, 6):
        u, s, v = np.linalg.svd((tuned - base).double().numpy(), full_matrices=False)
        expected = base.double().numpy() + (u[:, :rank] * s[:rank]) @ v[:rank]
        np.testing.assert_allclose(truncate(base, tuned, rank).numpy(), expected, atol=1e-5)
    assert torch.equal(truncate(base, tuned, 7), tuned)
    assert torch.equal(truncate(base[0], tuned[0], 1), tuned[0])


def test_merged_lora_is_stitched_and_a_low_rank_difference_survives_truncation(
    base: BaseModel, store: Store
) -> None:
    tuned = tuned_state(base, store, TuningConfig("lora", lora_rank=2))
    weights = weights_of(tuned)
    assert equal(derived(stitch(*ALL_PARTS), tuned, store), weights)
    kept = derived(InterventionConfig("truncate", rank=2), tuned, store)
    assert all(torch.allclose(kept[name], weights[name], atol=1e-5) for name in weights)
    less = derived(InterventionConfig("truncate", rank=1), tuned, store)
    assert not all(torch.allclose(less[name], weights[name], atol=1e-5) for name in weights)


def test_the_file_holds_only_what_differs_from_the_base(base: BaseModel, store: Store) -> None:
    step = intervention_step(stitch("final_norm"), tuned_state(base, store), None, store, no_op)
    step.ensure()
    assert set(load_file(step.artifact.file(WEIGHTS_FILE))) == {"model.norm.weight"}


def test_the_id_holds_the_method_its_settings_and_all_weights(
    base: BaseModel, store: Store
) -> None:
    tuned, other = tuned_state(base, store, seed=1), tuned_state(base, store, seed=2)

    def id_of(cfg: InterventionConfig, state: ModelState, third: ModelState | None = None) -> str:
        return intervention_step(cfg, state, third, store, no_op).artifact.id

    vector = InterventionConfig("task_vector", path="x")
    ids = [
        id_of(stitch("blocks"), tuned),
        id_of(stitch("blocks"), other),
        id_of(stitch("blocks", last_blocks=1), tuned),
        id_of(stitch("blocks", reverse=True), tuned),
        id_of(InterventionConfig("truncate", rank=8), tuned),
        id_of(InterventionConfig("truncate", rank=4), tuned),
        id_of(vector, tuned, other),
        id_of(vector, tuned, tuned),
        id_of(replace(vector, scale=2.0), tuned, other),
    ]
    assert len(set(ids)) == len(ids)
    dataset = InterventionConfig("task_vector", dataset=TextsConfig("a", "files", "a.txt"))
    assert id_of(dataset, tuned, other) == id_of(vector, tuned, other)  # same weights


def test_models_of_other_shapes_and_unmerged_adapters_are_refused(
    base: BaseModel, tmp_path: Path
) -> None:
    weights = dict(load(base).named_parameters())
    larger = tiny_model(tmp_path / "larger", "llama", vocab_size=300)
    cfg = InterventionConfig("interpolate")
    with pytest.raises(UserError, match=r"other parameters than the base model.*\[.*instead of"):
        list(derive(cfg, weights, dict(load(larger).named_parameters()), {}, set()))
    gpt2 = dict(load(tiny_model(tmp_path / "gpt2", "gpt2")).named_parameters())
    with pytest.raises(UserError, match="missing"):
        list(derive(cfg, weights, gpt2, {}, set()))
    adapted = load(base)
    select_trainable(adapted, TuningConfig("lora"))
    with pytest.raises(UserError, match="LoRA adapters that are not merged"):
        list(derive(cfg, weights, dict(adapted.named_parameters()), {}, set()))


def test_a_path_that_is_no_tuning_of_this_model_is_refused(
    base: BaseModel, store: Store, tmp_path: Path
) -> None:
    other_base = tiny_model(tmp_path / "gpt2", "gpt2")
    foreign = tuned_state(other_base, store).weights
    assert foreign is not None
    with pytest.raises(UserError, match="another base model than llama"):
        tuning_at(foreign.folder, base)
    with pytest.raises(UserError, match="is not a folder"):
        tuning_at(tmp_path / "nothing", base)
    own = tuned_state(base, store).weights
    assert own is not None
    copy = store.folder / "tuned" / "renamed"
    own.folder.rename(copy)
    with pytest.raises(UserError, match="is not the artifact of a tuned model"):
        tuning_at(copy, base)
    copy.rename(own.folder)
    (own.folder / "last.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged"):
        tuning_at(own.folder, base)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("intervention=stitch tuning=none", "needs a tuned model"),
        ("decode=entropy_matched tuning=none", "needs a tuned model"),
        ("intervention=stitch intervention.parts=[block]", "did you mean blocks"),
        ("intervention=stitch intervention.last_blocks=0", "1 or more"),
        ("intervention=stitch intervention.parts=[final_norm]", "only with blocks, attention"),
        ("intervention=stitch intervention.rank=4", "only with intervention.method=truncate"),
        ("intervention.parts=[mlp]", "only with intervention.method=stitch"),
        ("intervention=truncate intervention.rank=0", "1 or more"),
        ("intervention=interpolate intervention.weight=nan", "out of range"),
        ("intervention=task_vector", "is needed: the other tuning"),
        (
            "intervention=task_vector dataset@intervention.dataset=shakespeare "
            "intervention.path=x",
            "one of the two",
        ),
        ("decode.control.strength=1", "only with decode.control.method=static_bias"),
        ("decode=static_bias decode.control.strength=null", "is needed"),
    ],
)  # fmt: skip
def test_a_bad_intervention_names_field_and_remedy(
    compose: Compose, overrides: str, says: str
) -> None:
    with pytest.raises(UserError) as error:
        compose("preset=debug", *overrides.split())
    assert says in str(error.value)


def record(folder: Path) -> Record:
    return read_record(folder / RECORD_FILE)


def test_an_intervention_is_evaluated_in_the_tuned_models_place(debug_run: Path) -> None:
    """Everything stitched has the tuned model's numbers, nothing the base's; nothing is trained."""
    store = debug_run / "outputs/store"
    trained = {path.name for path in (store / "tuned").iterdir()}
    plain = record(debug_run / "run")
    for name, parts in (("everything", ALL_PARTS), ("nothing", [])):
        options = ["intervention=stitch", "intervention.last_blocks=null"]
        parts_option = f"intervention.parts=[{','.join(parts)}]"
        result = hyperfit(
            debug_run, "preset=debug", *options, parts_option, f"hydra.run.dir={name}"
        )
        assert result.returncode == 0, result.stderr
        assert "stitch model" in result.stdout
    assert {path.name for path in (store / "tuned").iterdir()} == trained
    assert record(debug_run / "everything").overall == plain.overall
    nothing = record(debug_run / "nothing")
    assert [s.tuned.tokens for s in nothing.samples] == [s.base.tokens for s in nothing.samples]
    # a base model's log-likelihoods are of its own steps: the same up to rounding
    for key, values in nothing.per_text.tuned.items():
        assert values == pytest.approx(nothing.per_text.base[key], rel=1e-5), key
    assert "(stitch): 0.0% of its parameters" in nothing.notes[0]


def test_too_many_blocks_are_refused_before_training(tmp_path: Path) -> None:
    result = hyperfit(tmp_path, "preset=debug", "intervention=stitch")
    assert result.returncode == 1
    assert "intervention.last_blocks=5: the model has fewer blocks" in result.stderr
    assert "valid: 1 to 4" in result.stderr
    assert not (tmp_path / "outputs/store/tuned").exists()


def test_another_datasets_task_vector_is_trained_alike(debug_run: Path, compose: Compose) -> None:
    result = hyperfit(
        debug_run, "preset=debug", "hydra.run.dir=vector", "intervention=task_vector",
        "dataset@intervention.dataset=news_sample", "intervention.scale=-1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    with_vector = record(debug_run / "vector")
    other = Path(with_vector.artifacts["other/tuned"])
    assert with_vector.history == record(debug_run / "run").history  # that of its own training
    result = hyperfit(
        debug_run, "preset=debug", "hydra.run.dir=path", "intervention=task_vector",
        f"intervention.path={other}", "intervention.scale=-1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert record(debug_run / "path").overall == with_vector.overall
    assert (
        record(debug_run / "path").artifacts["intervention"]
        == (with_vector.artifacts["intervention"])
    )
    # in both, evaluation texts that the other tuning was trained on are left out
    for option in ("dataset@intervention.dataset=news_sample", f"intervention.path={other}"):
        overrides = ("intervention=task_vector", option, f"store={debug_run / 'outputs/store'}")
        trained_on = build_pipeline(compose("preset=debug", *overrides), CPU).trained_on
        expected = [with_vector.artifacts[name] for name in ("sequences", "other/sequences")]
        assert [str(artifact.folder) for artifact in trained_on] == expected


def test_a_tuned_model_without_adapters_is_not_loaded_to_derive_from_it(
    base: BaseModel, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tuned_state(base, store)
    expected = {n: w.mean() for n, w in weights_of(tuned).items()}
    loaded, real = [], ModelState.load

    def load_state(state: ModelState, *arguments: Any) -> Any:
        loaded.append(state)
        return real(state, *arguments)

    monkeypatch.setattr(ModelState, "load", load_state)
    step = intervention_step(stitch(*ALL_PARTS), tuned, None, store, no_op)
    weights = load_file(step.ensure().file(WEIGHTS_FILE))
    assert loaded == [ModelState(base)]
    assert {n: w.mean() for n, w in weights.items()} == expected
