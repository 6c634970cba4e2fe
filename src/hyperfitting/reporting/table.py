"""Tables of a sweep's records, in Markdown: every member, original and tuned, with intervals.

python -m hyperfitting.reporting.table SWEEP_DIR     draws them again from what is there
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from hyperfitting.errors import UserError
from hyperfitting.metrics.uncertainty import paired_difference
from hyperfitting.record import FILE_NAME, SCHEMA_VERSION
from hyperfitting.reporting.numbers import estimate, p_value
from hyperfitting.store import write_text

Column = tuple[str, str, str]
"""A metric's key, its heading, and how it is written."""
_PARTS: tuple[tuple[str, tuple[Column, ...]], ...] = (
    (
        "How varied is it?",
        (
            ("gen/ttr", "type-token ratio", "{:.3f}"),
            ("gen/rep_2", "repeated 2-grams", "{:.3f}"),
            ("gen/rep_3", "repeated 3-grams", "{:.3f}"),
            ("gen/rep_4", "repeated 4-grams", "{:.3f}"),
            ("gen/longest_loop", "longest loop, tokens", "{:.1f}"),
            ("gen/ends_in_loop", "end in a loop", "{:.2f}"),
            ("gen/self_bleu", "Self-BLEU", "{:.3f}"),
        ),
    ),
    (
        "Does it quote the training data?",
        (
            ("gen/dataset_bleu", "Dataset BLEU", "{:.3f}"),
            ("gen/dataset_overlap", "longest shared run, tokens", "{:.2f}"),
            ("gen/dataset_overlap_over_10", "texts with a run over 10", "{:.3f}"),
        ),
    ),
    (
        "How sure is the writer, and what would the original model say of it?",
        (
            ("gen/entropy", "entropy, nats", "{:.2f}"),
            ("gen/top1_mass", "mass of the top 1", "{:.3f}"),
            ("gen/original_perplexity", "perplexity to the original", "{:.1f}"),
            ("gen/original_rank_over_1", "not its first choice", "{:.3f}"),
            ("gen/original_rank_over_10", "rank over 10", "{:.3f}"),
            ("gen/original_rank_over_100", "rank over 100", "{:.4f}"),
            ("gen/mauve", "MAUVE", "{:.3f}"),
        ),
    ),
)
_MODELS: tuple[Column, ...] = (
    ("val/perplexity", "perplexity", "{:.1f}"),
    ("val/context_perplexity", "of the contexts", "{:.1f}"),
    ("val/entropy", "entropy, nats", "{:.2f}"),
    ("val/top1_mass", "top 1", "{:.3f}"),
    ("val/top3_mass", "top 3", "{:.3f}"),
    ("val/top5_mass", "top 5", "{:.3f}"),
    ("val/top1_agreement", "top 1 as the original's", "{:.3f}"),
)
_AGAINST = (
    ("gen/ttr", "type-token ratio", "{:+.3f}"),
    ("gen/rep_3", "repeated 3-grams", "{:+.3f}"),
    ("gen/original_loss", "loss to the original, nats", "{:+.2f}"),
)
_HIGHEST = ("gen/dataset_bleu", "gen/dataset_overlap")
_SIDES = {"baseline": "original", "metrics": "hyperfitted"}
Record = dict[str, Any]


class SweepTables(Callback):
    """Hydra callback: draws the tables when a sweep has ended."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write `tables.md` beside the members, and say where."""
        folder = Path(config.hydra.sweep.dir).absolute()
        print(f"tables     {write(folder)}")


def write(folder: Path) -> Path:
    """Write the tables of the records in a sweep's folder, and return where.

    Raises:
        UserError: there is no record, or one that this version does not know.
    """
    path = folder / "tables.md"
    write_text(path, tables(read(folder)))
    return path


