"""What members would still make, and how long that takes, from what making took before.

Every artefact says in its manifest what making it took: seconds, and work. The median speed of the
newest of its kind tells how long the next one takes; where there is none, a matrix product and
usual efficiencies do.
"""

import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from hyperfitting import costs, distributed, footprint, models
from hyperfitting.config import HardwareConfig, RunConfig
from hyperfitting.errors import UserError
from hyperfitting.footprint import Footprint
from hyperfitting.models import BaseModel
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


@dataclass(frozen=True)
class Place:
    """The devices that a member is planned for."""

    kind: str
    """Of device."""
    count: int
    """Processes that train one model, each on one of them, or all on the CPU."""
    memory: float
    """Bytes for each process."""
    speed: float | None
    """Operations a second of a matrix product, if it is not this machine."""

    @classmethod
    def of(cls, hardware: HardwareConfig) -> "Place":
        """Return what a config means.

        Raises:
            UserError: this machine has no such device.
        """
        if hardware.planned_memory and hardware.planned_speed:
            memory, speed = hardware.planned_memory * 1e9, hardware.planned_speed * 1e12
            return cls("cuda", hardware.ranks or 1, memory, speed)
        device, count = models.device(hardware), distributed.ranks(hardware)
        if device.type == "cuda":
            return cls("cuda", count, float(torch.cuda.mem_get_info(device)[1]), None)
        return cls(device.type, count, psutil.virtual_memory().total / count, None)


class Speeds:
    """How fast each kind of artefact is made here."""

    def __init__(self, store: Path, hardware: HardwareConfig) -> None:
        self._store, self._place = store, Place.of(hardware)
        self._known: dict[str, list[tuple[float, float]]] = {}
        self._product = self._place.speed

    def seconds(self, artefact: Artefact) -> float:
        """Return how long making an artefact takes."""
        if artefact.work is None:
            return _SECONDS.get(artefact.kind, 0.0)
        if self._place.speed is not None:  # what was made here says nothing of other GPUs
            self._known[artefact.kind] = []
        elif artefact.kind not in self._known:
            self._known[artefact.kind] = list(self._made(artefact.kind))
        work = artefact.work()
        speeds = [
            w / s for w, s in self._known[artefact.kind] if work / _ALIKE <= w <= work * _ALIKE
        ]
        if speeds:
            return work / statistics.median(speeds[:_NEWEST])
        share = _SHARE_OF_PRODUCT.get(artefact.kind, 0.5)
        devices = self._place.count if artefact.kind == "tuned" else 1
        return work / (share * self._of_product() * devices)

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
            a = torch.ones(n, n, device=self._place.kind)
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
    """Bytes that each of its processes holds at the peak."""
    disk: float
    room: float = math.inf
    """Bytes there are for each process."""
    fits_with: str = ""
    """If it does not fit: overrides with which it would; none are known if it is empty."""
    training: Footprint | None = None
    """What the memory is made of while it trains."""

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
            speed = speeds.setdefault(cfg.store, Speeds(Path(cfg.store), cfg.hardware))
            items.append(_item(name, cfg, speed, seen))
        return cls(items, workers)

    @property
    def seconds(self) -> float:
        """How long all of it takes, with as many workers as there are."""
        todo = [item for item in self.items if not item.finished]
        if not todo:
            return 0.0
        together = sum(item.seconds for item in todo)
        return _WORKER + max(together / self.workers, *(item.seconds for item in todo))


def _item(name: str, cfg: RunConfig, speed: Speeds, seen: set[str]) -> Item:
    line = Pipeline.of(cfg, torch.device("cpu"))
    makes: dict[str, int] = {}
    seconds = _SCORING
    for artefact in _with_model(cfg, line):
        if artefact.id in seen or artefact.exists:
            continue
        seen.add(artefact.id)
        makes[artefact.kind] = makes.get(artefact.kind, 0) + 1
        seconds += speed.seconds(artefact)
    trains = "tuned" in makes
    place, store = Place.of(cfg.hardware), Store(cfg.store, cfg.fetch_from)
    memory = _memory(cfg, line.base, place.kind, trains)
    fits_with = ""
    if memory > place.memory:
        fits_with = _remedy(cfg, line.base, trains)
    disk, training = 0.0, None
    if trains:
        disk = costs.disk(cfg, line.base.size(store))
        training = footprint.footprint(cfg, line.base, store, place.kind)
    return Item(name, False, makes, seconds, memory, disk, place.memory, fits_with, training)


def _memory(cfg: RunConfig, base: BaseModel, kind: str, trains: bool) -> float:
    """Return the bytes of each process at the peak, be it of training or of evaluation."""
    store = Store(cfg.store, cfg.fetch_from)
    evaluation = base.size(store).parameters * costs.itemsize(cfg) + footprint.PROGRAM[kind]
    if cfg.hardware.spread:
        evaluation /= cfg.hardware.ranks or 1
    if not trains:
        return evaluation
    return max(footprint.footprint(cfg, base, store, kind).peak, evaluation)


def _remedy(cfg: RunConfig, base: BaseModel, trains: bool) -> str:
    """Return overrides with which a member fits: one, if one is enough; else several together."""

    def fits(changed: RunConfig) -> bool:
        try:
            place = Place.of(changed.hardware)
        except UserError:  # there are not so many here
            return False
        other = replace(base, dtype=changed.model.dtype)
        return _memory(changed, other, place.kind, trains) <= place.memory

    for step in footprint.STEPS:
        for said, changed in step(cfg):
            if fits(changed):
                return said
    words: list[str] = []
    for step in footprint.STEPS:
        for said, changed in step(cfg):
            if fits(changed):
                return " ".join([*words, said])
        for said, changed in list(step(cfg))[:1]:
            words, cfg = [*words, said], changed
    return ""


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


def show(plan: Plan, console: Console) -> None:
    """Print a plan, and which of its members do not fit into memory."""
    console.print(table(plan))
    parts = [item.training for item in plan.items]
    if len(parts) == 1 and parts[0] is not None:
        said = ", ".join(f"{name} {decimal(int(n))}" for name, n in vars(parts[0]).items() if n)
        console.print(f"training: {said}", highlight=False, soft_wrap=True)
    for line in _too_large(plan):
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)


def _too_large(plan: Plan) -> list[str]:
    found: dict[str, list[str]] = {}
    for item in plan.items:
        if item.memory > item.room:
            needed, there = (decimal(int(n)) for n in (item.memory, item.room))
            remedy = item.fits_with or "a smaller model; nothing else that is known here is enough"
            problem = f"needs {needed} for each process, and there are {there}\n  try:   {remedy}"
            found.setdefault(problem, []).append(item.name)
    return [f"{', '.join(names)}: {problem}" for problem, names in found.items()]


def _caption(plan: Plan) -> str:
    together = f", {plan.workers} workers" if plan.workers > 1 else ""
    return (
        f"What several members share counts for the first{together}. Memory: the most that a "
        "process holds."
    )
