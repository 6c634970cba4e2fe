"""Datasets of the Hub: which files a subset consists of, and its rows.

The files are downloaded and verified by `models.hub`, and `datasets` reads them from there: it does
not connect itself, runs no code, and reads no file but those of the repository.
"""

import glob
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from hyperfitting.data.config import TextsConfig
from hyperfitting.errors import UserError, near_matches
from hyperfitting.formatting import first_line
from hyperfitting.models import hub
from hyperfitting.progress import ProgressReporter, no_op

_TABLES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv", ".txt")
_COMPRESSIONS = ("", ".gz", ".bz2", ".xz", ".zst", ".zip")


def load_rows(cfg: TextsConfig, commit: str, progress: ProgressReporter = no_op) -> Any:
    """Return the rows of a Hub dataset's split, a `datasets.Dataset`.

    Args:
        cfg: names the repository, subset and split.
        commit: of the repository.
        progress: reports the bytes downloaded.

    Raises:
        UserError: no network, no access, no such subset or split, or no data in it.
    """
    from datasets import load_dataset

    repo = str(cfg.path)
    names = list(hub.list_files("dataset", repo, commit))
    _refuse_script(cfg, names)
    folder = hub.download("dataset", repo, commit, [n for n in names if n == "README.md"])
    subset, params = _subset(cfg, folder)
    files = _data_files(params, names)
    if not any(files.values()):
        raise UserError(
            f"no data file of subset {subset} in it" if subset else "no data file in it",
            field="dataset.path",
            value=repo,
            valid=f"files of tables or texts: {', '.join(_TABLES)}",
        )
    hub.download(
        "dataset", repo, commit, sorted({n for ns in files.values() for n in ns}), progress
    )
    paths = {
        split: [glob.escape(str(folder / name)) for name in names] for split, names in files.items()
    }
    with explain_datasets_errors(cfg), _no_progress_bars():
        return load_dataset(
            str(folder),
            subset,
            split=cfg.split,
            # without splits in the README `datasets` finds them by the names of the files
            **({} if "" in paths else {"data_files": paths}),
        )


@contextmanager
def explain_datasets_errors(cfg: TextsConfig) -> Iterator[None]:
    """Turn what `datasets` raises for a wrong split or unreadable data into a message.

    Raises:
        UserError: in place of the error.
    """
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (ValueError, FileNotFoundError, DatasetsError) as error:
        raise UserError(
            f"`datasets` cannot load it: {first_line(error)}",
            field="dataset.path",
            value=cfg.path,
            hint="check dataset.subset, dataset.split and dataset.revision",
        ) from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


def _refuse_script(cfg: TextsConfig, names: Iterable[str]) -> None:
    script = f"{PurePosixPath(str(cfg.path)).name}.py"
    if script in names:
        raise UserError(
            f"is a dataset script ({script}), which is not run",
            field="dataset.path",
            value=cfg.path,
            valid="a repository of data files, such as .parquet",
            hint="the Hub may have it converted to Parquet: dataset.revision=refs/convert/parquet",
        )


def _subset(cfg: TextsConfig, folder: Path) -> tuple[str | None, dict[str, Any]]:
    """Return the name and the settings of the subset, as the README declares it."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    readme = folder / "README.md"
    subsets: dict[str, dict[str, Any]] = {}
    default = None
    if readme.is_file():
        with explain_datasets_errors(cfg):
            card = MetadataConfigs.from_dataset_card_data(DatasetCard.load(readme).data)
            subsets, default = dict(card), card.get_default_config_name()
    name = cfg.subset or default
    if not subsets and name in (None, "default"):
        return None, {}
    if name not in subsets:
        valid = ", ".join(subsets) or "null: it has no subsets"
        raise UserError(
            "it has no such subset" if name else "it has several subsets: name one",
            field="dataset.subset",
            value=cfg.subset,
            valid=valid,
            hint=near_matches(name or "", subsets),
        )
    return name, subsets[name]


def _data_files(params: dict[str, Any], names: Iterable[str]) -> dict[str, list[str]]:
    """Return the files of a subset by split; split "": the README does not name the splits.

    Args:
        params: the subset's settings; `data_files` are patterns, with or without splits.
        names: of all files of the repository. Only these are matched, so that no pattern leads
            out of it.
    """
    folder = str(params.get("data_dir") or "").strip("/")
    tables = [
        name
        for name in names
        if name.lower().endswith(tuple(t + c for t in _TABLES for c in _COMPRESSIONS))
        and name != "dataset_infos.json"
        and (not folder or name.startswith(f"{folder}/"))
    ]
    declared = params.get("data_files")
    if declared is None:
        return {"": tables}
    patterns: dict[str, list[str]] = {}
    for item in [declared] if isinstance(declared, str) else declared:
        split, paths = ("train", item) if isinstance(item, str) else (item["split"], item["path"])
        patterns.setdefault(split, []).extend([paths] if isinstance(paths, str) else paths)
    return {
        split: [name for name in tables if any(_matches(name, p, folder) for p in globs)]
        for split, globs in patterns.items()
    }


def _matches(name: str, pattern: str, folder: str) -> bool:
    """Return whether a file's name matches a pattern, as `datasets` reads it."""
    from fsspec.utils import glob_translate

    return bool(re.match(glob_translate(f"{folder}/{pattern}" if folder else pattern), name))
