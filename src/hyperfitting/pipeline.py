"""All artefacts of a member, each a handle: their ids are known, and nothing is made yet.

texts -> corpus -> tuned -> likelihoods, continuations -> readings
      -> evaluation_texts ->
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from hyperfitting import models
from hyperfitting.config import RunConfig
from hyperfitting.data import corpus, sources
from hyperfitting.evaluation import Evaluator
from hyperfitting.models import BaseModel
from hyperfitting.progress import Progress, Row, silent
from hyperfitting.store import Artefact, Store
from hyperfitting.training.tuned import tune


def _untold(row: Row) -> None:
    pass


@dataclass(frozen=True)
class Pipeline:
    """A member's way from its config to what its models do."""

    base: BaseModel
    texts: Artefact
    corpus: Artefact
    sets: dict[str, Artefact]
    tuned: Artefact | None
    """None: the original model is evaluated by itself."""
    evaluator: Evaluator

    @classmethod
    def of(
        cls,
        cfg: RunConfig,
        device: torch.device,
        show: Progress = silent,
        on_row: Callable[[Row], None] = _untold,
    ) -> "Pipeline":
        """Return the pipeline of a member.

        Args:
            cfg: the member.
            device: where its models will be.
            show: shows how far what is made is.
            on_row: told of the training history as it comes.

        Raises:
            UserError: a model or dataset does not exist, or cannot be reached.
        """
        store = Store(cfg.store, cfg.fetch_from)
        base = models.base_model(cfg.model, store, show)
        texts = sources.texts(cfg.dataset, store, show)
        sequences = corpus.corpus(cfg.dataset, cfg.evaluation.share, texts, base, store)
        sets = corpus.evaluation_sets(cfg.dataset, cfg.evaluation, base, store, show)
        tuned = None
        if cfg.tuning.method != "none":
            tuned = tune(cfg, sequences, base, store, show, on_row)
        evaluator = Evaluator(cfg, sets, sequences, store, device, show)
        return cls(base, texts, sequences, sets, tuned, evaluator)

    def prepared(self) -> dict[str, Artefact]:
        """Return, by the name that a record gives it, what is there before models do anything."""
        made = {"texts": self.texts, "corpus": self.corpus}
        made |= {f"evaluation_texts/{name}": artefact for name, artefact in self.sets.items()}
        return made | ({"tuned": self.tuned} if self.tuned else {})

    def all(self) -> Iterator[Artefact]:
        """Yield all artefacts, each after those that it is made from."""
        yield from self.prepared().values()
        after, before = self.evaluator.handles(self.base, self.tuned)
        yield from before.all()
        if after is not before:
            yield from after.all()
