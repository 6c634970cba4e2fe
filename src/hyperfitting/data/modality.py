"""Texts or images: the steps of a dataset, whichever it is of.

Both end in the same artifacts of token sequences, so that nothing after this knows the difference:
a text's documents are tokenized, an image is its pixels. `dataset.image` makes the choice.
"""

from hyperfitting.data.config import DatasetConfig, TextsConfig
from hyperfitting.data.image_sequences import evaluation_images_step, image_sequences_step
from hyperfitting.data.images import images_step
from hyperfitting.data.sequences import evaluation_texts_step, sequences_step
from hyperfitting.data.sources import documents_step, errors_at
from hyperfitting.models.base import BaseModel
from hyperfitting.progress import ProgressReporter, no_op
from hyperfitting.store.artifact import Artifact, Step, Store


def read_step(
    cfg: TextsConfig, store: Store, progress: ProgressReporter = no_op, at: str = "dataset"
) -> Step:
    """Return the step that reads a dataset's documents or images; only its id is determined."""
    if cfg.image is None:
        return documents_step(cfg, store, progress, at)
    with errors_at(at):
        return images_step(cfg, cfg.image, store, progress)


def training_sequences_step(
    cfg: DatasetConfig,
    documents: Artifact,
    base: BaseModel,
    store: Store,
    progress: ProgressReporter = no_op,
) -> Step:
    """Return the step of the training and validation sequences."""
    if cfg.image is None:
        return sequences_step(cfg, documents, base, store, progress)
    return image_sequences_step(cfg, cfg.image, documents, base, store)


def held_out_step(
    cfg: TextsConfig,
    documents: Artifact,
    base: BaseModel,
    store: Store,
    *,
    n_texts: int,
    length: int,
    at: str = "dataset",
) -> Step:
    """Return the step of the held-out texts or images of one evaluation dataset."""
    if cfg.image is None:
        return evaluation_texts_step(
            cfg, documents, base, store, n_texts=n_texts, length=length, at=at
        )
    return evaluation_images_step(
        cfg, cfg.image, documents, base, store, n_texts=n_texts, length=length, at=at
    )
