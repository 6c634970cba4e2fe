"""`hyperfit-preference export` and `import`: have people annotate in Label Studio, Potato or CSV.

None of these platforms is a dependency: their files are written and read here. Nothing is ever
overwritten; what an import leaves out, it says, with the reason.
"""

import argparse
import os
from pathlib import Path

from hyperfitting.errors import UserError
from hyperfitting.formatting import printable_line
from hyperfitting.preference import csv_files, label_studio, potato
from hyperfitting.preference.exchange_rows import LeftOut, accept
from hyperfitting.preference.items import JUDGMENTS_FILE, Task, read_task
from hyperfitting.preference.judgments import Judgment, append, read_judgments
from hyperfitting.runtime.files import make_folder, remove

PLATFORMS = {"label-studio": label_studio, "potato": potato, "csv": csv_files}


def export_task(task: Task, platform: str, folder: Path) -> None:
    """Write a study's items for a platform into a new folder; it appears whole or not at all.

    Raises:
        UserError: the folder exists, or there can be none.
    """
    if os.path.lexists(folder):
        raise UserError("exists already", field="--out", value=folder, hint="another --out DIR")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    make_folder(partial, "--out", "another --out DIR")
    try:
        PLATFORMS[platform].export(task, partial)
        partial.rename(folder)
    finally:
        remove(partial)


def import_answers(
    study: Path, platform: str, paths: list[Path]
) -> tuple[list[Judgment], list[LeftOut]]:
    """Add the answers in a platform's files to a study; return them, and what was left out.

    Args:
        study: folder of the study.
        platform: one of `PLATFORMS`.
        paths: CSV files, exports of Label Studio, or folders of Potato projects.

    Raises:
        UserError: a file is none of the platform's; nothing is imported then.
    """
    task, file = read_task(study), study / JUDGMENTS_FILE
    module = PLATFORMS[platform]
    accepted, left_out = accept(
        task, list(module.read(task, paths)), module.SOURCE, read_judgments(file)
    )
    if accepted:
        append(file, accepted)
    return accepted, left_out


def _export(arguments: argparse.Namespace) -> None:
    folder = arguments.out or arguments.study / arguments.to
    task = read_task(arguments.study)
    export_task(task, arguments.to, folder)
    n_rows = sum(len(annotator.items) for annotator in task.annotators.values())
    print(f"exported   {n_rows} comparisons for {len(task.annotators)} annotators to {folder}")


def _import(arguments: argparse.Namespace) -> None:
    accepted, left_out = import_answers(arguments.study, arguments.source, arguments.files)
    print(f"imported   {len(accepted)} judgments into {arguments.study / JUDGMENTS_FILE}")
    for each in left_out:
        print(f"left out   {printable_line(f'{each.where}: {each.reason}')}")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `export` and `import`."""
    export = commands.add_parser("export", help="write the items for Label Studio, Potato or CSV")
    export.add_argument("study", type=Path, metavar="STUDY", help="folder with task.json")
    export.add_argument("--to", required=True, choices=PLATFORMS, help="platform")
    export.add_argument("--out", type=Path, metavar="DIR", help="new folder (default: in STUDY)")
    export.set_defaults(run=_export)
    importer = commands.add_parser("import", help="add what people chose there to the judgments")
    importer.add_argument("study", type=Path, metavar="STUDY", help="folder with task.json")
    importer.add_argument(
        "--from", dest="source", required=True, choices=PLATFORMS, help="platform"
    )
    importer.add_argument(
        "files", nargs="+", type=Path, metavar="FILE",
        help="filled-in CSV, JSON export of Label Studio, or folder of the Potato project",
    )  # fmt: skip
    importer.set_defaults(run=_import)
