"""Layer geometry against the token statistics on the same texts; an intervention against a load."""

import itertools
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from benchmarks.decoding import embedded_base, embedded_model
from benchmarks.timing import Result, interleaved
from benchmarks.training import config, sequences
from hyperfitting.evaluation.forward import compute_token_stats
from hyperfitting.mechanism.config import MechanismConfig
from hyperfitting.mechanism.geometry import compute_geometry
from hyperfitting.mechanism.intervention_config import InterventionConfig
from hyperfitting.mechanism.interventions import (
    WEIGHTS_FILE,
    intervention_state,
    intervention_step,
)
from hyperfitting.mechanism.texts import Texts
from hyperfitting.models.base import BaseModel
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.loading import ModelState, load
from hyperfitting.progress import no_op
from hyperfitting.runtime.device import setup_torch
from hyperfitting.store.artifact import Step, Store

TEXTS, LENGTH, BATCH_SIZE, ROUNDS, LOAD_ROUNDS = 72, 256, 8, 3, 7
CPU = torch.device("cpu")


def run() -> Iterator[Result]:
    """Yield the comparisons."""
    setup_torch(config(LENGTH).hardware)
    yield _geometry()
    yield _intervention()


def _geometry() -> Result:
    """Compare two equal models, which changes no operation."""
    models = embedded_model(), embedded_model()
    tokens = sequences(TEXTS, LENGTH)
    texts = Texts(tokens, np.full(TEXTS, LENGTH), [[""] * LENGTH] * TEXTS, ["a"] * TEXTS)
    geometry = partial(compute_geometry, *models, texts, MechanismConfig(["geometry"]), BATCH_SIZE)
    ours, peer = interleaved(
        geometry, lambda: [compute_token_stats(m, tokens, BATCH_SIZE) for m in models], ROUNDS
    )
    return Result(
        "geometry_vs_token_stats",
        ours.median / peer.median,
        f"layer geometry of two models on {TEXTS} texts of {LENGTH} tokens, over the time of the "
        "token statistics of both, smollm2_135m",
        ours,
        peer,
        {},
    )


def _intervention() -> Result:
    """Derive the weights of the tuned model's last 5 blocks in the base model, and load them."""
    base = embedded_base()
    cfg = InterventionConfig("stitch", last_blocks=5)
    with tempfile.TemporaryDirectory() as folder:
        tuned = _shifted(base, Store(Path(folder, "tuned")))
        numbers = itertools.count()

        def stitched() -> PreTrainedModel:
            step = intervention_step(
                cfg, tuned, None, Store(Path(folder, f"{next(numbers)}")), no_op
            )
            step.ensure()
            return intervention_state(cfg, base, step).load(CPU)

        ours, peer = interleaved(stitched, lambda: tuned.load(CPU), LOAD_ROUNDS)
    return Result(
        "intervention_vs_load",
        ours.median / peer.median,
        "deriving and loading a stitched model (5 blocks), over the time of loading the tuned one, "
        "smollm2_135m",
        ours,
        peer,
        {},
    )


def _shifted(base: BaseModel, store: Store) -> ModelState:
    """Return a model all of whose weights differ from the base model's."""

    def build(work: Path) -> None:
        parameters = load(base).named_parameters()
        save_file({name: p.detach() + 1e-3 for name, p in parameters}, work / WEIGHTS_FILE)

    artifact = store.artifact("tuned", version=1, config={}, inputs={"model": base.id})
    Step(artifact, build).ensure()
    return ModelState(base, TuningConfig("full"), artifact, WEIGHTS_FILE)
