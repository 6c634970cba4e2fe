"""What W&B receives of a run or a sweep: summary, texts, charts, files."""

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hyperfitting.record.chat import CHAT
from hyperfitting.record.schema import Record, Side, Slice
from hyperfitting.reporting.images import Picture, enlarged, picture
from hyperfitting.reporting.next_tokens import TokenPosition, changed_positions
from hyperfitting.reporting.repetition_highlight import texts_page
from hyperfitting.reporting.sweep_records import SweepRecords
from hyperfitting.reporting.texts import text_metrics, texts_by_context

MAX_TEXTS, MAX_HIGHLIGHTED, MAX_POSITIONS = 300, 24, 3
"""Per run: rows of the table of texts, highlighted texts, and positions in a dataset's first text
whose next tokens are charted."""
_CONTEXT_CHARACTERS = 60
_GAP = 8
"""Pixels between two images."""
_SIDES: tuple[Side, ...] = ("tuned", "base")


def summary(record: Record) -> dict[str, float]:
    """Return the record's metrics flat, by W&B's keys.

    Overall metrics have intervals: `gen/ttr`, `gen/ttr_low`, `gen/ttr_high`; those of the base
    model are `base/gen/ttr`, and differences `difference/gen/ttr`, with `_p`. Comparisons of both
    models are `mech/…`. Datasets and shorter lengths have means only: `news/gen/ttr`,
    `at_96/gen/ttr`, `news/at_96/gen/ttr`. Those of the answers to questions are all there:
    `chat/gen/ttr`, `base/chat/gen/ttr`, `difference/chat/gen/ttr`.
    """
    overall = record.overall
    flat = _flat_comparison(overall, "")
    if answers := record.answers:
        flat |= _flat_comparison(answers, f"{CHAT}/")
    if record.mechanism is not None:
        for key, estimate in record.mechanism.estimates.items():
            flat |= _flat_estimate(key, estimate.mean, estimate.ci95)
    for part in record.slices[1:]:
        dataset = f"{part.dataset}/" if part.dataset else ""
        is_full = part.max_new_tokens == overall.max_new_tokens
        length = "" if is_full else f"at_{part.max_new_tokens}/"
        for key, estimate in part.tuned.items():
            flat[dataset + length + key] = estimate.mean
    build_seconds = record.timings.build_seconds
    flat |= {f"seconds/{name}": seconds for name, seconds in build_seconds.items()}
    if build_seconds.get("tuned") and record.history:
        dataset_config = record.config["dataset"]
        tokens_per_epoch = dataset_config["n_train"] * dataset_config["seq_len"]
        flat["speed/training_tokens_per_second"] = (
            record.history[-1]["epoch"] * tokens_per_epoch / build_seconds["tuned"]
        )
    return flat


def _flat_comparison(part: Slice, name: str) -> dict[str, float]:
    """Return a slice's metrics of both models and their differences, with intervals, by key."""
    flat: dict[str, float] = {}
    for prefix, estimates in (("", part.tuned), ("base/", part.base)):
        for key, estimate in estimates.items():
            flat |= _flat_estimate(f"{prefix}{name}{key}", estimate.mean, estimate.ci95)
    for key, difference in part.difference.items():
        flat |= _flat_estimate(f"difference/{name}{key}", difference.mean, difference.ci95)
        if difference.p is not None:
            flat[f"difference/{name}{key}_p"] = difference.p
    return flat


def _flat_estimate(key: str, mean: float, ci95: tuple[float, float] | None) -> dict[str, float]:
    if ci95 is None:
        return {key: mean}
    return {key: mean, f"{key}_low": ci95[0], f"{key}_high": ci95[1]}


Media = Mapping[str, Callable[[], Any]]
"""By W&B's key, what returns the object: one that cannot be built leaves the others."""


def media(record: Record) -> Media:
    """Return texts or images, answers, highlighted texts, overlap histograms, next tokens."""
    logged: dict[str, Callable[[], Any]] = {
        "texts": partial(_texts_table, record),
        "texts_highlighted": partial(_highlighted, record),
    }
    if record.chat is not None:
        logged["answers"] = partial(_answers_table, record)
    if record.image is not None:
        logged["images"] = partial(_images, record)
    for side in _SIDES:
        counts = getattr(record.overlap_histogram, side)
        if counts:
            logged[f"overlap/{side}"] = partial(_histogram, counts)
    for dataset, next_tokens in record.next_tokens.items():
        for number, position in enumerate(changed_positions(next_tokens, MAX_POSITIONS), 1):
            logged[f"next_tokens/{dataset}_{number}"] = partial(_next_tokens_chart, position)
    return logged


def _highlighted(record: Record) -> Any:
    import wandb

    return wandb.Html(texts_page(record, MAX_HIGHLIGHTED))


def _histogram(counts: Sequence[int]) -> Any:
    """Return a histogram of integers.

    Args:
        counts: (N,) how often each of 0 to N - 1 occurs; pooled if W&B allows fewer bins.
    """
    import wandb

    width = math.ceil(len(counts) / wandb.Histogram.MAX_LENGTH)
    pooled = [sum(counts[i : i + width]) for i in range(0, len(counts), width)]
    edges = [i * width - 0.5 for i in range(len(pooled) + 1)]
    return wandb.Histogram(np_histogram=(pooled, edges))


