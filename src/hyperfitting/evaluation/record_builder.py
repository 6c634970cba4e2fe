"""From the scores of a run to its record."""

import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperfitting.evaluation.config import EvaluationConfig
from hyperfitting.evaluation.scoring import (
    Comparison,
    GeneratedText,
    Scores,
    jsonable,
    notes,
    per_text,
    slices,
)
from hyperfitting.metrics.overlap import Overlap, histogram
from hyperfitting.metrics.per_text import row_means
from hyperfitting.progress import MetricsRow
from hyperfitting.record import (
    SCHEMA_VERSION,
    SIDES,
    Continuation,
    DatasetInfo,
    Git,
    Histograms,
    NextTokens,
    OverlapSpan,
    PerSide,
    Predictions,
    Record,
    Sample,
    Timings,
)
from hyperfitting.store import Artifact, package_versions


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
    artifacts: dict[str, Artifact]
    """By the name that the record gives each, `documents` among them."""
    notes: list[str]
    """Notes of the data, to which those of the scores are added."""
    seconds: float
    """Duration of the run."""
    device: str


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
        git=git_state(),
        device=result.device,
        dataset=DatasetInfo(
            name=result.config["dataset"]["name"], fingerprint=result.artifacts["documents"].id
        ),
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
            name: artifact.build_seconds()
            for name, artifact in result.artifacts.items()
            if artifact.exists
        },
    )


def _per_step(scores: Scores) -> dict[str, list[float | None]]:
    """Return the mean entropy (nats) and top-1 mass at each step of the continuations."""
    return {
        f"gen/{name}": jsonable(row_means(scores.output.step_stats[name].T))
        for name in ("entropy", "top1_mass")
    }


def _samples(comparison: Comparison) -> list[Sample]:
    tuned, base = comparison.tuned, comparison.base
    return [
        Sample(
            dataset=dataset,
            context=by_tuned.context,
            reference=by_tuned.reference,
            tuned=_continuation(by_tuned, tuned.overlap, row),
            base=_continuation(by_base, base.overlap, row),
        )
        for row, (dataset, by_tuned, by_base) in enumerate(
            zip(tuned.output.datasets, tuned.output.samples, base.output.samples, strict=True)
        )
    ]


def _continuation(sample: GeneratedText, overlap: Overlap, row: int) -> Continuation:
    return Continuation(
        text="".join(sample.token_texts),
        tokens=sample.tokens,
        token_texts=sample.token_texts,
        overlap=OverlapSpan(
            length=int(overlap.length[row]),
            start=int(overlap.start[row]),
            sequence=int(overlap.sequence[row]),
            offset=int(overlap.offset[row]),
        ),
    )


def git_state() -> Git | None:
    """Return the commit of the checkout that this code runs from; none: an installed package."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        process = subprocess.run(  # noqa: S603  (fixed arguments, no shell)
            ["git", *arguments],  # noqa: S607  (git is wherever the user has it)
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return process.stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", __file__):
            return Git(commit=git("rev-parse", "HEAD"), dirty=bool(git("status", "--porcelain")))
    except (OSError, subprocess.SubprocessError):
        pass
    return None
