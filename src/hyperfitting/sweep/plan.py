"""What members would still make, and how long that takes, from what making took before.

Every artefact says in its manifest what making it took: seconds, and work. The median speed of the
newest of its kind tells how long the next one takes; where there is none, a matrix product and
usual efficiencies do.
"""

import json
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.filesize import decimal
from rich.table import Table

from hyperfitting import costs, models
from hyperfitting.config import RunConfig
from hyperfitting.pipeline import Pipeline
from hyperfitting.reporting.numbers import duration
from hyperfitting.store import MANIFEST, Artefact, Store

_NEWEST = 12
"""Manifests of a kind whose median speed counts."""
_ALIKE = 10.0
"""Work of up to so many times more or less says something of the time."""
_SHARE_OF_PRODUCT = {"tuned": 0.6, "likelihoods": 0.6, "readings": 0.6, "continuations": 0.2}
"""What of a large matrix product's speed the work of a kind usually reaches."""
_SECONDS = {"model": 30.0, "texts": 10.0, "corpus": 2.0, "evaluation_texts": 2.0}
"""What is not counted as work usually takes this long."""
_SCORING = 4.0
"""Seconds of a member beside what it makes: loading, scores and their intervals, writing."""
_WORKER = 8.0
"""Seconds until a worker has begun."""


class Speeds:
    """How fast each kind of artefact is made here."""

    def __init__(self, store: Path, device: torch.device) -> None:
        self._store, self._device = store, device
        self._known: dict[str, list[tuple[float, float]]] = {}
        self._product: float | None = None

    def seconds(self, artefact: Artefact) -> float:
        """Return how long making an artefact takes."""
        if artefact.work is None:
            return _SECONDS.get(artefact.kind, 0.0)
        if artefact.kind not in self._known:
            self._known[artefact.kind] = list(self._made(artefact.kind))
        work = artefact.work()
        speeds = [
            w / s for w, s in self._known[artefact.kind] if work / _ALIKE <= w <= work * _ALIKE
        ]
        if speeds:
            return work / statistics.median(speeds[:_NEWEST])
        share = _SHARE_OF_PRODUCT.get(artefact.kind, 0.5)
        return work / (share * self._of_product())

    def _made(self, kind: str) -> Iterator[tuple[float, float]]:
        """Yield the work and seconds of what was made of a kind, the newest first."""
        paths = self._store.glob(f"{kind}/*/{MANIFEST}")
        for path in sorted(paths, key=lambda p: p.stat().st_mtime, reverse=True):
            with suppress(OSError, ValueError, KeyError, TypeError):
                found = json.loads(path.read_text("utf-8"))
                if found["work"] and found["seconds"]:
                    yield float(found["work"]), float(found["seconds"])

    def _of_product(self) -> float:
        """Return the speed of a matrix product on the device, in operations a second."""
        if self._product is None:
            n = 1024
            a = torch.ones(n, n, device=self._device)
            found = []
            for _ in range(5):
                start = time.perf_counter()
                float((a @ a)[0, 0])
                found.append(2 * n**3 / (time.perf_counter() - start))
            self._product = max(found)
        return self._product


@dataclass(frozen=True)
class Item:
    """What one member would still do."""

    name: str
    finished: bool
    makes: dict[str, int]
    """Artefacts that nobody has made, by kind; of several members that need one, the first's."""
    seconds: float
    memory: float
    """Bytes of weights, gradients and optimizer state; of a member that trains."""
    disk: float

    @property
    def todo(self) -> str:
        """What it would do, in words."""
        if self.finished:
            return "nothing: finished"
        words = {"tuned": "train", "continuations": "generate", "likelihoods": "read"}
        chosen = [word for kind, word in words.items() if self.makes.get(kind)]
        return ", ".join(chosen) or "score"


@dataclass(frozen=True)
class Plan:
    """What all members would still do, in their order."""

    items: list[Item]
    workers: int = 1

    @classmethod
    def of(
        cls,
        members: Mapping[str, RunConfig],
        finished: frozenset[str] = frozenset(),
        workers: int = 1,
    ) -> "Plan":
        """Return the plan of members, by name; no model is loaded, only their sizes are kept."""
        seen: set[str] = set()
        speeds: dict[str, Speeds] = {}
        items = []
        for name, cfg in members.items():
            if name in finished:
                items.append(Item(name, True, {}, 0.0, 0.0, 0.0))
                continue
            device = models.device(cfg.hardware)
            speed = speeds.setdefault(cfg.store, Speeds(Path(cfg.store), device))
            items.append(_item(name, cfg, device, speed, seen))
        return cls(items, workers)

    @property
    def seconds(self) -> float:
        """How long all of it takes, with as many workers as there are."""
        todo = [item for item in self.items if not item.finished]
        if not todo:
            return 0.0
        together = sum(item.seconds for item in todo)
        return _WORKER + max(together / self.workers, *(item.seconds for item in todo))


def _item(name: str, cfg: RunConfig, device: torch.device, speed: Speeds, seen: set[str]) -> Item:
    line = Pipeline.of(cfg, device)
    makes: dict[str, int] = {}
    seconds = _SCORING
    for artefact in _with_model(cfg, line):
        if artefact.id in seen or artefact.exists:
            continue
        seen.add(artefact.id)
        makes[artefact.kind] = makes.get(artefact.kind, 0) + 1
        seconds += speed.seconds(artefact)
    size = line.base.size(Store(cfg.store))
    trains = "tuned" in makes
    return Item(
        name,
        False,
        makes,
        seconds,
        costs.memory(cfg, size) if trains else size.parameters * costs.itemsize(cfg),
        costs.disk(cfg, size) if trains else 0.0,
    )


def _with_model(cfg: RunConfig, line: Pipeline) -> Iterator[Artefact]:
    if line.base.made is not None:
        yield line.base.made
    yield from line.all()


def table(plan: Plan) -> Table:
    """Return the plan as a table."""
    drawn = Table(box=SIMPLE, show_footer=True, caption=_caption(plan))
    todo = [item for item in plan.items if not item.finished]
    drawn.add_column("member", f"{len(plan.items)} members", overflow="fold")
    drawn.add_column("would", f"{len(plan.items) - len(todo)} finished")
    drawn.add_column("time", duration(plan.seconds), justify="right")
    most = max((item.memory for item in todo), default=0.0)
    drawn.add_column("memory", decimal(int(most)), justify="right")
    drawn.add_column("disk", decimal(int(sum(i.disk for i in todo))), justify="right")
    for item in plan.items:
        cells = ["", "", ""]
        if not item.finished:
            sizes = [decimal(int(n)) if n else "" for n in (item.memory, item.disk)]
            cells = [duration(item.seconds), *sizes]
        drawn.add_row(item.name, item.todo, *cells)
    return drawn


def _caption(plan: Plan) -> str:
    together = f", {plan.workers} workers" if plan.workers > 1 else ""
    return (
        f"What several members share counts for the first{together}. Memory: weights, gradients "
        "and optimizer state, without activations."
    )
