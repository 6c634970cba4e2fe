"""The single entry point: `hyperfit`. Compose a config, train, evaluate, record.

    config -> texts -> corpus -> tuned model -> continuations, likelihoods -> scores -> record

Every arrow is one plain function, and what it makes is kept in the store: the same command again
makes nothing twice. Heavy imports wait until a run begins, so that `--help` answers at once.
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from hyperfitting import failures
from hyperfitting.config import RunConfig, conf_dir, from_hydra, register

if TYPE_CHECKING:
    from hyperfitting.progress import Progress
    from hyperfitting.tracking import Tracker
    from hyperfitting.training.checkpoint import Row

log = logging.getLogger(__name__)
PAGE = "continuations.html"


def run(cfg: RunConfig, folder: Path, tracker: "Tracker", show: "Progress") -> dict[str, Any]:
    """Take one member all the way from its config to its record.

    Args:
        cfg: the member.
        folder: where `results.json` and `continuations.html` go.
        tracker: told of the training history and of the outcome.
        show: shows how far it is.

    Returns:
        The record, as in `results.json`.

    Raises:
        UserError: something only the user can mend; all that was made before is kept.
    """
    from hyperfitting import models, record, scoring
    from hyperfitting.data import corpus, sources
    from hyperfitting.evaluation import Evaluator
    from hyperfitting.reporting import colouring
    from hyperfitting.store import Store, write_json, write_text
    from hyperfitting.training.loop import tune

    start = time.perf_counter()
    device = models.prepare(cfg.hardware)
    store = Store(cfg.store)
    base = models.base_model(cfg.model, store, show)
    texts = sources.texts(cfg.dataset, store, show)
    sequences = corpus.corpus(cfg.dataset, cfg.evaluation.share, texts, base, store)
    sets = corpus.evaluation_sets(cfg.dataset, cfg.evaluation, base, store, show)
    evaluator = Evaluator(cfg, sets, sequences, store, device, show)
    made = {"texts": texts, "corpus": sequences}
    made |= {f"evaluation_texts/{name}": artefact for name, artefact in sets.items()}

    history: list[Row] = []
    notes: list[str] = []
    tuned = None
    if cfg.tuning.method != "none":
        told: list[Row] = []

        def tell(row: "Row") -> None:
            told.append(row)
            tracker.row(row)

        made["tuned"] = tuned = tune(cfg, sequences, base, store, show, tell)
        if not tuned.exists:
            evaluator.check(base)
        history = json.loads(tuned.file("history.json").read_text("utf-8"))
        for row in history[len(told) :]:  # what was trained before, or by another process
            tracker.row(row)
    elif cfg.decode.citation_blocker.enabled:
        notes.append("the original model has no training data to cite: the blocker forbids nothing")

    final, original, reference, artefacts = evaluator.compare(base, tuned)
    counted = evaluator.counted(base)
    compared = scoring.compare(final, original, reference, counted, cfg.evaluation)
    outcome = record.Found(history, compared, notes)
    found = record.build(cfg, made | artefacts, outcome, time.perf_counter() - start, str(device))
    write_text(folder / PAGE, colouring.page(found))
    write_json(folder / record.FILE_NAME, found)
    tracker.finish(found)
    return found


def member(cfg: DictConfig) -> None:
    """Run one composed config, with its progress and outcome on the terminal."""
    with failures.reported():
        config = from_hydra(cfg)
        from dataclasses import asdict

        from rich.console import Console

        from hyperfitting.terminal import Terminal, outcome
        from hyperfitting.tracking import tracked

        console = Console() if sys.stdout.isatty() else Console(width=110)
        hydra_config = HydraConfig.get()
        folder = Path(hydra_config.runtime.output_dir)
        kind = f"{config.model.name} {config.dataset.name} {config.tuning.method}"
        name = hydra_config.job.override_dirname or f"{kind} seed={config.seed}"
        log.info("config: %s", asdict(config))
        with (
            Terminal(console) as terminal,
            tracked(config.tracking, name, folder, asdict(config)) as tracker,
        ):
            found = run(config, folder, tracker, terminal.progress)
            tracked_in = tracker.folder
        console.print(outcome(found, colour=console.is_terminal and not console.no_color))
        console.print(f"record     {folder / 'results.json'}", highlight=False, soft_wrap=True)
        console.print(f"texts      {folder / PAGE}", highlight=False, soft_wrap=True)
        if "tuned" in found["artefacts"]:
            console.print(
                f"model      {found['artefacts']['tuned']}", highlight=False, soft_wrap=True
            )
        if tracked_in is not None:
            sync = "" if config.tracking.mode == "online" else "   (wandb sync it to see it online)"
            console.print(f"W&B        {tracked_in}{sync}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line: one member, or with `-m` a sweep of them."""
    register()
    task = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(member)
    sys.exit(failures.exit_status(task))


if __name__ == "__main__":
    main()
