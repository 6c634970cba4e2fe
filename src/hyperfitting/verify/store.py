"""Checks against the artifact store, which is only read: ids, checksums, and the record rebuilt."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from hyperfitting.errors import UserError
from hyperfitting.evaluation.record_builder import build_record, predictions
from hyperfitting.formatting import listed
from hyperfitting.pipeline.pipeline import Pipeline
from hyperfitting.pipeline.result import run_result
from hyperfitting.record.files import Predictions
from hyperfitting.record.schema import Record
from hyperfitting.runtime.code_version import code_version
from hyperfitting.store.hashing import digest, file_sha256
from hyperfitting.store.manifest import CODE, MANIFEST, read_manifest
from hyperfitting.verify.check import Check, Outcome
from hyperfitting.verify.scores import ATOL, RTOL
from hyperfitting.verify.values import Differences

NOT_DETERMINED: dict[str, Any] = {
    "config": True,  # checked by the ids, with its sweep and with .hydra/config.yaml
    "artifacts": True,
    "timings": True,
    "code": True,
    "versions": True,
    "device": True,
    "machine": True,
    "model": {"location"},
}
"""Parts of a record that its artifacts do not determine."""


def recorded_store(record: Record) -> Path | None:
    """Return the store that a record names; none: it has no artifacts."""
    return next((Path(folder).parents[1] for folder in record.artifacts.values()), None)


def check_ids(record: Record, pipeline: Pipeline) -> Check:
    """Compare every id of a record with the one that its config determines."""
    name = "artifact ids"
    old = {name: Path(folder).name for name, folder in record.artifacts.items()}
    new = {name: artifact.id for name, artifact in pipeline.artifacts.items()}
    old |= {
        "model.name": record.model.name,
        "model.id": record.model.id,
        "dataset.name": record.dataset.name,
        "dataset.fingerprint": record.dataset.fingerprint,
        "dataset.source": record.dataset.source,
    }
    documents = pipeline.documents.artifact
    model = pipeline.cfg.model
    if model.source == "hub":  # else a folder of the machine it was made on
        old["model.location"] = record.model.location.partition("@")[0]
        new["model.location"] = str(model.path)
    new |= {
        "model.name": pipeline.base.name,
        "model.id": pipeline.base.id,
        "dataset.name": pipeline.cfg.dataset.name,
        "dataset.fingerprint": documents.id,
        "dataset.source": documents.recipe["inputs"]["source"],
    }
    differing = [key for key in old | new if old.get(key) != new.get(key)]
    if not differing:
        return Check(name, "passed", f"{len(new)} follow from the recorded config")
    first = differing[0]
    detail = (
        f"{listed(differing)} not those of the recorded config "
        f"({first}: {old.get(first)} instead of {new.get(first)})"
    )
    if record.code.digest != code_version().digest:
        return Check(
            name, "not checked", f"{detail}; the code that made the record may give others"
        )
    return Check(name, "failed", detail)


def check_artifacts(record: Record, store: Path) -> Check:
    """Compare every file of a record's artifacts with its checksum, and each recipe with its id."""
    name, n_files = "artifacts", 0
    missing, damaged, other_code = [], [], []
    for label, recorded in record.artifacts.items():
        kind, artifact_id = Path(recorded).parts[-2:]
        folder = store / kind / artifact_id
        if not (folder / MANIFEST).is_file():
            missing.append(label)
            continue
        try:
            manifest = read_manifest(folder)
        except UserError as error:
            damaged.append(f"{label}: {error.problem}")
            continue
        if manifest.id != artifact_id or digest(manifest.recipe) != artifact_id:
            damaged.append(f"{label}: its recipe is that of another id")
        if manifest.packages.get(CODE) not in (None, record.code.digest):
            other_code.append(label)
        for file, entry in manifest.files.items():
            n_files += 1
            path = folder / file
            if not path.is_file() or file_sha256(path) != entry.sha256:
                damaged.append(f"{label}: {file} is missing or does not match its checksum")
    if damaged:
        return Check(name, "failed", listed(damaged))
    if missing:
        n_present = len(record.artifacts) - len(missing)
        return Check(
            name,
            "not checked",
            f"{n_present} of {len(record.artifacts)} are in {store}; not there: {listed(missing)}",
        )
    detail = f"{len(record.artifacts)} artifacts, {n_files} files"
    if other_code:
        detail += f"; built by other code: {listed(other_code)}"
    return Check(name, "passed", detail)


def check_rebuilt(record: Record, recorded: Predictions | None, pipeline: Pipeline) -> Check:
    """Build the record again from its artifacts, which are intact, and compare everything."""
    comparison = pipeline.score()
    result = run_result(pipeline, comparison, torch.device("cpu"), 0.0)
    rebuilt = build_record(result, pipeline.cfg.evaluation)
    differences = Differences(RTOL, ATOL)
    differences.compare(
        record.model_dump(exclude=NOT_DETERMINED), rebuilt.model_dump(exclude=NOT_DETERMINED)
    )
    if recorded is not None:
        arrays = {name: np.asarray(values) for name, values in predictions(comparison).items()}
        differences.compare(dict(recorded), arrays, "predictions")
    outcome: Outcome = "failed" if differences.kind == "different" else "passed"
    return Check("record from artifacts", outcome, str(differences))
