"""Tuned model and validation as artifacts: what rebuilds which of them, and kills in between."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hyperfitting.models.base import BaseModel
from hyperfitting.store.artifact import Artifact, Store
from hyperfitting.training import artifact as artifact_module
from hyperfitting.training import train as train_module
from hyperfitting.training.artifact import TrainingJob, training_job
from hyperfitting.training.config import TrainingConfig
from hyperfitting.training.step import TrainState, train_step
from tests.training import DATA, cfg

__all__ = ["cfg"]


@pytest.fixture
def sequences(store: Store) -> Artifact:
    """`DATA` as the artifact that a training reads."""
    config = {"n_train": 7, "n_val": 3, "seq_len": 16}
    artifact = store.artifact("sequences", version=0, config=config, inputs={})
    with artifact.building() as work:
        assert work is not None
        np.save(work / "train.npy", DATA.train)
        np.save(work / "val.npy", DATA.val)
    return artifact


@pytest.fixture
def n_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Its length is the number of train steps taken."""
    taken: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        taken.append(1)
        return train_step(*arguments)

    monkeypatch.setattr(train_module, "train_step", counted)
    return taken


def with_trainer(job: TrainingJob, **fields: Any) -> TrainingJob:
    trainer = replace(job.cfg.trainer, **fields)
    return training_job(replace(job.cfg, trainer=trainer), job.sequences, job.base, job.store)


@pytest.fixture
def job(cfg: TrainingConfig, sequences: Artifact, base: BaseModel, store: Store) -> TrainingJob:
    return training_job(cfg, sequences, base, store)


def files(artifact: Artifact) -> list[str]:
    return sorted(artifact.manifest().files)


def test_a_second_run_reads_the_same_rows(job: TrainingJob, n_steps: list[int]) -> None:
    assert not job.is_done
    rows = list(job.run())
    assert job.is_done and len(n_steps) == 9
    assert list(job.run()) == rows == job.history()
    assert len(n_steps) == 9
    assert files(job.tuned) == ["history.jsonl", "last.safetensors"]
    assert files(job.validation) == ["best_val.safetensors", "validation.json"]


@pytest.mark.parametrize(
    ("field", "value", "retrains"),
    [
        ("epochs", 2, True),
        ("batch_size", 2, True),
        ("seed", 5, True),
        ("target_loss", 1.0, True),
        ("eval_every_epochs", 2, False),
        ("val_prompts", 3, False),
        ("val_max_new_tokens", 4, False),
    ],
)
def test_the_tuned_models_id_holds_what_changes_its_weights(
    job: TrainingJob, field: str, value: Any, retrains: bool
) -> None:
    other = with_trainer(job, **{field: value})
    assert (other.tuned.id != job.tuned.id) == retrains
    assert other.validation.id != job.validation.id


def test_validation_enters_the_id_only_where_it_ends_the_training(job: TrainingJob) -> None:
    """And without these targets the id is what it was before they existed."""
    trainer = job.tuned.recipe["config"]["trainer"]
    assert not {"target_accuracy", "target_entropy", "target_ttr"} & set(trainer)
    stopped = with_trainer(job, target_ttr=0.9)
    assert stopped.tuned.id != job.tuned.id
    assert with_trainer(stopped, eval_every_epochs=2).tuned.id != stopped.tuned.id
    assert with_trainer(stopped, target_ttr=0.8).tuned.id != stopped.tuned.id


def test_the_activation_cache_enters_the_id_only_where_it_is_used(
    job: TrainingJob, cfg: TrainingConfig
) -> None:
    assert with_trainer(job, activation_cache="bfloat16").tuned.id == job.tuned.id
    late = replace(cfg, tuning=replace(cfg.tuning, method="late_stage", last_blocks=1))
    late_job = training_job(late, job.sequences, job.base, job.store)
    assert with_trainer(late_job, activation_cache="bfloat16").tuned.id != late_job.tuned.id


