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
    from hyperfitting.store import Artefact
    from hyperfitting.tracking import Tracker

log = logging.getLogger(__name__)


def run(cfg: RunConfig, folder: Path, tracker: "Tracker", show: "Progress") -> dict[str, Any]:
    """Take one member all the way from its config to its record.

    Args:
        cfg: the member.
        folder: where `results.json` goes.
        tracker: told of the training history and of the outcome.
        show: shows how far it is.

    Returns:
        The record, as in `results.json`.

    Raises:
        UserError: something only the user can mend; all that was made before is kept.
    """
    from hyperfitting import evaluation, models, record
    from hyperfitting.data import corpus, sources
    from hyperfitting.store import Store, write_json
    from hyperfitting.training.loop import tune

    start = time.perf_counter()
    device = models.prepare(cfg.hardware)
    store = Store(cfg.store)
    base = models.base_model(cfg.model, store)
    texts = sources.texts(cfg.dataset, store)
    held_out = corpus.evaluation_texts(cfg.dataset, cfg.evaluation, texts, base, store)
    made = {"texts": texts, "evaluation_texts": held_out}

    history: list[dict[str, float]] = []
    tuned = None
    if cfg.tuning.method != "none":
        made["corpus"] = data = corpus.corpus(cfg.dataset, texts, base, store)
        made["tuned"] = tuned = tune(cfg, data, base, store, show, tracker.row)
        history = trained_history(tuned, tracker)

    def measured(name: str, state: models.ModelState) -> evaluation.Scores:
        model = evaluation.LoadedModel(state, device)
        written = evaluation.continuations(
            model, held_out, cfg.decode, cfg.evaluation, store, cfg.hardware, show
        )
        likely = evaluation.likelihoods(model, held_out, store, cfg.hardware, show)
        made[f"{name}_continuations"], made[f"{name}_likelihoods"] = written, likely
        return evaluation.score(likely, written, cfg.evaluation)

    original = measured("original", models.ModelState(base))
    final = measured("final", models.ModelState(base, tuned, cfg.evaluation.state))
    found = record.build(
        cfg, made, history, final, original, time.perf_counter() - start, str(device)
    )
    write_json(folder / record.FILE_NAME, found)
    tracker.finish(found)
    return found


def trained_history(tuned: "Artefact", tracker: "Tracker") -> list[dict[str, float]]:
    """Train if need be, and return the history; the tracker is told of it also if it is kept."""
    kept = tuned.exists
    rows: list[dict[str, float]] = json.loads(tuned.file("history.json").read_text("utf-8"))
    if kept:
        for row in rows:
            tracker.row(row)
    return rows


def member(cfg: DictConfig) -> None:
    """Run one composed config, with its progress and outcome on the terminal."""
    with failures.reported():
        config = from_hydra(cfg)
        from dataclasses import asdict

        from rich.console import Console

        from hyperfitting.terminal import Terminal, outcome
        from hyperfitting.tracking import tracked

        console = Console()
        folder = Path(HydraConfig.get().runtime.output_dir)
        name = folder.name
        log.info("config: %s", asdict(config))
        with (
            Terminal(console) as terminal,
            tracked(config.tracking, name, folder, asdict(config)) as tracker,
        ):
            found = run(config, folder, tracker, terminal.progress)
            tracked_in = tracker.folder
        console.print(outcome(found, colour=console.is_terminal and not console.no_color))
        console.print(f"record     {folder / 'results.json'}", highlight=False, soft_wrap=True)
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
