"""What W&B is told of a run or a sweep: summary, texts, charts, files."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from hyperfitting.reporting import colouring, next_tokens, page
from hyperfitting.reporting.sweeps import SweepRecords

MOST_TEXTS, MOST_COLOURED, PLACES = 300, 24, 3
"""Bounds of what one run sends: rows of the table of texts, coloured texts, and places of a text
whose next tokens are shown."""


def summary(record: dict[str, Any]) -> dict[str, float]:
    """Return the record's metrics flat: `gen/ttr`, `gen/ttr_low`, …, `baseline/gen/ttr`, …

    The sets and shorter lengths of the evaluation give their means alone: `news/gen/ttr`,
    `at_96/gen/ttr`, `news/at_96/gen/ttr`.
    """
    flat: dict[str, float] = {}
    for part in ("metrics", "baseline", "difference"):
        prefix = "" if part == "metrics" else f"{part}/"
        for key, value in record[part].items():
            flat[prefix + key] = value["mean"]
            if value["ci95"]:
                flat[f"{prefix}{key}_low"], flat[f"{prefix}{key}_high"] = value["ci95"]
            if value.get("p") is not None:
                flat[f"{prefix}{key}_p"] = value["p"]
    longest = record["slices"][0]["new_tokens"]
    for one in record["slices"][1:]:
        where = f"{one['set']}/" if one["set"] else ""
        length = f"at_{one['new_tokens']}/" if one["new_tokens"] != longest else ""
        for key, value in one["metrics"].items():
            flat[where + length + key] = value["mean"]
    for name, seconds in record["timings"]["making_seconds"].items():
        flat[f"seconds/{name}"] = seconds
    config = record["config"]
    training = record["timings"]["making_seconds"].get("tuned")
    if training and record["history"]:
        tokens = config["dataset"]["n_train"] * config["dataset"]["seq_len"]
        flat["speed/training_tokens_per_second"] = (
            record["history"][-1]["epoch"] * tokens / training
        )
    return flat


def media(record: dict[str, Any]) -> dict[str, Any]:
    """Return what is to be looked at: texts, their colouring, and the histograms of overlap."""
    import wandb

    few = {**record, "samples": record["samples"][:MOST_COLOURED]}
    found = {"texts": _table(record), "texts_coloured": wandb.Html(colouring.page(few))}
    for side, name in (("metrics", "hyperfitted"), ("baseline", "original")):
        counts = record["overlap_histogram"][side]
        if counts:
            edges = [i - 0.5 for i in range(len(counts) + 1)]
            histogram = wandb.Histogram(np_histogram=(counts, edges))
            found[f"overlap/{name}"] = histogram
    for texts in next_tokens.sets(record):
        for number, place in enumerate(next_tokens.places(record, texts, PLACES), 1):
            found[f"next_tokens/{texts}_{number}"] = _next_tokens(place)
    return found


def _next_tokens(place: next_tokens.Place) -> Any:
    """Return a chart of what comes next at a place, hyperfitted and original."""
    import wandb

    before = {token.text: token.mass for token in place.original}
    table = wandb.Table(columns=["token", "hyperfitted", "original", "trained on"])
    for token in place.hyperfitted:
        table.add_data(repr(token.text), token.mass, before.get(token.text), token.trained_on)
    title = f"…{place.context[-60:]}"
    return wandb.plot.bar(table, "token", "hyperfitted", title=title)


def _table(record: dict[str, Any]) -> Any:
    import wandb

    of_text = {"ttr": "gen/ttr", "rep_2": "gen/rep_2", "overlap": "gen/dataset_overlap"}
    sides = {"": "metrics", "original_": "baseline"}
    numbers = {
        prefix + name: record["per_text"][side].get(key)
        for prefix, side in sides.items()
        for name, key in of_text.items()
    }
    texts = ["set", "context", "original", "continuation", "reference"]
    table = wandb.Table(columns=[*texts, *numbers])
    for row, sample in enumerate(record["samples"][:MOST_TEXTS]):
        table.add_data(
            sample["set"],
            sample["context"],
            sample["original_continuation"]["text"],
            sample["continuation"]["text"],
            sample["reference"],
            *(values[row] if values else None for values in numbers.values()),
        )
    return table


def side_by_side(sweep: SweepRecords, folder: Path) -> dict[str, Any]:
    """Return a table of contexts, a column for each writer, and the report's figures."""
    import wandb

    blocks = list(islice(page.blocks(sweep), MOST_TEXTS))
    writers = list(dict.fromkeys(w["name"] for block in blocks for w in block["writers"]))
    table = wandb.Table(columns=["context", *writers, "as it really goes on"])
    for block in blocks:
        texts = {w["name"]: "".join(text for text, *_ in w["text"]) for w in block["writers"]}
        table.add_data(block["context"], *(texts.get(name) for name in writers), block["reference"])
    figures = {f"figures/{p.stem}": wandb.Image(str(p)) for p in sorted(folder.glob("*.png"))}
    return {"contexts": table, **figures}


def artefact(run: Any, kind: str, paths: Iterable[Path]) -> Any:
    """Return files or whole folders as a W&B artifact, named after its kind and the run."""
    import wandb

    made = wandb.Artifact(f"{kind}-{run.id}", type=kind)
    for path in paths:
        if path.is_dir():
            made.add_dir(str(path))  # copied: a report is drawn again in place
        elif path.is_file():
            made.add_file(str(path), policy="immutable")  # no copy of it in the user's home
    return made
