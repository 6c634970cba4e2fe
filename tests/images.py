"""Random images and a tiny ImageGPT, for the tests of images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from hyperfitting.config import RunConfig
from hyperfitting.data.config import ImageConfig
from hyperfitting.data.image_sequences import to_tokens
from hyperfitting.models.base import BaseModel
from hyperfitting.models.image_format import ImageFormat
from hyperfitting.models.random_init import initialized_model
from tests.conftest import Compose

GRAYS = np.repeat(np.rint(np.arange(17) * 255 / 16)[:, None] / 127.5 - 1, 3, axis=1)
DIGITS = ImageFormat(8, 8, GRAYS.astype(np.float32))
SMALL = ("preset=images", "model=local", "dataset.n_train=6", "dataset.n_val=4",
         "trainer.epochs=2", "trainer.val_prompts=2", "evaluation.n_texts=4",
         "evaluation.bootstrap=100", "tracking=disabled")  # fmt: skip


@pytest.fixture(scope="session")
def imagegpt(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A random ImageGPT in a folder as on the Hub: old masks among its weights, one size."""
    folder = tmp_path_factory.mktemp("imagegpt")
    config = AutoConfig.for_model(
        "imagegpt", vocab_size=18, n_positions=64, n_embd=32, n_layer=2, n_head=2
    )
    model = initialized_model(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    processor = {"clusters": DIGITS.palette.tolist(), "size": 8, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return BaseModel.local("imagegpt", folder)


@pytest.fixture
def digits(compose: Compose, imagegpt: BaseModel, tmp_path: Path) -> RunConfig:
    return compose(*SMALL, f"model.path={imagegpt.folder()}", f"store={tmp_path / 'store'}")


def random_images(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    shape = (n, height, width, 3)
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def digit_sequences(n: int, prepend_sos: bool = True) -> np.ndarray:
    pixels = np.random.default_rng(1).integers(17, size=(n, 8, 8))
    images = DIGITS.colors[pixels]
    return to_tokens(images, DIGITS, ImageConfig(height=8, width=8, prepend_sos=prepend_sos))
