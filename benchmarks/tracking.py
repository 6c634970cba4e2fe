"""What W&B costs: the seconds a default run spends in it, against those of its training."""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra

from benchmarks.timing import Result, Timing
from hyperfitting.config import conf_dir, from_hydra, register
from hyperfitting.progress import silent
from hyperfitting.run import run as run_member
from hyperfitting.tracking import Identity, tracked


def run() -> Iterator[Result]:
    """Yield the share; the run is made if it is not in the store, which takes minutes."""
    register()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = from_hydra(hydra.compose("config"))
    spent: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        who = Identity("bench", Path(folder), cfg)
        begun = time.perf_counter()
        with tracked(who) as tracker:
            spent["start"] = time.perf_counter() - begun
            for name in ("row", "finish"):
                setattr(tracker, name, _timed(getattr(tracker, name), name, spent))
            record = run_member(cfg, Path(folder), tracker, silent)
            ended = time.perf_counter()
        spent["close"] = time.perf_counter() - ended
        size = sum(p.stat().st_size for p in Path(folder).rglob("wandb/**/*") if p.is_file())
    training = record["timings"]["making_seconds"]["tuned"]
    total = sum(spent.values())
    yield Result(
        "tracking_overhead",
        total / training,
        "seconds of a default run spent in W&B, offline, over those of its training",
        Timing([total]),
        Timing([training]),
        {f"{name}, seconds": seconds for name, seconds in spent.items()}
        | {"rows": len(record["history"]), "bytes": size},
    )


def _timed(job: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*given: Any) -> Any:
        begun = time.perf_counter()
        found = job(*given)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - begun
        return found

    return timed
