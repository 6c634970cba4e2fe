"""The tuned model as an artefact: what determines it, and who makes it. Imports nothing heavy."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from hyperfitting import costs
from hyperfitting.config import RunConfig
from hyperfitting.data.corpus import load_corpus
from hyperfitting.models import BaseModel
from hyperfitting.progress import Progress, Row
from hyperfitting.store import Artefact, Store

VERSION = 3


def tune(
    cfg: RunConfig,
    corpus: Artefact,
    base: BaseModel,
    store: Store,
    show: Progress,
    on_row: Callable[[Row], None],
) -> Artefact:
    """Return the artefact of the tuned model.

    Its files: `last.safetensors` and `best_val.safetensors`, the trained parameters after the last
    epoch and after that of lowest validation loss; `history.json`, the rows that ``on_row`` is
    told as they come (after a resume, those of before first).
    """

    def make(work: Path) -> None:
        from hyperfitting.distributed import crew
        from hyperfitting.training.helper import order
        from hyperfitting.training.loop import train
        from hyperfitting.training.trunk import KeptIn

        data, kept_in = load_corpus(corpus), KeptIn(store, inputs)
        base.folder()  # helpers find it in its place
        with crew(cfg.hardware) as together:
            together.tell(order(cfg, work))
            train(cfg, data, base, work, show, on_row, kept_in, together)

    inputs = {"corpus": corpus.id, "model": base.id}
    trainer = asdict(cfg.trainer)
    if not cfg.tuning.is_late:
        del trainer["trunk_cache"]
    return store.artefact(
        "tuned",
        version=VERSION,
        config={
            "tuning": cfg.tuning.determining(),
            "optimizer": cfg.optimizer,
            "trainer": trainer,
        },
        inputs=inputs,
        make=make,
        work=lambda: costs.training(cfg, base.size(store)),
    )
