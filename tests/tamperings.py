"""Edits of a run or sweep, and which checks of `hyperfit-verify` find them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from hyperfitting.record.files import CHECKSUMS_FILE, PREDICTIONS_FILE, RECORD_FILE
from hyperfitting.store.hashing import file_sha256
from hyperfitting.sweep.spec import SPEC_FILE

Edit = Callable[[Path], None]


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def edit_record(run: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    edit_json(run / RECORD_FILE, edit)


def edit_spec(sweep: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    edit_json(sweep / SPEC_FILE, edit)


def sign_again(run: Path) -> None:
    """Write checksums of the files as they are, as somebody who forges a result would."""
    names = [line.split()[1] for line in (run / CHECKSUMS_FILE).read_text().splitlines()]
    lines = (f"{file_sha256(run / name)}  {name}\n" for name in names if (run / name).is_file())
    (run / CHECKSUMS_FILE).write_text("".join(lines))


def edited_score(run: Path) -> None:
    def edit(record: dict[str, Any]) -> None:
        record["slices"][0]["tuned"]["gen/ttr"]["mean"] += 1e-6

    edit_record(run, edit)


def edited_text(run: Path) -> None:
    edit_record(run, lambda record: record["samples"][0]["tuned"].update(text="Much better."))


def edited_tokens(run: Path) -> None:
    def edit(record: dict[str, Any]) -> None:
        text = record["samples"][1]["tuned"]
        text["tokens"] = list(range(len(text["tokens"])))

    edit_record(run, edit)


def edited_predictions(run: Path) -> None:
    with np.load(run / PREDICTIONS_FILE) as file:
        values = {name: file[name].copy() for name in file.files}
    values["tuned.loss"][0, 0] -= 0.5
    np.savez_compressed(run / PREDICTIONS_FILE, **values)


def edited_config(run: Path) -> None:
    edit_record(run, lambda record: record["config"]["trainer"].update(epochs=20))


def swapped_ids(run: Path) -> None:
    def edit(record: dict[str, Any]) -> None:
        ids = record["artifacts"]
        tuned, base = (next(n for n in ids if n.startswith(f"{m}/cont")) for m in ("tuned", "base"))
        ids[tuned], ids[base] = ids[base], ids[tuned]

    edit_record(run, edit)


def edited_shorter_overlap(run: Path) -> None:
    """Of a length at which it cannot be computed from the record."""

    def edit(record: dict[str, Any]) -> None:
        part = next(p for p in record["slices"] if p["max_new_tokens"] < 20)
        part["tuned"]["gen/dataset_overlap"]["mean"] = 0.001

    edit_record(run, edit)


def longer_shorter_overlap(run: Path) -> None:
    def edit(record: dict[str, Any]) -> None:
        part = next(p for p in record["slices"] if p["max_new_tokens"] < 20)
        for group in ("tuned", "difference"):
            part[group]["gen/dataset_overlap"]["mean"] += 1000

    edit_record(run, edit)


def invented_mauve(run: Path) -> None:
    def edit(record: dict[str, Any]) -> None:
        record["slices"][0]["tuned"]["gen/mauve"] = {"mean": 0.99, "ci95": None, "n": 3}

    edit_record(run, edit)


def other_seed(run: Path) -> None:
    other = run.with_name("seed=1")
    shutil.rmtree(run)
    shutil.copytree(other, run)


def edited_interval(run: Path) -> None:
    def edit(record: dict[str, Any]) -> None:
        record["slices"][0]["tuned"]["gen/ttr"]["ci95"][0] += 1e-6

    edit_record(run, edit)


def swapped_texts(run: Path) -> None:
    """The models' continuations of a text, with all their values."""

    def edit(record: dict[str, Any]) -> None:
        values, sample = record["per_text"], record["samples"][0]
        sample["tuned"], sample["base"] = sample["base"], sample["tuned"]
        for key in values["tuned"]:
            tuned, base = values["tuned"][key], values["base"][key]
            tuned[0], base[0] = base[0], tuned[0]

    edit_record(run, edit)


def dropped_text(run: Path) -> None:
    def edit(record: dict[str, Any]) -> None:
        for values in (
            record["samples"],
            *(v for s in record["per_text"].values() for v in s.values()),
        ):
            values.pop(0)

    edit_record(run, edit)
    with np.load(run / PREDICTIONS_FILE) as file:
        values = {name: file[name][1:] for name in file.files}
    np.savez_compressed(run / PREDICTIONS_FILE, **values)


