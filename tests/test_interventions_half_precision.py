"""Interventions on bfloat16 models: what is computed is float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hyperfitting.mechanism.intervention_config import InterventionConfig
from hyperfitting.mechanism.interventions import intervention_step
from hyperfitting.models.base import BaseModel
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.loading import ModelState
from hyperfitting.progress import no_op
from hyperfitting.store.artifact import Step, Store
from tests.interventions import ALL_PARTS, derived, equal, stitch, weights_of


@pytest.fixture
def low(base: BaseModel) -> BaseModel:
    return BaseModel.local("low", base.folder(), "bfloat16")


def test_between_neighbors_in_bfloat16_there_is_the_middle(low: BaseModel, store: Store) -> None:
    """A tuned model whose every weight is the next bfloat16 number."""
    base_weights = weights_of(ModelState(low))
    next_weights = {
        name: (weight.view(torch.int16) + 1).view(torch.bfloat16)
        for name, weight in base_weights.items()
    }

    def build(work: Path) -> None:
        save_file(next_weights, work / "last.safetensors")

    step = Step(store.artifact("tuned", version=1, config={}, inputs={}), build)
    tuned = ModelState(low, TuningConfig("full"), step.ensure(), "last.safetensors")
    for weight in (0.0, 0.25, 0.5, 1.0):
        between = derived(InterventionConfig("interpolate", weight=weight), tuned, store)
        for name, value in between.items():
            b, t = base_weights[name].double().numpy(), next_weights[name].double().numpy()
            np.testing.assert_allclose(value.double(), b + weight * (t - b), rtol=1e-6, atol=1e-9)
    task_vector = InterventionConfig("task_vector", scale=0.5, path="elsewhere")
    added = derived(task_vector, ModelState(low), store, tuned)
    half = derived(InterventionConfig("interpolate", weight=0.5), tuned, store)
    assert equal(added, half)
    truncated = derived(InterventionConfig("truncate", rank=2), tuned, store)
    for weights in (half, truncated):
        assert {w.dtype for w in weights.values()} == {torch.float32}
    stitched = derived(stitch(*ALL_PARTS), tuned, store)
    assert equal(stitched, next_weights)
    assert {w.dtype for w in stitched.values()} == {torch.bfloat16}


@pytest.mark.parametrize("method", ["interpolate", "task_vector", "truncate", "stitch"])
def test_the_id_has_the_dtype_where_weights_are_computed_in_another(
    base: BaseModel, low: BaseModel, store: Store, method: str
) -> None:
    cfg = InterventionConfig(method, path="elsewhere" if method == "task_vector" else None)
    configs = [
        intervention_step(cfg, ModelState(model), None, store, no_op).artifact.recipe["config"]
        for model in (base, low)
    ]
    assert configs[0] == cfg.id_config()
    assert configs[1] == cfg.id_config() | ({} if method == "stitch" else {"dtype": "float32"})
