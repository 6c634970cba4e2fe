"""`hyperfit-preference make`: the task file of a study, from the records of finished runs."""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from hyperfitting.errors import UserError, no_such
from hyperfitting.fields import at_least
from hyperfitting.preference.design import Design, gold_items, make_task
from hyperfitting.preference.items import (
    ASPECT_QUESTIONS,
    FOLDER,
    TASK_FILE,
    Form,
    Question,
    write_task,
)
from hyperfitting.preference.pairing import REFERENCE
from hyperfitting.record.files import RECORD_FILE, read_record
from hyperfitting.record.schema import Record
from hyperfitting.sweep.spec import SPEC_FILE, read_sweep_spec

WORDING: dict[Form, str] = {
    "p1": "Two texts continue the beginning above. Which one do you prefer?",
    "fine": "Two texts continue the beginning above. Which one is better, if any?",
}
GUIDELINES = (
    "Read the beginning and both texts to their ends, then choose. Judge the writing: does the "
    "text make sense, fit the beginning, and read as if a careful person wrote it? Do not look "
    "facts up. A text that ends in … was cut for length; that is no fault. If neither is better, "
    "say so: ties are an answer like the others. Your first impression after reading both is what "
    "we ask for."
)


def read_records(paths: Sequence[Path]) -> dict[str, Record]:
    """Return the records of sweeps, runs' folders and record files, by name of the run.

    Raises:
        UserError: a path is none of these, has no finished run, or two runs have one name.
    """
    records: dict[str, Record] = {}
    for path in paths:
        folders = [path.parent if path.name == RECORD_FILE else path]
        if (path / SPEC_FILE).is_file():
            runs = [path / run.name for run in read_sweep_spec(path).runs]
            folders = [run for run in runs if (run / RECORD_FILE).is_file()]
        found = {folder.resolve().name: folder / RECORD_FILE for folder in folders}
        if not found:
            raise UserError("no run has finished", field="sweep", value=path)
        for name, file in found.items():
            if name in records:
                raise UserError("two runs have this name", field="record", value=name)
            records[name] = read_record(file)
    return records


def _run(arguments: argparse.Namespace) -> None:
    at_least("--items", arguments.items, 1)
    for name in ("checks", "repeats", "seed"):
        at_least(f"--{name}", getattr(arguments, name), 0)
    records = read_records(arguments.paths)
    if arguments.runs:
        _check_runs(arguments.runs, records)
        records = {name: records[name] for name in arguments.runs}
    if arguments.out is None and len(arguments.paths) > 1:
        raise UserError("several records: say where the study goes", field="--out", value="")
    first = arguments.paths[0]
    home = first.parent if first.name == RECORD_FILE else first
    out = arguments.out or home / FOLDER
    design = Design(
        annotators=dict.fromkeys(arguments.annotators, "script" if arguments.scripts else "person"),
        votes=min(3, len(arguments.annotators)) if arguments.votes is None else arguments.votes,
        against=arguments.against,
        lengths=tuple(arguments.lengths),
        items=arguments.items,
        checks=arguments.checks,
        repeats=arguments.repeats,
        seed=arguments.seed,
    )
    question = Question(
        form=arguments.question,
        wording=arguments.wording or WORDING[arguments.question],
        guidelines=_read_guidelines(arguments.guidelines),
        aspects=tuple(arguments.aspects),
    )
    gold = gold_items(arguments.gold) if arguments.gold else []
    task = make_task(home.resolve().name, records, design, question, gold)
    write_task(out, task)
    kinds = Counter(item.kind for item in task.items)
    print(f"task       {out / TASK_FILE}")
    print("items      " + ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in kinds.items()))
    for name, annotator in task.annotators.items():
        print(f"{len(annotator.items):>10} for {name}")


def _read_guidelines(path: Path | None) -> str:
    if path is None:
        return GUIDELINES
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot be read: {error}", field="--guidelines", value=path) from error


def _check_runs(names: Sequence[str], records: Mapping[str, Record]) -> None:
    for name in names:
        if name not in records:
            raise no_such("finished run", "--runs", name, records)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `make`."""
    parser = commands.add_parser("make", help="make a study's task file from finished runs")
    parser.add_argument("paths", type=Path, nargs="+", metavar="SWEEP|RECORD")
    parser.add_argument("--annotators", nargs="+", required=True, metavar="NAME")
    parser.add_argument(
        "--scripts", action="store_true", help="the annotators are scripts: tables will say so"
    )
    parser.add_argument("--votes", type=int, help="annotators for each item (3, or all of fewer)")
    parser.add_argument(
        "--against", default=REFERENCE, help="reference, base, or a run's name (%(default)s)"
    )
    parser.add_argument("--runs", nargs="+", default=[], metavar="RUN", help="only these runs")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[], help="new tokens (the longest there is)"
    )
    parser.add_argument("--items", type=int, help="normal items (all that are possible)")
    parser.add_argument("--checks", type=int, default=4, help="attention checks (%(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=4, help="items asked twice of each annotator (%(default)s)"
    )
    parser.add_argument(
        "--gold", type=Path, metavar="STUDY", help="ask what all people of a study agreed on"
    )
    parser.add_argument("--question", choices=["p1", "fine"], default="p1")
    parser.add_argument("--wording", help="of the question")
    parser.add_argument("--guidelines", type=Path, metavar="FILE", help="text file")
    parser.add_argument("--aspects", nargs="+", default=[], choices=list(ASPECT_QUESTIONS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the study (SWEEP/preference)")
    parser.set_defaults(run=_run)
