"""The record of a run, as it is built. What a field means is in the README ("results.json")."""

import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hyperfitting.config import RunConfig
from hyperfitting.metrics.overlap import Overlap
from hyperfitting.metrics.uncertainty import Estimate
from hyperfitting.progress import Row
from hyperfitting.results import SCHEMA_VERSION
from hyperfitting.scoring import Compared, Slice, notes, per_text, slices
from hyperfitting.store import Artefact, package_versions


@dataclass(frozen=True)
class Found:
    """What a run found out."""

    history: list[Row]
    compared: Compared
    notes: list[str]


def build(
    cfg: RunConfig, artefacts: dict[str, Artefact], found: Found, seconds: float, device: str
) -> dict[str, Any]:
    """Return the record of a finished run. Only `timings` and `git` may differ between repeats."""
    final, original = found.compared.final, found.compared.original
    sides = {"metrics": final, "baseline": original, "reference": found.compared.reference}
    cut = [_slice(one) for one in slices(found.compared, cfg.evaluation)]
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
        "notes": found.notes + notes(found.compared),
        **{key: cut[0][key] for key in ("metrics", "baseline", "reference", "difference")},
        "slices": cut,
        "history": [row for row in found.history if "epoch" in row],
        "steps": {side: scores.steps() for side, scores in sides.items()},
        "overlap_histogram": {side: scores.overlap_histogram() for side, scores in sides.items()},
        "per_text": {
            side: per_text(scores, cfg.evaluation.bleu_n) for side, scores in sides.items()
        },
        "samples": [
            {
                "set": texts,
                "context": after["context"],
                "reference": after["reference"],
                "continuation": _continuation(after, final.overlap, row),
                "original_continuation": _continuation(before, original.overlap, row),
            }
            for row, (texts, after, before) in enumerate(
                zip(final.output.sets, final.output.samples, original.output.samples, strict=True)
            )
        ],
    }


def _slice(one: Slice) -> dict[str, Any]:
    return {
        "set": one.texts,
        "new_tokens": one.new_tokens,
        "metrics": {key: _estimate(value) for key, value in one.metrics.items()},
        "baseline": {key: _estimate(value) for key, value in one.baseline.items()},
        "reference": {key: _estimate(value) for key, value in one.reference.items()},
        "difference": {
            key: _estimate(value) | {"p": value.p} for key, value in one.difference.items()
        },
    }


def _estimate(value: Estimate) -> dict[str, Any]:
    return {"mean": value.mean, "ci95": list(value.ci95) if value.ci95 else None, "n": value.n}


def _continuation(sample: dict[str, Any], overlap: Overlap, row: int) -> dict[str, Any]:
    return {
        "text": "".join(sample["pieces"]),
        "pieces": sample["pieces"],
        "tokens": sample["tokens"],
        "overlap": {name: int(values[row]) for name, values in vars(overlap).items()},
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
