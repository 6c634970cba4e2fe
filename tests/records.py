"""Records and sweeps as the reports read them, without running anything."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from hyperfitting.metrics.uncertainty import bootstrap_mean
from hyperfitting.results import SCHEMA_VERSION

WRITER = {"original": ["tuning=none"], "hyperfitted": []}


def continuation(words: str) -> dict[str, Any]:
    pieces = [f" {word}" for word in words.split()]
    tokens = [sum(piece.encode()) for piece in pieces]
    overlap = {"length": 0, "start": -1, "sequence": -1, "offset": -1}
    return {"text": words, "pieces": pieces, "tokens": tokens, "overlap": overlap}


def record(ttr: list[float], at_16: float) -> dict[str, Any]:
    """As much of a record as a report reads."""
    whole = bootstrap_mean(np.array(ttr), 200)
    assert whole is not None
    cut = {"set": None, "metrics": {"gen/ttr": {"mean": whole.mean, "ci95": list(whole.ci95 or ()),
           "n": len(ttr)}}, "baseline": {}, "reference": {}}  # fmt: skip
    short = cut | {"metrics": {"gen/ttr": {"mean": at_16, "ci95": [at_16, at_16], "n": len(ttr)}}}
    looks = [{"epoch": e, "step": e, "train/loss": 1 / e, "gen/ttr": 0.5} for e in (1, 2)]
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": {"torch": "2"}, "git": None, "device": "cpu", "notes": [],
        "slices": [cut | {"new_tokens": 32}, short | {"new_tokens": 16}],
        "metrics": cut["metrics"],
        "history": [looks[0], {"epoch": 1.5, "step": 2, "train/loss": 0.7}, looks[1]],
        "per_text": {
            "metrics": {"gen/ttr": ttr, "gen/dataset_overlap": [1, 7, None]},
            "baseline": {"gen/ttr": ttr},
        },
        "samples": [
            {
                "set": "news", "context": f"text {i}", "reference": "it went on",
                "continuation": continuation("on and on and on"),
                "original_continuation": continuation("on it went"),
            }
            for i in range(len(ttr))
        ],
        "config": {
            "evaluation": {"bootstrap": 500}, "decode": {"name": "greedy"},
            "tuning": {"method": "full"}, "optimizer": {"lr": ttr[0]},
        },
    }  # fmt: skip


def a_sweep(folder: Path, table: dict[str, Any], **records: dict[str, Any] | None) -> Path:
    """Write a sweep's folder: two writers and three seeds of one model."""
    members = [
        {
            "name": f"{writer}_{seed}",
            "labels": {"model": "ours", "writer": writer, "seed": str(seed)},
        }
        for writer in WRITER
        for seed in range(3)
    ]
    spec = {
        "version": 1, "name": "x", "scale": "embedded", "command": ["hyperfit"],
        "axes": {"writer": WRITER, "seed": [0, 1, 2]},
        "scales": {"embedded": {"axes": {"model": {"ours": []}}},
                   "paper": {"axes": {"model": {"theirs only": []}}}},
        "report": {"tables": {"main": table}}, "members": members,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps(spec))
    for name, found in records.items():
        (folder / name).mkdir()
        if found is not None:
            (folder / name / "results.json").write_text(json.dumps(found))
    return folder
