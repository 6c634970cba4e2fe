"""Wire a run's steps together: from its config to its `Pipeline`; nothing is built here."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hyperfitting.config import RunConfig
from hyperfitting.data.config import TextsConfig
from hyperfitting.data.modality import held_out_step, read_step, training_sequences_step
from hyperfitting.evaluation.artifacts import ModelArtifacts, model_artifacts
from hyperfitting.evaluation.chat import chat_artifacts
from hyperfitting.evaluation.downstream.artifacts import downstream_artifacts
from hyperfitting.evaluation.image_features import inception
from hyperfitting.evaluation.setting import LazyModel, Setting
from hyperfitting.mechanism.artifacts import MechanismArtifacts, mechanism_artifacts
from hyperfitting.mechanism.controls import control_state, control_steps
from hyperfitting.mechanism.interventions import intervention_state, intervention_step
from hyperfitting.mechanism.other_tuning import tuning_at, tuning_on
from hyperfitting.mechanism.patching_steps import patching_steps
from hyperfitting.metrics import mauve
from hyperfitting.models.base import BaseModel, base_model
from hyperfitting.models.config import ModelConfig
from hyperfitting.models.loading import ModelState
from hyperfitting.pipeline.pipeline import Models, Pipeline
from hyperfitting.progress import ProgressReporter, no_op
from hyperfitting.runtime.config import HardwareConfig
from hyperfitting.store.artifact import Artifact, Step, Store
from hyperfitting.training.artifact import TrainingJob, training_job
from hyperfitting.training.pretraining import resolve_model


def recorded_pipeline(
    cfg: RunConfig, store: Path, hardware: HardwareConfig, device: torch.device
) -> Pipeline:
    """Return the pipeline of a recorded config, with the artifacts of one local store.

    Args:
        cfg: of the record.
        store: holds its artifacts.
        hardware: of this machine.
        device: where its models are evaluated.

    Raises:
        UserError: its model or a dataset is not available here.
    """
    here = replace(cfg, store=str(store), remote_stores=[], plan=False, hardware=hardware)
    return build_pipeline(here, device)


def build_pipeline(
    cfg: RunConfig, device: torch.device, progress: ProgressReporter = no_op
) -> Pipeline:
    """Return the pipeline of a run; nothing is built yet.

    Args:
        cfg: the run's config.
        device: where its models are evaluated.
        progress: displays what is being built.

    Raises:
        UserError: a model or dataset does not exist, or cannot be reached.
    """
    store = Store(cfg.store, cfg.remote_stores)
    base = resolve_model(cfg.model, store, progress, cfg.hardware)
    data = _data_steps(cfg, base, store, progress)
    training = None
    if cfg.tuning.method != "none":
        training = training_job(cfg.training, data.sequences.artifact, base, store)
    models = _models(cfg, base, training, device, store)
    intervention = None
    if training is not None and models.tuned is not None and cfg.intervention.is_on:
        intervention = _intervention(cfg, models.tuned.state, training, progress, device)
    setting = Setting(
        evaluation=cfg.evaluation,
        decode=cfg.decode,
        hardware=cfg.hardware,
        texts={name: step.artifact for name, step in data.evaluation_texts.items()},
        sequences=data.sequences.artifact,
        store=store,
        progress=progress,
        other_sequences=intervention.sequences if intervention else (),
    )
    models, replacement = _replace_tuned(cfg, models, intervention, setting, device)
    outputs = _outputs(cfg, setting, models, device)
    return Pipeline(
        cfg=cfg,
        base=base,
        documents=data.documents,
        sequences=data.sequences,
        evaluation_documents=data.evaluation_documents,
        evaluation_texts=data.evaluation_texts,
        training=training,
        trained_on=setting.trained_on,
        replacement=replacement,
        patching=outputs.patching,
        models=models,
        base_artifacts=outputs.base,
        tuned_artifacts=outputs.tuned,
        mechanism=outputs.mechanism,
        downstream=downstream_artifacts(
            setting, models.base, models.tuned, cfg.dataset.holdout_fraction
        ),
        chat=chat_artifacts(setting, models.base, models.tuned),
        progress=progress,
    )


@dataclass(frozen=True)
class _Data:
    """The steps of a run's documents and sequences."""

    documents: Step
    sequences: Step
    evaluation_documents: dict[str, Step]
    evaluation_texts: dict[str, Step]
    """Both by evaluation dataset."""


def _data_steps(cfg: RunConfig, base: BaseModel, store: Store, progress: ProgressReporter) -> _Data:
    documents = read_step(cfg.dataset, store, progress)
    evaluation_documents = {
        name: read_step(texts, store, progress, at=_at(cfg, name))
        for name, texts in cfg.evaluation_datasets.items()
    }
    return _Data(
        documents,
        training_sequences_step(cfg.dataset, documents.artifact, base, store, progress),
        evaluation_documents,
        {
            name: _evaluation_texts(cfg, name, texts, evaluation_documents[name], base, store)
            for name, texts in cfg.evaluation_datasets.items()
        },
    )


