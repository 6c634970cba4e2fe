"""Texts or images: the steps of a dataset, whichever it is of.

Both end in the same artifacts of token sequences, so that nothing after this knows the difference:
a text's documents are tokenized, an image is its pixels. `dataset.image` makes the choice.
"""

from pathlib import Path
from typing import Any

from hyperfitting.data.config import DatasetConfig, TextsConfig
from hyperfitting.data.image_sequences import held_out_images, image_sequences_step
from hyperfitting.data.images import images_step, load_images
from hyperfitting.data.sequences import held_out_texts, save_evaluation_texts, sequences_step
from hyperfitting.data.sources import documents_step, errors_at, load_documents
from hyperfitting.models.base import BaseModel
from hyperfitting.progress import ProgressReporter, no_op
from hyperfitting.store.artifact import Artifact, Step, Store

EVALUATION_TEXTS_VERSION = 4
EVALUATION_IMAGES_VERSION = 1


def read_step(
    cfg: TextsConfig, store: Store, progress: ProgressReporter = no_op, at: str = "dataset"
) -> Step:
    """Return the step that reads a dataset's documents or images; only its id is determined."""
    if cfg.image is None:
        return documents_step(cfg, store, progress, at)
    return images_step(cfg, cfg.image, store, progress, at)


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
    """Return the step of the held-out texts or images of one evaluation dataset.

    Its build raises UserError if there are too few documents or images, or they are too short.

    Args:
        cfg: the dataset; its seed, if it has one, changes nothing here.
        documents: its documents or images.
        base: tokenizes them.
        store: where the texts are kept.
        n_texts: number of texts, N.
        length: tokens of each text, T: the context and its reference continuation.
        at: position of ``cfg`` in the whole config, for error messages.
    """

    def build(work: Path) -> None:
        with errors_at(at):
            if cfg.image is None:
                loaded = load_documents(documents)
                texts = held_out_texts(cfg, loaded, base, n_texts, length)
            else:
                images = load_images(documents)
                texts = held_out_images(cfg, cfg.image, images, base, n_texts, length)
        save_evaluation_texts(work, texts)

    config: dict[str, Any]
    if cfg.image is None:
        version, config = EVALUATION_TEXTS_VERSION, {"sequences": cfg.sequences}
        config |= {"chat": True} if cfg.chat else {}
    else:
        version = EVALUATION_IMAGES_VERSION
        config = {"modality": "image", "prepend_sos": cfg.image.prepend_sos}
    artifact = store.artifact(
        "evaluation_texts",
        version=version,
        config=config
        | {"holdout_fraction": cfg.holdout_fraction, "n_texts": n_texts, "length": length},
        inputs={documents.kind: documents.id, "model": base.id},
    )
    return Step(artifact, build)
