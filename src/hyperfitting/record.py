"""The record of a run: `results.json`, the interface that tables, dashboards and others read.

Its fields are documented in the README ("results.json"). Raise SCHEMA_VERSION when one changes.
"""

import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hyperfitting.config import RunConfig
from hyperfitting.evaluation import Scores
from hyperfitting.metrics.uncertainty import Estimate
from hyperfitting.store import Artefact, package_versions
from hyperfitting.training.checkpoint import Row

SCHEMA_VERSION = 1
FILE_NAME = "results.json"


def build(
    cfg: RunConfig,
    artefacts: dict[str, Artefact],
    history: list[Row],
    tuned: Scores,
    original: Scores,
    seconds: float,
    device: str,
) -> dict[str, Any]:
    """Return the record of a finished run. Only `timings` and `git` may differ between repeats."""
    return {
        "schema_version": SCHEMA_VERSION,
        "config": asdict(cfg),
        "versions": {"python": platform.python_version(), **package_versions()},
        "git": git_state(),
        "device": device,
        "data": {"name": cfg.dataset.name, "fingerprint": artefacts["texts"].id},
        "artefacts": {name: str(artefact.folder) for name, artefact in artefacts.items()},
        "timings": {
            "this_run_seconds": round(seconds, 2),
            "making_seconds": {
                name: artefact.seconds() for name, artefact in artefacts.items() if artefact.exists
            },
        },
        "metrics": {key: _estimate(value) for key, value in tuned.metrics.items()},
        "baseline": {key: _estimate(value) for key, value in original.metrics.items()},
        "history": [row for row in history if "epoch" in row],
        "per_text": {"metrics": tuned.per_text, "baseline": original.per_text},
        "samples": [
            {
                "context": after["context"],
                "reference": after["reference"],
                "continuation": _continuation(after),
                "original_continuation": _continuation(before),
            }
            for after, before in zip(tuned.samples, original.samples, strict=True)
        ],
    }


def _estimate(value: Estimate) -> dict[str, Any]:
    return {"mean": value.mean, "ci95": list(value.ci95) if value.ci95 else None, "n": value.n}


def _continuation(sample: dict[str, Any]) -> dict[str, Any]:
    return {
        "text": "".join(sample["pieces"]),
        "pieces": sample["pieces"],
        "tokens": sample["tokens"],
    }


def git_state() -> dict[str, Any] | None:
    """Return the commit of the checkout that this code runs from; none if it is installed."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(  # noqa: S603  (our own words, no shell)
            ["git", *words],  # noqa: S607  (git is wherever the user has it)
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return done.stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", __file__):
            return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        pass
    return None
