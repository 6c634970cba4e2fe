"""Two values or files compared: bit-equal, rounding, or different, and where first."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hyperfitting.store.hashing import file_sha256
from hyperfitting.store.manifest import MANIFEST, MANIFEST_VERSION
from hyperfitting.verify.compare_runs import compare_artifacts
from hyperfitting.verify.values import Differences

FLOATS = arrays.arrays(np.float64, st.integers(1, 8), elements=st.floats(-1e3, 1e3))


@given(FLOATS, st.data())
def test_arrays_are_classified_as_numpy_does(old: Any, data: st.DataObject) -> None:
    step = st.sampled_from([0.0, 0.0, 1e-9, 1e-5, 1.0])
    new = old + np.array([data.draw(step) for _ in old])
    found = Differences(rtol=1e-6, atol=1e-8).compare(old, new)
    larger = np.maximum(np.abs(old), np.abs(new))
    close = np.abs(old - new) <= 1e-8 + 1e-6 * larger
    expected = "bit-equal" if (old == new).all() else "rounding" if close.all() else "different"
    assert found.kind == expected
    assert found.max_abs == np.abs(old - new).max()
    as_lists = Differences(rtol=1e-6, atol=1e-8).compare(old.tolist(), new.tolist())
    assert (as_lists.kind, as_lists.n_differing) == (found.kind, found.n_differing)
    if found.first:
        assert found.first.startswith(f"[{np.flatnonzero(old != new)[0]}]")


@pytest.mark.parametrize(
    ("old", "new", "first"),
    [
        ({"a": [1, 2, 3]}, {"a": [1, 5]}, "a[1]: 2 instead of 5"),
        ({"a": 1}, {"b": 1}, "a: is there"),
        ([1, 2], [1], "2 values instead of 1"),
        ([True], [1], "[0]: True instead of 1"),
        ([None], [0.0], "[0]: None instead of 0.0"),
        (["x"], ["y"], "[0]: 'x' instead of 'y'"),
    ],
)
def test_what_is_no_fraction_must_be_equal(old: Any, new: Any, first: str) -> None:
    found = Differences(rtol=1e-6, atol=1e-6).compare(old, new)
    assert (found.kind, found.first) == ("different", first)


def artifact_with(folder: Path, name: str, content: str) -> Path:
    """Write an artifact of one file."""
    path = folder / name
    path.parent.mkdir(parents=True)
    path.write_text(content, "utf-8")
    entry = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    values = {"id": "0", "recipe": {}, "packages": {}, "seconds": 0.0, "flops": None}
    manifest = values | {"manifest_version": MANIFEST_VERSION, "files": {name: entry}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("name", "old", "new", "kind", "first"),
    [
        (
            "samples/task.jsonl", '{"id": 0, "acc": 1}\n{"id": 1, "acc": 0}\n',
            '{"id": 7, "acc": 0}\n{"id": 1, "acc": 0}\n', "different",
            "samples/task.jsonl.line 1.id: 0 instead of 7",
        ),
        (
            "documents.jsonl", '"a\u2028"\n"b"\n', '"a\u2028"\n"c"\n', "different",
            "documents.jsonl.line 2: 'b' instead of 'c'",
        ),
        (
            "documents.jsonl", '"a"\n"b"\n', '"a"\n', "different",
            "documents.jsonl.line 2: is there",
        ),
        (
            "history.jsonl", '{"step": 1, "x": 0.0}\n', '{"x": -0.0, "step": 1}\n',
            "bytes differ, values equal", "",
        ),
    ],
    ids=["samples", "documents", "removed", "rewritten"],
)  # fmt: skip
def test_files_of_lines_are_compared_line_by_line(
    tmp_path: Path, name: str, old: str, new: str, kind: str, first: str
) -> None:
    folders = [artifact_with(tmp_path / which, name, x) for which, x in (("a", old), ("b", new))]
    differences = compare_artifacts(*folders)
    assert (differences.kind, differences.first) == (kind, first)
    assert differences.place == (first or f"{name}: {kind}")
    assert compare_artifacts(folders[0], folders[0]).kind == "bit-equal"
