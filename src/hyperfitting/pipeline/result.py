"""From a pipeline whose artifacts are built to everything that the run's record holds."""

from dataclasses import asdict

import torch

from hyperfitting.evaluation.record_builder import RunResult
from hyperfitting.evaluation.scoring import Comparison
from hyperfitting.pipeline.pipeline import Pipeline
from hyperfitting.runtime.device import describe_device


def run_result(
    pipeline: Pipeline, comparison: Comparison, device: torch.device, seconds: float
) -> RunResult:
    """Return what the record of a run is built from.

    Args:
        pipeline: of the run, with every artifact built.
        comparison: its scores.
        device: of its models.
        seconds: duration of the run.
    """
    return RunResult(
        config=asdict(pipeline.cfg),
        comparison=comparison,
        history=pipeline.history(),
        next_tokens=pipeline.next_tokens(),
        mechanism=pipeline.mechanism_results(comparison),
        downstream=pipeline.downstream_results(),
        chat=pipeline.chat_results(),
        model=pipeline.model_info(),
        image=pipeline.image_info(),
        split_sizes=pipeline.split_sizes(),
        artifacts=pipeline.artifacts,
        notes=pipeline.notes(),
        seconds=seconds,
        device=describe_device(device),
        generation_batches=pipeline.generation_batches(),
    )