def missing_value(run: Path) -> None:
    edit_record(run, lambda r: r["per_text"]["tuned"]["gen/ttr"].__setitem__(0, None))


def not_a_number(run: Path) -> None:
    edit_record(run, lambda r: r["slices"][0]["tuned"]["gen/ttr"].update(mean=float("nan")))


def dropped_metric(run: Path) -> None:
    def edit(record: dict[str, Any]) -> None:
        sides = [record["per_text"][side] for side in ("tuned", "base", "reference")]
        sides += [s for part in record["slices"] for s in part.values() if isinstance(s, dict)]
        for values in sides:
            values.pop("gen/rep_2", None)

    edit_record(run, edit)


def other_seed_everywhere(run: Path) -> None:
    """In the record, and in the config as Hydra composed it."""
    edit_record(run, lambda record: record["config"]["trainer"].update(seed=7))
    composed = OmegaConf.load(run / ".hydra/config.yaml")
    composed.trainer.seed = 7
    OmegaConf.save(composed, run / ".hydra/config.yaml")


def other_model_name(run: Path) -> None:
    edit_record(run, lambda record: record["model"].update(name="llama31_8b"))


def edited_history(run: Path) -> None:
    edit_record(run, lambda record: record["history"][-1].update({"train/loss": 0.001}))


def edited_notes(run: Path) -> None:
    edit_record(run, lambda record: record["notes"].append("a note of somebody else"))


TAMPERINGS: dict[Edit, set[str]] = {
    edited_score: {"scores", "record from artifacts"},
    edited_text: {"texts", "record from artifacts"},
    edited_tokens: {"scores", "record from artifacts"},
    edited_predictions: {"scores", "record from artifacts"},
    edited_config: {"config", "artifact ids", "place in the sweep"},
    swapped_ids: {"artifact ids"},
    other_seed: {"place in the sweep"},
    edited_history: {"record from artifacts"},
    edited_notes: {"record from artifacts"},
}
"""By edit, the checks that find it after the checksums were forged too."""

WITHOUT_STORE: dict[Edit, set[str]] = {
    edited_interval: {"scores"},
    edited_shorter_overlap: {"consistency"},
    longer_shorter_overlap: {"consistency"},
    invented_mauve: {"consistency"},
    swapped_texts: {"scores", "texts"},
    dropped_text: {"scores", "texts"},
    missing_value: {"scores"},
    dropped_metric: {"scores"},
    not_a_number: {"record"},
    other_seed_everywhere: {"place in the sweep", "artifact ids"},
    other_model_name: {"artifact ids"},
}
"""The same, of the record alone."""


def removed_run(sweep: Path) -> None:
    shutil.rmtree(sweep / "seed=1")
    edit_spec(sweep, lambda spec: spec["runs"].pop())


def swapped_labels(sweep: Path) -> None:
    def edit(spec: dict[str, Any]) -> None:
        first, second = spec["runs"]
        first["labels"], second["labels"] = second["labels"], first["labels"]

    edit_spec(sweep, edit)


def swapped_runs(sweep: Path) -> None:
    """Each run under the other's name, with its own settings."""

    def edit(spec: dict[str, Any]) -> None:
        first, second = spec["runs"]
        first["settings"], second["settings"] = second["settings"], first["settings"]

    edit_spec(sweep, edit)
    (sweep / "seed=0").rename(sweep / "aside")
    (sweep / "seed=1").rename(sweep / "seed=0")
    (sweep / "aside").rename(sweep / "seed=1")


def other_scale(sweep: Path) -> None:
    edit_spec(sweep, lambda spec: spec.update(scale="paper"))


def other_experiment(sweep: Path) -> None:
    edit_spec(sweep, lambda spec: spec.update(name="table1_embedded"))


def other_code(sweep: Path) -> None:
    edit_record(sweep / "seed=0", lambda record: record["code"].update(digest="f" * 16))


OF_SWEEPS: dict[Edit, str] = {
    removed_run: "description",
    swapped_labels: "description",
    swapped_runs: "configs of the labels",
    other_scale: "description",
    other_experiment: "description",
    other_code: "code of the sweep",
}
"""By edit of a sweep, the only check that finds it."""
