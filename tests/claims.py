"""Claims, and sweeps that decide them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyperfitting.record.schema import Record
from hyperfitting.reporting.claims.evidence import MIN_SEEDS
from hyperfitting.reporting.claims.ledger import Entry, build_ledger
from hyperfitting.reporting.claims.schema import Claim
from hyperfitting.reporting.claims.sweeps import Sweeps
from hyperfitting.reporting.sweep_records import load_sweep
from tests.records import make_config, ttr_record, write_sweep

TUNED = [0.52, 0.71, 0.44, 0.63, 0.58, 0.69]
BASE = [0.31, 0.42, 0.47, 0.33, 0.29, 0.35]


def record(tuned: Sequence[float], base: Sequence[float], seed: int = 0, **fields: Any) -> Record:
    per_text: dict[str, Any] = {"tuned": {"gen/ttr": list(tuned)}, "base": {"gen/ttr": list(base)}}
    parts = {"per_text": per_text, "config": make_config(seed=seed)}
    return ttr_record(tuned, 0.5, **parts | fields)


def sweeps(folder: Path, records: dict[str, Record]) -> Sweeps:
    runs = load_sweep(write_sweep(folder, {}, records)).runs
    return Sweeps({("table1", "embedded"): runs})


def several(tuned: Sequence[float], base: Sequence[float], **fields: Any) -> dict[str, Record]:
    """The records of as many seeds as a verdict needs, which do not differ: only texts vary."""
    return {f"tuned_{seed}": record(tuned, base, seed, **fields) for seed in range(MIN_SEEDS)}


def claim(**values: Any) -> Claim:
    rises = criterion(minus={"side": "base"}, above=0)
    defaults = {"id": "p1-x", "source": "Table 1", "claim": "it rises", "criteria": [rises]}
    return Claim.model_validate(defaults | values)


def only(claims: Sequence[Claim], runs: Sweeps) -> Entry:
    return build_ledger(claims, runs).entries[0]


def criterion(**changes: Any) -> dict[str, Any]:
    value = {"experiment": "table1", "labels": {"system": "tuned"}, "key": "gen/ttr"}
    return {"value": value | changes.pop("value", {})} | changes
