"""A rerun from a recorded config, in a store of its own, and compared with the original."""

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from hyperfitting.config import DEFAULT_SCALE, RunConfig, from_plain
from hyperfitting.config_errors import quote
from hyperfitting.errors import UserError
from hyperfitting.record.files import RECORD_FILE, read_record
from hyperfitting.runtime.files import make_folder, write_text
from hyperfitting.verify.check import Check
from hyperfitting.verify.compare_runs import compare_runs
from hyperfitting.verify.store import recorded_store

_CONFIG = "again"
_HYDRA: dict[str, Any] = {
    "defaults": [
        "schema",
        "_self_",
        {"override hydra/sweeper": "hyperfitting"},
        {"override hydra/launcher": "workers"},
        {"override hydra/job_logging": "quiet"},
        {"override hydra/hydra_logging": "quiet"},
    ],
    "hydra": {"job": {"name": "hyperfit", "chdir": False}},
}


def check_again(
    folder: Path,
    python: Path | None = None,
    work: Path | None = None,
    store: Path | None = None,
    console: Console | None = None,
) -> Iterator[Check]:
    """Rerun a config and yield how it compares, in the order of the pipeline.

    Neither the run's folder nor its store is written to.

    Args:
        folder: of the run.
        python: interpreter of an environment with hyperfitting; none: this one.
        work: receives the new run and its store, resumes what is there, and stays; none: a
            temporary folder.
        store: holds the run's artifacts; none: the store that its record names.
        console: shows the new run's progress; none: it shows nothing.

    Raises:
        UserError: there is no such interpreter, the folder cannot be written to, or the config is
            invalid.
    """
    record = read_record(folder / RECORD_FILE)
    config = from_plain(record.config)
    interpreter = _interpreter(python)
    with _work_folder(work) as here:
        out_dir = here / "run"
        status = _rerun(config, here, interpreter, console)
        if status or not (out_dir / RECORD_FILE).is_file():
            detail = f"the new run ended with status {status}"
            yield Check("rerun", "not checked", detail + " (--work DIR keeps its log)")
            return
        new = read_record(out_dir / RECORD_FILE)
        yield from compare_runs(record, new, store or recorded_store(record), here / "store")


def new_config(config: RunConfig, work: Path) -> dict[str, Any]:
    """Return the config of the new run: the same numbers, in other places."""
    tracking = dataclasses.replace(config.tracking, mode="disabled")
    changed = dataclasses.replace(
        config,
        store=str(work / "store"),
        remote_stores=[],
        scale=DEFAULT_SCALE,  # only experiments have others
        plan=False,
        tracking=tracking,
    )
    return dataclasses.asdict(changed)


def _rerun(config: RunConfig, work: Path, python: str, console: Console | None) -> int:
    """Run `hyperfit` with the whole config in another process; return its exit status."""
    configs = work / "config"
    make_folder(configs, "--work", "another --work DIR")
    values = {**new_config(config, work), **_HYDRA}
    write_text(configs / f"{_CONFIG}.yaml", OmegaConf.to_yaml(OmegaConf.create(values)))
    command = [python, "-m", "hyperfitting.run"]
    command += ["--config-dir", str(configs), "--config-name", _CONFIG]
    command += [f"hydra.run.dir={quote(str(work / 'run'))}"]
    out = None if console is not None else subprocess.DEVNULL
    process = subprocess.run(command, stdout=out, check=False)  # noqa: S603
    return process.returncode


def _interpreter(python: Path | None) -> str:
    if python is None:
        return sys.executable
    if not os.access(python, os.X_OK) or python.is_dir():
        raise UserError(
            "is no Python interpreter",
            field="--python",
            value=python,
            valid="such as /other/checkout/.venv/bin/python",
        )
    return str(python.absolute())


@contextmanager
def _work_folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        make_folder(work, "--work", "another --work DIR")
        yield work.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="hyperfit-verify-") as folder:
        yield Path(folder)
