"""Another tuning of the same base model, whose difference from it is a task vector."""

from dataclasses import fields, replace
from pathlib import Path

from hyperfitting.data.config import DatasetConfig, TextsConfig
from hyperfitting.data.modality import read_step, training_sequences_step
from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.loading import ModelState
from hyperfitting.progress import ProgressReporter
from hyperfitting.store.artifact import Artifact, DamagedArtifactError, Step
from hyperfitting.store.manifest import read_manifest
from hyperfitting.training.artifact import TrainingJob, training_job
from hyperfitting.training.train import LAST_FILE


def tuning_on(
    texts: TextsConfig, dataset: DatasetConfig, training: TrainingJob, progress: ProgressReporter
) -> tuple[TrainingJob, dict[str, Step]]:
    """Return the same training on other texts, and its steps, inputs first.

    Args:
        texts: which documents.
        dataset: that of the run; sizes and seed are taken from it.
        training: that of the run.
        progress: displays what is being built.
    """
    base, store = training.base, training.store
    documents = read_step(texts, store, progress, at="intervention.dataset")
    of_texts = {field.name: getattr(texts, field.name) for field in fields(TextsConfig)}
    if texts.image is not None:
        of_texts["seq_len"] = texts.image.n_tokens
    sequences = training_sequences_step(
        replace(dataset, **of_texts), documents.artifact, base, store, progress
    )
    job = training_job(training.cfg, sequences.artifact, base, store)
    steps = {"documents": documents, "sequences": sequences} | job.steps(progress)
    return job, {f"other/{name}": step for name, step in steps.items()}


def tuning_at(path: Path, base: BaseModel) -> tuple[ModelState, Artifact | None]:
    """Return the tuned model of another run, from the folder of its artifact.

    Also its training sequences, if the store that it lies in has them.

    Args:
        path: such as `outputs/store/tuned/ID`.
        base: this run's base model, of which it must be a tuning.

    Raises:
        UserError: there is no such artifact, it is damaged, or it is a tuning of another model.
    """
    folder = path.expanduser().absolute()
    if not folder.is_dir():
        raise _no_tuning(path, "is not a folder")
    manifest = read_manifest(folder)
    recipe = manifest.recipe
    artifact = Artifact(folder.parent.parent, folder.parent.name, recipe)
    if recipe.get("kind") != "tuned" or artifact.folder != folder:
        raise _no_tuning(path, "is not the artifact of a tuned model")
    if recipe["inputs"]["model"] != base.id:
        raise _no_tuning(path, f"was tuned from another base model than {base.name}")
    try:
        artifact.path()
    except DamagedArtifactError as error:
        raise _no_tuning(path, f"is damaged ({error})") from error
    state = ModelState(base, TuningConfig(**recipe["config"]["tuning"]), artifact, LAST_FILE)
    return state, _sequences_of(artifact)


def _sequences_of(tuning: Artifact) -> Artifact | None:
    """Return what a tuned model was trained on; none: not in the same store."""
    store = tuning.folder.parent.parent
    folder = store / "sequences" / tuning.recipe["inputs"]["sequences"]
    if not folder.is_dir():
        return None
    sequences = Artifact(store, "sequences", read_manifest(folder).recipe)
    try:
        sequences.path()
    except DamagedArtifactError as error:
        raise _no_tuning(folder, f"is damaged ({error})") from error
    return sequences


def _no_tuning(path: Path, problem: str) -> UserError:
    return UserError(
        problem,
        field="intervention.path",
        value=path,
        valid="the folder that a run of the same base model prints as `model`, such as "
        "outputs/store/tuned/ID",
    )