@dataclass(frozen=True)
class _Outputs:
    """What is measured of both models."""

    base: ModelArtifacts
    tuned: ModelArtifacts
    mechanism: MechanismArtifacts
    patching: dict[str, Step]


def _outputs(cfg: RunConfig, setting: Setting, models: Models, device: torch.device) -> _Outputs:
    fid_weights = cfg.evaluation.fid_weights
    network = inception(Path(fid_weights), device) if fid_weights else None
    base = model_artifacts(setting, models.base, models.base, models.features, network)
    if models.tuned is None:
        return _Outputs(base, base, MechanismArtifacts(), {})
    tuned = model_artifacts(setting, models.tuned, models.base, models.features, network)
    mechanism = mechanism_artifacts(
        cfg.mechanism,
        setting,
        models.base,
        models.tuned,
        {"tuned": tuned.written, "base": base.written},
    )
    patching: dict[str, Step] = {}
    if cfg.evaluation.patch_block is not None:
        for name, step in base.continuations.items():
            patching |= patching_steps(setting, models.base, models.tuned, name, step.artifact)
    return _Outputs(base, tuned, mechanism, patching)


def _at(cfg: RunConfig, name: str) -> str:
    """Return where in the config an evaluation dataset is described."""
    return f"evaluation.datasets.{name}" if cfg.evaluation.datasets else "dataset"


def _evaluation_texts(
    cfg: RunConfig, name: str, texts: TextsConfig, documents: Step, base: BaseModel, store: Store
) -> Step:
    return held_out_step(
        texts,
        documents.artifact,
        base,
        store,
        n_texts=cfg.evaluation.n_texts,
        length=cfg.evaluation.reference_len,
        at=_at(cfg, name),
    )


@dataclass(frozen=True)
class _Intervention:
    """A model of changed weights in the tuned model's place."""

    steps: dict[str, Step]
    """By name, inputs first."""
    state: ModelState
    sequences: tuple[Artifact, ...]
    """Training sequences of another tuning that it adds."""


def _replace_tuned(
    cfg: RunConfig,
    models: Models,
    intervention: _Intervention | None,
    setting: Setting,
    device: torch.device,
) -> tuple[Models, dict[str, Step]]:
    """Put an intervention or a control in the tuned model's place, if the config has one.

    Returns:
        The models, and the steps of what takes the tuned model's place, inputs first.
    """
    steps: dict[str, Step] = {}
    if intervention is not None:
        steps |= intervention.steps
        tuned = LazyModel(intervention.state, device, cfg.hardware.device_map)
        models = replace(models, tuned=tuned)
    if models.tuned is not None and cfg.decode.control.is_on:
        uncontrolled, controls = models.tuned, control_steps(setting, models.base, models.tuned)
        steps |= controls
        state = control_state(setting, models.base, uncontrolled, controls["control"])
        tuned = LazyModel(state, device, cfg.hardware.device_map)
        models = replace(models, tuned=tuned, uncontrolled=uncontrolled)
    return models, steps


def _intervention(
    cfg: RunConfig,
    tuned: ModelState,
    training: TrainingJob,
    progress: ProgressReporter,
    device: torch.device,
) -> _Intervention:
    """Return the intervention of a config."""
    steps: dict[str, Step] = {}
    other, sequences = None, None
    if cfg.intervention.path is not None:
        other, sequences = tuning_at(Path(cfg.intervention.path), training.base)
    elif cfg.intervention.dataset is not None:
        job, steps = tuning_on(cfg.intervention.dataset, cfg.dataset, training, progress)
        other = replace(tuned, weights=job.weights(cfg.evaluation.checkpoint))
        sequences = job.sequences
    step = intervention_step(cfg.intervention, tuned, other, training.store, progress, device)
    state = intervention_state(cfg.intervention, training.base, step)
    steps |= {"intervention": step}
    return _Intervention(steps, state, () if sequences is None else (sequences,))


def _models(
    cfg: RunConfig,
    base: BaseModel,
    training: TrainingJob | None,
    device: torch.device,
    store: Store,
) -> Models:
    def lazy(state: ModelState) -> LazyModel:
        return LazyModel(state, device, cfg.hardware.device_map)

    base_lazy, tuned = lazy(ModelState(base)), None
    if training is not None:
        checkpoint = cfg.evaluation.checkpoint
        weights = training.weights(checkpoint)
        tuned = lazy(ModelState(base, cfg.tuning, weights, f"{checkpoint}.safetensors"))
    features = None
    if cfg.evaluation.mauve is not None:
        mauve.check_installed()
        features = base_lazy
        if cfg.evaluation.mauve != "base":
            chosen = ModelConfig(name="mauve", source="local", path=cfg.evaluation.mauve)
            features = lazy(ModelState(base_model(chosen, store)))
    return Models(base_lazy, tuned, features)