def test_a_coarser_schedule_is_selected_from_a_finer_one(
    job: TrainingJob, n_steps: list[int]
) -> None:
    rows = list(job.run())
    validated = {row["epoch"]: row["val/loss"] for row in rows if "val/loss" in row}
    best = min(validated, key=lambda epoch: validated[epoch])
    assert set(validated) == {1, 2, 3} and best in (2, 3)
    n_steps.clear()
    coarser = with_trainer(job, eval_every_epochs=2)
    selected = [row for row in coarser.run() if "val/loss" in row]
    assert selected == [row for row in rows if row.get("epoch") in (2, 3)]
    assert not n_steps
    assert coarser.validation.file("best_val.safetensors").read_bytes() == (
        job.validation.file("best_val.safetensors").read_bytes()
    )


def test_a_finer_schedule_replays_the_training_and_keeps_the_tuned_model(
    job: TrainingJob, n_steps: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        coarse = with_trainer(job, eval_every_epochs=3)
        list(coarse.run())
        manifest = (coarse.tuned.folder / "manifest.json").read_bytes()
        n_steps.clear()
        rows = list(job.run())
    assert len(n_steps) == 9
    assert "the tuned model itself is kept" in caplog.text
    assert "other weights" not in caplog.text
    assert (job.tuned.folder / "manifest.json").read_bytes() == manifest
    assert [row["epoch"] for row in rows if "val/loss" in row] == [1, 2, 3]
    assert files(job.validation) == ["best_val.safetensors", "validation.json"]
    assert [{k: row[k] for k in ("step", "train/loss")} for row in rows] == [
        {k: row[k] for k in ("step", "train/loss")} for row in coarse.history()
    ]


def test_a_best_epoch_outside_the_coarser_schedule_is_measured_anew(
    job: TrainingJob, n_steps: list[int]
) -> None:
    diverging = replace(job.cfg, optimizer={"_target_": "torch.optim.Adam", "lr": 3e-2})
    job = with_trainer(replace(job, cfg=diverging), epochs=12)
    losses = [row["val/loss"] for row in job.run() if "val/loss" in row]
    best = int(np.argmin(losses)) + 1
    assert 1 < best < 12
    n_steps.clear()
    coarser = with_trainer(job, eval_every_epochs=best + 1)
    list(coarser.run())
    assert len(n_steps) == 36
    assert coarser.validation.file("best_val.safetensors").read_bytes() != (
        job.validation.file("best_val.safetensors").read_bytes()
    )


@pytest.mark.parametrize("function", ["_link", "_keep_only"])
def test_after_a_kill_between_the_two_commits_nothing_is_trained_again(
    job: TrainingJob, n_steps: list[int], monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """Before the validation is committed (`_link`), and after (`_keep_only` of the tuned model)."""
    real = getattr(artifact_module, function)

    def killed(*arguments: Any) -> None:
        if function == "_keep_only" and not job.validation.exists:
            return real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact_module, function, killed)
    with pytest.raises(KeyboardInterrupt):
        list(job.run())
    assert not job.tuned.exists
    assert job.validation.exists == (function == "_keep_only")
    monkeypatch.setattr(artifact_module, function, real)
    assert len(n_steps) == 9
    rows = list(job.run())
    assert len(n_steps) == 9
    assert rows == job.history() and "val/loss" in rows[-1]
    assert files(job.tuned) == ["history.jsonl", "last.safetensors"]


def test_a_lost_validation_is_replayed_and_a_lost_tuned_model_trained_again(
    job: TrainingJob, n_steps: list[int]
) -> None:
    rows = list(job.run())
    for artifact in (job.validation, job.tuned):
        artifact.folder.rename(artifact.folder.with_name("lost"))
        n_steps.clear()
        assert list(job.run()) == rows
        assert len(n_steps) == 9


def test_no_model_is_left_in_memory_after_training(
    job: TrainingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks and compiled blocks form reference cycles, which would hold weights and gradients."""
    models: list[weakref.ref[torch.nn.Module]] = []
    build = train_module.build_train_state

    def recorded(*arguments: Any) -> TrainState:
        state = build(*arguments)
        models.append(weakref.ref(state.model))
        state.model.itself = [state.model]  # a cycle, as wrappers and hooks make
        return state

    monkeypatch.setattr(train_module, "build_train_state", recorded)
    gc.disable()
    try:
        for _ in job.run():
            pass
        assert [model() for model in models] == [None]
    finally:
        gc.enable()
