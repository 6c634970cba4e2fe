"""The overhead of W&B: the seconds that a default run spends in it, relative to its training."""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra

from benchmarks.timing import Result, Timing
from hyperfitting.config import conf_dir, from_hydra, register
from hyperfitting.progress import no_op
from hyperfitting.run import run as run_config
from hyperfitting.tracking.run_info import RunInfo
from hyperfitting.tracking.wandb_run import track


def run() -> Iterator[Result]:
    """Yield the share; the run is executed if it is not in the store, which takes minutes."""
    register()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = from_hydra(hydra.compose("config"))
    spent: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with track(RunInfo("bench", Path(folder), cfg)) as tracker:
            spent["start"] = time.perf_counter() - start
            for name in ("log_metrics", "finish"):
                setattr(tracker, name, _timed(getattr(tracker, name), name, spent))
            record = run_config(cfg, Path(folder), tracker, no_op)
            closing = time.perf_counter()
        spent["close"] = time.perf_counter() - closing
        size = sum(p.stat().st_size for p in Path(folder).rglob("wandb/**/*") if p.is_file())
    training = record.timings.build_seconds["tuned"]
    total = sum(spent.values())
    yield Result(
        "tracking_overhead",
        total / training,
        "seconds of a default run spent in W&B, offline, over those of its training",
        Timing([total]),
        Timing([training]),
        {f"{name}, seconds": seconds for name, seconds in spent.items()}
        | {"rows": len(record.history), "bytes": size},
    )


def _timed(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        return result

    return timed
