"""From the scores of a run to its record."""

import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from hyperfitting.data.sequences import SplitSizes
from hyperfitting.evaluation.config import EvaluationConfig
from hyperfitting.evaluation.scoring import Comparison, ModelOutput, Scores
from hyperfitting.evaluation.slices import jsonable, notes, per_text, slices
from hyperfitting.metrics.diversity import ROLLING_WINDOW, rolling_ttr
from hyperfitting.metrics.overlap import Overlap, histogram
from hyperfitting.metrics.per_text import row_means
from hyperfitting.progress import MetricsRow
from hyperfitting.record.chat import Chat
from hyperfitting.record.downstream import Downstream
from hyperfitting.record.files import Predictions
from hyperfitting.record.mechanism import Mechanism
from hyperfitting.record.schema import (
    SCHEMA_VERSION,
    SIDES,
    DatasetInfo,
    Histograms,
    ImageInfo,
    ModelInfo,
    NextTokens,
    PerSide,
    Record,
    Sample,
    Timings,
)
from hyperfitting.record.texts import Continuation, OverlapSpan, SampleText
from hyperfitting.runtime.code_version import code_version
from hyperfitting.runtime.machine import describe_machine
from hyperfitting.store.artifact import Artifact
from hyperfitting.store.manifest import package_versions


@dataclass(frozen=True)
class RunResult:
    """Everything that the record of a run is built from."""

    config: dict[str, Any]
    """The resolved config."""
    comparison: Comparison
    history: list[MetricsRow]
    """One row per epoch."""
    next_tokens: dict[str, NextTokens]
    """By evaluation dataset."""
    mechanism: Mechanism | None
    """None: nothing of it is measured."""
    downstream: Downstream | None
    """None: no task is asked for."""
    chat: Chat | None
    """None: no question is asked."""
    model: ModelInfo
    image: ImageInfo | None
    """None: the tokens are text."""
    split_sizes: SplitSizes
    """Of the documents that were trained on."""
    artifacts: dict[str, Artifact]
    """By the name that the record gives each, `documents` among them."""
    notes: list[str]
    """Notes of the data, to which those of the scores are added."""
    seconds: float
    """Duration of the run."""
    device: str
    generation_batches: dict[str, list[int]]
    """By artifact of continuations, the number of texts in each batch."""


def build_record(result: RunResult, evaluation: EvaluationConfig) -> Record:
    """Return the record of a finished run.

    Args:
        result: the run's scores, history and artifacts.
        evaluation: lengths and resamples of the scores.
    """
    comparison = result.comparison
    scores: dict[str, Scores] = {side: getattr(comparison, side) for side in SIDES}
    return Record(
        schema_version=SCHEMA_VERSION,
        config=result.config,
        versions={"python": platform.python_version(), **package_versions()},
        code=code_version(),
        device=result.device,
        machine=describe_machine(),
        generation_batches=result.generation_batches,
        model=result.model,
        dataset=DatasetInfo(
            name=result.config["dataset"]["name"],
            fingerprint=result.artifacts["documents"].id,
            source=result.artifacts["documents"].recipe["inputs"]["source"],
            **asdict(result.split_sizes),
        ),
        image=result.image,
        artifacts={name: str(artifact.folder) for name, artifact in result.artifacts.items()},
        timings=_timings(result),
        notes=result.notes + notes(comparison),
        slices=slices(comparison, evaluation),
        history=result.history,
        per_step=PerSide(**{side: _per_step(value) for side, value in scores.items()}),
        per_text=PerSide(**{side: per_text(value) for side, value in scores.items()}),
        overlap_histogram=Histograms(
            **{side: histogram(value.overlap.length) for side, value in scores.items()}
        ),
        next_tokens=result.next_tokens,
        samples=_samples(comparison),
        mechanism=result.mechanism,
        recognition=comparison.recognition,
        downstream=result.downstream,
        chat=result.chat,
    )


def predictions(comparison: Comparison) -> Predictions:
    """Return the token statistics of both models on the references, by `tuned/NAME`, `base/NAME`.

    Each is (N, text_len - 1), in the order of the record's samples.
    """
    return {
        f"{side}/{name}": values
        for side, scores in (("tuned", comparison.tuned), ("base", comparison.base))
        for name, values in scores.output.token_stats.items()
    }


def _timings(result: RunResult) -> Timings:
    return Timings(
        run_seconds=round(result.seconds, 2),
        build_seconds={
            name: seconds
            for name, artifact in result.artifacts.items()
            if artifact.exists and (seconds := artifact.build_seconds()) is not None
        },
        finished_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _per_step(scores: Scores) -> dict[str, list[float | None]]:
    """Return the mean entropy (nats), top-1 mass and rolling TTR at each step."""
    rolling = np.full((len(scores.output.continuations), scores.full_length), np.nan)
    for row, continuation in zip(rolling, scores.output.continuations, strict=True):
        row[: len(continuation.tokens)] = rolling_ttr(continuation.tokens, ROLLING_WINDOW)
    by_step = {name: scores.output.step_stats[name] for name in ("entropy", "top1_mass")}
    by_step[f"ttr_last_{ROLLING_WINDOW}"] = rolling
    return {f"gen/{name}": jsonable(row_means(values.T)) for name, values in by_step.items()}


def _samples(comparison: Comparison) -> list[Sample]:
    return [
        Sample(
            dataset=dataset,
            context=SampleText(
                text="".join(context.token_texts),
                tokens=context.tokens,
                token_texts=context.token_texts,
            ),
            **{
                side: recorded_continuation(
                    getattr(comparison, side).output, getattr(comparison, side).overlap, row
                )
                for side in SIDES
            },
        )
        for row, (dataset, context) in enumerate(
            zip(comparison.tuned.output.datasets, comparison.contexts, strict=True)
        )
    ]


def recorded_continuation(output: ModelOutput, overlap: Overlap, row: int) -> Continuation:
    """Return what the record holds of a continuation, with its overlap."""
    continuation = output.continuations[row]
    return Continuation(
        text="".join(continuation.token_texts),
        tokens=continuation.tokens,
        token_texts=continuation.token_texts,
        overlap=OverlapSpan(
            length=int(overlap.length[row]),
            start=int(overlap.start[row]),
            sequence=int(overlap.sequence[row]),
            offset=int(overlap.offset[row]),
        ),
    )
