"""Two runs of one config compared: artifact by artifact in pipeline order, then the records."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hyperfitting.evaluation.arrays import BATCHES_FILE
from hyperfitting.formatting import listed
from hyperfitting.record.schema import Record
from hyperfitting.store.hashing import file_sha256
from hyperfitting.store.manifest import MANIFEST, read_manifest
from hyperfitting.verify.check import Check
from hyperfitting.verify.store import NOT_DETERMINED
from hyperfitting.verify.values import Differences

RTOL, ATOL = 1e-4, 1e-6
"""Rounding of float32 through a training: other kernels, threads or devices add in another order.
A text that differs is never rounding."""
_NOT_REPRODUCED = NOT_DETERMINED | {
    "generation_batches": True,  # the free memory decides
    "downstream": {"harness"},  # a version
}
"""Parts of a record that differ between runs of one config; every other field is compared."""
_MADE_FIRST = ("model", "dataset", "image", "history", "samples")
"""Fields of a record from which the others follow, in the order in which a run makes them."""


def compare_runs(
    old: Record, new: Record, old_store: Path | None, new_store: Path
) -> Iterator[Check]:
    """Yield how two runs of one config compare, and where they part first.

    Args:
        old: the record to verify.
        new: the record of the new run.
        old_store: holds the old artifacts; none, or not there: only the records are compared.
        new_store: holds the new artifacts.
    """
    yield Check("environment", "passed", _environment(old, new))
    first = ""
    missing = sorted(old.artifacts.keys() ^ new.artifacts.keys())
    for label in (label for label in new.artifacts if label in old.artifacts):
        before = old_store and _in_store(old_store, old.artifacts[label])
        after = _in_store(new_store, new.artifacts[label])
        if before is None or not (before / MANIFEST).is_file():
            missing.append(label)
            continue
        differences = compare_artifacts(before, after)
        if differences.kind != "bit-equal":
            first = first or f"{label}: {differences.place}"
        yield _check(label, differences, before.name != after.name)
    for name, differences in _compare_records(old, new):
        if differences.kind != "bit-equal":
            first = first or f"record: {differences.place}"
        yield _check(f"record: {name}", differences)
    if missing:
        yield Check("missing artifacts", "not checked", f"not in both stores: {listed(missing)}")
    throughout = "bit-equal as far as compared" if missing else "bit-equal throughout"
    yield Check("first difference", "passed", first or f"none: {throughout}")


def _in_store(store: Path, recorded: str) -> Path:
    """Return an artifact's folder in a store: a record may name it in another."""
    return store / Path(recorded).parent.name / Path(recorded).name


def _compare_records(old: Record, new: Record) -> Iterator[tuple[str, Differences]]:
    """Yield the compared fields that one of two records has, with their differences."""
    before, after = (record.model_dump(exclude=_NOT_REPRODUCED) for record in (old, new))
    for name in (*_MADE_FIRST, *(name for name in before if name not in _MADE_FIRST)):
        if before[name] is not None or after[name] is not None:
            yield name, Differences(RTOL, ATOL).compare(before[name], after[name], name)


def _check(name: str, differences: Differences, is_other_id: bool = False) -> Check:
    is_equal = differences.kind == "bit-equal"
    detail = str(differences) if is_equal else f"{differences.kind}: {differences}"
    if is_other_id:
        detail += "; under another id: the code is of another version"
    return Check(name, "failed" if differences.kind == "different" else "passed", detail)


def compare_artifacts(old: Path, new: Path) -> Differences:
    """Compare the files of two artifacts' folders.

    Files without numbers of their own, such as weights in an unknown format, must be equal.
    """
    differences = Differences(RTOL, ATOL)
    before, after = (read_manifest(folder).files for folder in (old, new))
    for name in sorted(before.keys() | after.keys()):
        if name == BATCHES_FILE:  # memory decides; it changes no text on a CPU
            continue
        if name not in before or name not in after:
            differences.compare(name in before, name in after, name)
        elif file_sha256(old / name) == file_sha256(new / name):
            differences.n_values += 1
            continue
        differences.differing_file = differences.differing_file or name
        if name.endswith(".safetensors"):
            _compare_tensors(differences, old / name, new / name)
        else:
            differences.compare(_content(old / name), _content(new / name), name)
    return differences


def _content(path: Path) -> Any:
    """Return what a file of an artifact holds, for a comparison value by value."""
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".json":
        return json.loads(path.read_text("utf-8"))
    if path.suffix == ".jsonl":
        lines = path.read_text("utf-8").split("\n")  # a text may have other line ends
        rows = [json.loads(line) for line in lines if line]
        return {_row_name(number, row): row for number, row in enumerate(rows, 1)}
    return file_sha256(path)


def _row_name(number: int, row: Any) -> str:
    """Return the name of a line: its number, and its epoch or step in a training's history."""
    for kind in ("epoch", "step"):
        if isinstance(row, dict) and kind in row:
            return f"line {number} ({kind} {row[kind]})"
    return f"line {number}"


def _compare_tensors(differences: Differences, old: Path, new: Path) -> None:
    """Compare tensors one at a time: both files together may not fit into memory."""
    import torch
    from safetensors import safe_open

    with safe_open(old, "pt") as before, safe_open(new, "pt") as after:
        names = list(before.keys())
        differences.compare(sorted(names), sorted(after.keys()), f"{old.name}: names")
        for name in (name for name in names if name in set(after.keys())):
            tensors = [before.get_tensor(name), after.get_tensor(name)]
            if tensors[0].dtype == tensors[1].dtype == torch.bfloat16:  # numpy has none
                tensors = [tensor.float() for tensor in tensors]
            first, second = (tensor.numpy() for tensor in tensors)
            differences.compare(first, second, f"{old.name}: {name}")


def _environment(old: Record, new: Record) -> str:
    """Return how two environments differ, or that they do not."""
    facts = [("code", old.code.digest, new.code.digest), ("device", old.device, new.device)]
    facts += [(k, v, new.machine.model_dump()[k]) for k, v in old.machine.model_dump().items()]
    facts += [(package, v, new.versions.get(package, "")) for package, v in old.versions.items()]
    differing = [f"{name} {before} -> {after}" for name, before, after in facts if before != after]
    return "; ".join(differing) or "the same code, versions, device, CPU and threads"
