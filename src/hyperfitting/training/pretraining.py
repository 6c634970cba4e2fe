"""Small image models that are pre-trained here, by the training code of hyperfitting.

    packaged images -> palette, initial model -> sequences -> tuned, validation -> model

Trained only on the images that `data.images` keeps for it; the weights of the epoch of lowest
validation loss become a model folder like any other.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hyperfitting.data.config import DatasetConfig, ImageConfig
from hyperfitting.data.image_sequences import image_sequences_step
from hyperfitting.data.images import images_step, load_images, split_images
from hyperfitting.data.packaged_images import require_scikit_learn
from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel, base_model, store_model
from hyperfitting.models.config import ModelConfig, PretrainingConfig, TuningConfig
from hyperfitting.models.image_format import ImageFormat, PixelTokenizer
from hyperfitting.models.loading import ModelState
from hyperfitting.models.random_init import initialized_model, transformers_config
from hyperfitting.models.size import model_size
from hyperfitting.progress import ProgressReporter, no_op
from hyperfitting.runtime.config import HardwareConfig
from hyperfitting.store.artifact import Artifact, Step, Store
from hyperfitting.training.artifact import training_job
from hyperfitting.training.config import TrainerConfig, TrainingConfig
from hyperfitting.training.train import BEST_VAL_FILE

VERSION = 1
_KMEANS_PIXELS = 200_000
"""Pixels that the palette is fitted to."""


def resolve_model(
    cfg: ModelConfig,
    store: Store,
    progress: ProgressReporter = no_op,
    hardware: HardwareConfig | None = None,
) -> BaseModel:
    """Return the model of a config, also one that is pre-trained here; nothing is built yet.

    Args:
        cfg: the model.
        store: where it is kept.
        progress: displays the pre-training.
        hardware: where it is pre-trained, in one process.

    Raises:
        UserError: there is no such model, or it cannot be reached.
    """
    if cfg.source != "pretraining" or cfg.pretraining is None:
        return base_model(cfg, store, progress)
    plan = cfg.pretraining
    image = ImageConfig(height=plan.height, width=plan.width)
    dataset = _dataset(plan, image)
    images = images_step(dataset, image, store, progress)
    initial = _initial_model(cfg, plan, dataset, images.artifact, store)
    sequences = image_sequences_step(
        dataset, image, images.artifact, initial, store, for_pretraining=True
    )
    training = _training(plan, hardware or HardwareConfig())
    job = training_job(training, sequences.artifact, initial, store)

    def build(work: Path) -> None:
        images.ensure()
        initial.ensure()
        sequences.ensure()
        for _ in job.run(progress):
            pass
        best = ModelState(initial, training.tuning, job.weights("best_val"), BEST_VAL_FILE)
        best.load(torch.device("cpu")).save_pretrained(work)
        initial.tokenizer().save_pretrained(work)

    artifact = store.artifact(
        "model",
        version=VERSION,
        config={"source": "pretraining"},
        inputs={"weights": job.weights("best_val").id},
    )
    step = Step(artifact, build, lambda: job.flops(model_size(initial, store)))
    return store_model(cfg, step, initial.transformers_config)


def _dataset(plan: PretrainingConfig, image: ImageConfig) -> DatasetConfig:
    return DatasetConfig(
        name=f"{plan.images} for pre-training",
        source="package",
        path=plan.images,
        image=image,
        n_train=plan.n_train,
        n_val=plan.n_val,
        seed=plan.seed,
    )


def _training(plan: PretrainingConfig, hardware: HardwareConfig) -> TrainingConfig:
    n_pixels = plan.height * plan.width
    prompt_len = 1 + n_pixels // 4
    optimizer = {
        "_target_": "torch.optim.AdamW",
        "lr": plan.lr,
        "betas": [0.9, 0.95],  # as in Chen et al. (2020), section 3.3
        "weight_decay": plan.weight_decay,
    }
    trainer = TrainerConfig(
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        dropout=plan.dropout,
        val_prompts=8,
        val_prompt_len=prompt_len,
        val_max_new_tokens=n_pixels + 1 - prompt_len,
        seed=plan.seed,
    )
    one_process = replace(
        hardware,
        num_processes=1,
        compile=False,
        micro_batch_size=hardware.micro_batch_size or plan.batch_size,
    )
    return TrainingConfig(TuningConfig(), optimizer, trainer, one_process)


def _initial_model(
    cfg: ModelConfig,
    plan: PretrainingConfig,
    dataset: DatasetConfig,
    images: Artifact,
    store: Store,
) -> BaseModel:
    """Return the randomly initialized model, with the palette of the images to train on."""
    architecture = dict(cfg.architecture or {})
    sizes = {"vocab_size": plan.colors + 1, "n_positions": plan.height * plan.width}  # and SOS
    initial = replace(cfg, architecture=sizes | architecture)

    def config() -> Any:
        return transformers_config(initial)

    def build(work: Path) -> None:
        loaded = load_images(images)
        split = split_images(loaded, dataset.holdout_fraction, dataset.validation_fraction)
        pixels = loaded.pixels[split.pretraining].reshape(-1, 3)
        colors = palette(pixels, plan.colors, plan.seed)
        initialized_model(config()).save_pretrained(work)
        image_format = ImageFormat(plan.height, plan.width, colors)
        PixelTokenizer(image_format).save_pretrained(work)

    artifact = store.artifact(
        "model",
        version=VERSION,
        config={
            "source": "random image model",
            "architecture": architecture,
            "height": plan.height,
            "width": plan.width,
            "colors": plan.colors,
            "seed": plan.seed,
        },
        inputs={"images": images.id},
    )
    return store_model(replace(cfg, dtype="float32"), Step(artifact, build), config)


def palette(pixels: NDArray[np.uint8], n_colors: int, seed: int) -> NDArray[np.float32]:
    """Return the colors of an image format, (K, 3) in [-1, 1], dark to bright.

    The colors that occur if they are just so many, else the centers of k-means clusters, as in
    ImageGPT.

    Args:
        pixels: (R, 3) red, green and blue.
        n_colors: K.
        seed: of k-means.

    Raises:
        UserError: there are fewer colors.
    """
    occurring, counts = np.unique(pixels, axis=0, return_counts=True)
    if len(occurring) < n_colors:
        raise UserError(
            "more colors than the images have",
            field="model.pretraining.colors",
            value=n_colors,
            valid=f"at most {len(occurring)}",
        )
    colors = occurring.astype(np.float32) / 127.5 - 1
    if len(occurring) > n_colors:
        require_scikit_learn("model.pretraining.colors", n_colors)
        from sklearn.cluster import MiniBatchKMeans

        rng = np.random.default_rng(seed)
        sample = rng.choice(len(occurring), _KMEANS_PIXELS, p=counts / counts.sum())
        kmeans = MiniBatchKMeans(n_colors, random_state=seed, n_init=1, batch_size=4096)
        colors = kmeans.fit(colors[sample]).cluster_centers_.astype(np.float32)
    return colors[np.argsort(colors @ np.array([0.299, 0.587, 0.114]), kind="stable")]
