"""Models go to a GPU without staying in host memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hyperfitting.models import loading
from hyperfitting.models.base import BaseModel
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.loading import ModelState, load
from hyperfitting.store.artifact import Store
from hyperfitting.training import step
from hyperfitting.training.activation_cache import CacheLocation
from tests.conftest import Compose

GPU = torch.device("cuda:1")


class Placements:
    """Records where models are read to and moved to, and leaves them on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device_maps: list[Any] = []
        self.moves: list[torch.device] = []
        read = AutoModelForCausalLM.from_pretrained

        def record(*args: Any, device_map: Any = None, **options: Any) -> Any:
            self.device_maps.append(device_map)
            model, info = read(*args, **options)
            model.to = self.moves.append
            return model, info

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", record)


@pytest.fixture
def placements(monkeypatch: pytest.MonkeyPatch) -> Placements:
    return Placements(monkeypatch)


@pytest.mark.parametrize("has_accelerate", [True, False])
def test_a_model_is_read_onto_its_gpu(
    base: BaseModel,
    placements: Placements,
    monkeypatch: pytest.MonkeyPatch,
    has_accelerate: bool,
) -> None:
    """transformers needs accelerate for it; without, the model is moved."""
    monkeypatch.setattr(loading, "is_accelerate_available", lambda: has_accelerate)
    ModelState(base).load(GPU)
    assert placements.device_maps == [{"": GPU} if has_accelerate else None]
    assert placements.moves == [GPU]


def test_a_model_to_train_is_read_onto_its_gpu(
    compose: Compose,
    base: BaseModel,
    placements: Placements,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step, "resolve_device", lambda _: GPU)
    training, tokens = compose("preset=debug").training, np.zeros((2, 8), np.int32)
    step.build_train_state(training, base, tokens, CacheLocation(Store(tmp_path), {}))
    assert placements.device_maps == [{"": GPU}]
    assert set(placements.moves) == {GPU}


def test_tuned_parameters_are_copied_over_those_on_the_gpu(
    base: BaseModel, placements: Placements, tmp_path: Path
) -> None:
    weights = {name: p.detach() + 1 for name, p in load(base).named_parameters()}
    artifact = Store(tmp_path).artifact("tuned", version=1, config={}, inputs={})
    with artifact.building() as work:
        assert work is not None
        save_file(weights, work / "last.safetensors")
    placements.moves.clear()
    model = ModelState(base, TuningConfig("full"), artifact, "last.safetensors").load(GPU)
    assert placements.device_maps[-1] == {"": GPU}
    assert placements.moves == [GPU]
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_nothing_is_moved_on_the_cpu(base: BaseModel, placements: Placements) -> None:
    ModelState(base).load(torch.device("cpu"))
    assert placements.device_maps == [None]
