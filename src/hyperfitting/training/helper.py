"""A process that helps rank 0 of `hyperfitting.distributed` to train: it does what it is told."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hyperfitting import distributed, failures, models, preemption
from hyperfitting.config import RunConfig, from_plain
from hyperfitting.data.corpus import load_corpus
from hyperfitting.distributed import Crew
from hyperfitting.errors import UserError
from hyperfitting.pipeline import Pipeline
from hyperfitting.progress import Row, silent
from hyperfitting.store import Store
from hyperfitting.training.loop import train
from hyperfitting.training.trunk import KeptIn


def order(cfg: RunConfig, work: Path) -> dict[str, Any]:
    """Return the word that has helpers train a member in a folder."""
    return {"config": asdict(cfg) | {"store": str(Path(cfg.store).absolute())}, "work": str(work)}


def help_with(word: dict[str, Any], crew: Crew) -> None:
    """Train as rank 0 does. What it needs is in the store already."""
    cfg = from_plain(word["config"])
    line = Pipeline.of(cfg, models.prepare(cfg.hardware))
    data = load_corpus(line.corpus)
    kept_in = KeptIn(
        Store(cfg.store, cfg.fetch_from), {"corpus": line.corpus.id, "model": line.base.id}
    )
    try:
        train(cfg, data, line.base, Path(word["work"]), silent, _untold, kept_in, crew)
    except (UserError, preemption.Preempted):  # rank 0 says the same
        sys.exit(1)


def _untold(row: Row) -> None:
    pass


def main() -> None:
    """Wait for words, and follow them until there are no more."""
    distributed.end_with(os.getppid())
    preemption.ignore()  # rank 0 is told too
    crew = distributed.join_torchrun()
    try:
        while (word := crew.hear()) is not None:
            help_with(word, crew)
            torch.cuda.empty_cache()  # rank 0 may evaluate on this GPU next
    except Exception as error:
        sys.exit(f"rank {crew.rank}: {failures.explain(error, None)}")


if __name__ == "__main__":
    main()