def _next_tokens_chart(position: TokenPosition) -> Any:
    """Return a bar chart of the next tokens at a position, and of both models' probabilities."""
    import wandb

    base = {token.id: token.probability for token in position.base}
    table = wandb.Table(columns=["token", *_SIDES, "in training data"])
    for token in position.tuned:
        table.add_data(
            repr(token.text), token.probability, base.get(token.id), token.in_training_data
        )
    title = f"…{position.context[-_CONTEXT_CHARACTERS:]}"
    return wandb.plot.bar(table, "token", "tuned", title=title)


def _texts_table(record: Record) -> Any:
    columns = ["dataset", "context", "base", "tuned", "reference"]
    contents = [
        [sample.dataset, *_contents(record, row)]
        for row, sample in enumerate(record.samples[:MAX_TEXTS])
    ]
    return _table(record, columns, contents, 0)


def _answers_table(record: Record) -> Any:
    first = len(record.samples)
    texts = [(text.context, text.base, text.tuned) for text in record.texts[first:]]
    contents = [[text.text for text in row] for row in texts]
    return _table(record, ["question", "base", "tuned"], contents, first)


def _table(record: Record, columns: list[str], contents: list[list[Any]], first: int) -> Any:
    """Return a table of texts with their metrics; the base model's have the prefix `base/`.

    Args:
        record: of the texts.
        columns: headings of the contents.
        contents: a row for each text.
        first: index in `Record.texts` of the first.
    """
    import wandb

    values = {
        f"{prefix}{key}": record.text_values(side, key)[first : first + len(contents)]
        for side, prefix in zip(_SIDES, ("", "base/"), strict=True)
        for key in text_metrics(record)
    }
    values = {key: of_texts for key, of_texts in values.items() if set(of_texts) != {None}}
    table = wandb.Table(columns=[*columns, *values])
    for row, cells in enumerate(contents):
        table.add_data(*cells, *(of_texts[row] for of_texts in values.values()))
    return table


def _images(record: Record) -> list[Any]:
    return [_side_by_side(record, row) for row in range(min(MAX_TEXTS, len(record.samples)))]


def _side_by_side(record: Record, row: int) -> Any:
    """Return context, completions and real image of a sample side by side."""
    import wandb

    pictures = _pictures(record, row)
    gap = np.zeros((len(pictures[0]), _GAP, 4), dtype=np.uint8)  # transparent
    parts = [part for pixels in pictures for part in (pixels, gap)][:-1]
    caption = f"{record.samples[row].dataset} {row + 1}: context, base, {record.tuned_label}, real"
    return wandb.Image(np.concatenate(parts, axis=1), caption=caption)


def _pictures(record: Record, row: int) -> list[Picture]:
    """Return context, base, tuned and reference of a sample as enlarged images."""
    sides: tuple[Side | None, ...] = (None, "base", "tuned", "reference")
    return [enlarged(picture(record, row, side)) for side in sides]


def _contents(record: Record, row: int) -> list[Any]:
    """Return context, base, tuned and reference of a sample: texts, or W&B's images."""
    if record.image is None:
        sample = record.samples[row]
        return [text.text for text in (sample.context, sample.base, sample.tuned, sample.reference)]
    import wandb

    return [wandb.Image(pixels) for pixels in _pictures(record, row)]


def report_media(sweep: SweepRecords, folder: Path) -> Media:
    """Return a table of contexts with a column for each model, and the report's figures."""
    import wandb

    figures = {
        f"figures/{path.stem}": partial(wandb.Image, str(path))
        for path in sorted(folder.glob("*.png"))
    }
    return {"contexts": partial(_contexts_table, sweep), **figures}


def _contexts_table(sweep: SweepRecords) -> Any:
    import wandb

    contexts = list(islice(texts_by_context(sweep), MAX_TEXTS))
    names = list(dict.fromkeys(c.name for texts in contexts for c in texts.continuations))
    table = wandb.Table(columns=["context", *names, "reference"])
    for texts in contexts:
        by_name = {c.name: _content(c.text, c.image) for c in texts.continuations}
        context = _content(texts.context, texts.context_image)
        reference = _content(texts.reference, texts.reference_image)
        table.add_data(context, *(by_name.get(name) for name in names), reference)
    return table


def _content(text: str, address: str) -> Any:
    """Return a text, or the image of a data address, as W&B shows it in a table."""
    if not address:
        return text
    import wandb
    from PIL import Image

    png = base64.b64decode(address.partition(",")[2])
    return wandb.Image(Image.open(io.BytesIO(png)))


def create_artifact(run: Any, kind: str, paths: Iterable[Path]) -> Any:
    """Return files or whole folders as a W&B artifact, named after its kind and the run."""
    import wandb

    artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
    for path in paths:
        if path.is_dir():
            artifact.add_dir(str(path))  # copied: a report is drawn again in place
        elif path.is_file():
            artifact.add_file(str(path), policy="immutable")  # not copied to the user's home
    return artifact