def read(folder: Path) -> list[Record]:
    """Return the records of a sweep's members, in the order in which they ended.

    Raises:
        UserError: there is none, or one that this version does not know.
    """
    paths = sorted(folder.glob(f"*/{FILE_NAME}"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError(
            f"no member of this sweep has a {FILE_NAME}", field="folder", value=folder,
            hint="the folder that hydra.sweep.dir named",
        )  # fmt: skip
    records = []
    for path in paths:
        record = json.loads(path.read_text("utf-8"))
        if record.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"a record of another version of this software ({record.get('schema_version')})",
                field="record",
                value=path,
                valid=f"schema_version {SCHEMA_VERSION}",
                hint="the sweep's command again writes it anew, without training again",
            )
        records.append(record)
    return records


def tables(records: list[Record]) -> str:
    """Return all tables of records that share model, data and evaluation texts, as Markdown."""
    first = records[0]
    model, dataset, evaluation = (first["config"][k] for k in ("model", "dataset", "evaluation"))
    length = first["slices"][0]["new_tokens"]
    parts = [
        f"Means over {len(first['samples'])} texts ({_sets(first)}) with 95% bootstrap intervals "
        f"over texts; continuations of {length} tokens after "
        f"{evaluation['context_len']}. Model: {model['name']}, hyperfitted on "
        f"{dataset['n_train']} sequences of {dataset['seq_len']} tokens of {dataset['name']}"
        f"{_loss(first)}."
    ]
    for title, columns in _PARTS:
        there = [column for column in columns if column[0] in first["metrics"]]
        rows = [
            [_label(record), _SIDES[side], *(_cell(record, side, *column) for column in there)]
            for side in _SIDES
            for record in _distinct(records, side)
        ]
        if any(key in first["reference"] for key, _, _ in there):
            rows.append(["none", "real text", *(_cell(first, "reference", *c) for c in there)])
        parts.append(f"### {title}\n\n" + _table(["decoding", "model", *_heads(there)], rows))
    sets = [one["set"] for one in first["slices"] if one["set"] and one["new_tokens"] == length]
    if sets:
        parts.append(_by_set(records, sets, length))
    rows = [
        [name, *(_cell(first, side, *column) for column in _MODELS)]
        for side, name in _SIDES.items()
    ]
    parts.append(
        "### The two models on the original texts\n\n" + _table(["model", *_heads(_MODELS)], rows)
    )
    greedy = [record for record in records if record["config"]["decode"]["name"] == "greedy"]
    if greedy:
        parts.append(_against(greedy[0], _distinct(records, "baseline")))
    notes = list(dict.fromkeys(note for record in records for note in record["notes"]))
    return "\n\n".join(parts + [f"Note: {note}." for note in notes]) + "\n"


def _by_set(records: list[Record], sets: list[str], length: int) -> str:
    """Return the type-token ratio of each evaluation set."""
    rows = []
    for side, model in {**_SIDES, "reference": "real text"}.items():
        shown = records[:1] if side == "reference" else _distinct(records, side)
        for record in shown:
            found = {
                one["set"]: one[side].get("gen/ttr")
                for one in record["slices"]
                if one["new_tokens"] == length
            }
            label = "none" if side == "reference" else _label(record)
            rows.append([label, model, *(estimate(found[name], "{:.3f}") for name in sets)])
    return "### Type-token ratio by set\n\n" + _table(["decoding", "model", *sets], rows)


def _against(greedy: Record, records: list[Record]) -> str:
    """Return how far the original model with each decoding is from the hyperfitted, greedy."""
    rows = []
    for record in records:
        cells = []
        for key, _, form in _AGAINST:
            found = paired_difference(
                _numbers(record, "baseline", key),
                _numbers(greedy, "metrics", key),
                record["config"]["evaluation"]["bootstrap"],
            )
            if found is None:
                cells.append("")
                continue
            p = p_value(found.p)
            cells.append(estimate(asdict(found), form) + (f", p {p}" if p else ""))
        rows.append([_label(record), *cells])
    title = "### The original model with each decoding, less the hyperfitted one greedy\n\n"
    return title + _table(["decoding", *_heads(_AGAINST)], rows)


def _numbers(record: Record, side: str, key: str) -> list[float]:
    values = record["per_text"][side][key]
    return [float("nan") if value is None else value for value in values]


def _distinct(records: list[Record], side: str) -> list[Record]:
    """Return the records without those whose texts another one has: an unblocked original's."""
    seen: set[str] = set()
    found = []
    for record in records:
        texts = "continuation" if side == "metrics" else "original_continuation"
        tokens = json.dumps([sample[texts]["tokens"] for sample in record["samples"]])
        if tokens not in seen:
            seen.add(tokens)
            found.append(record)
    return found


def _sets(record: Record) -> str:
    names = [sample["set"] for sample in record["samples"]]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


def _loss(record: Record) -> str:
    if not record["history"]:
        return ""
    return f" to a training loss of {record['history'][-1]['train/loss']:.3f}"


def _label(record: Record) -> str:
    decode = record["config"]["decode"]
    name = str(decode["name"])
    blocked = decode["citation_blocker"]["enabled"] and name != "citation_blocker"
    return name + (" + citation_blocker" if blocked else "")


def _heads(columns: tuple[Column, ...] | list[Column]) -> Iterator[str]:
    return (heading for _, heading, _ in columns)


def _cell(record: Record, side: str, key: str, heading: str, form: str) -> str:
    cell = estimate(record[side].get(key), form)
    if key in _HIGHEST and cell:
        highest = max((v for v in record["per_text"][side][key] if v is not None), default=None)
        cell += "" if highest is None else f", highest {form.format(highest)}"
    return cell


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def main() -> None:
    """Draw the tables of a sweep again."""
    parser = argparse.ArgumentParser(
        prog="python -m hyperfitting.reporting.table",
        description="Write tables.md from the records of a sweep's members.",
    )
    parser.add_argument("folder", type=Path, metavar="SWEEP_DIR", help="what hydra.sweep.dir was")
    try:
        print(f"tables     {write(parser.parse_args().folder)}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
