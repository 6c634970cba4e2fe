"""What can only be known on a GPU, as one JSON file and a table.

    python -m benchmarks.gpu [--part correctness|speed] [--only NAME …]

Both parts need no network: the models are randomly initialized. Without a GPU, `--device cpu
--shapes tiny` runs all of it in a minute, so that it works when there is one.
"""

import argparse
import gc
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu import (
    decoding_checks,
    fsdp_checks,
    memory_checks,
    profile_checks,
    speed_checks,
    training_checks,
)
from benchmarks.gpu.findings import Finding, findings_table, write_findings
from benchmarks.gpu.lab import REAL, TINY, Lab, release
from hyperfitting.store.manifest import package_versions

Check = Callable[[Lab], Iterator[Finding]]
PARTS: dict[str, dict[str, Check]] = {
    "correctness": {
        "attention kernels": training_checks.attention_kernels,
        "CUDA graph": decoding_checks.cuda_graph,
        "no CUDA graph": decoding_checks.no_capture,
        "token statistics": decoding_checks.token_stats,
        "citation blocker": decoding_checks.citation_blocker,
        "batch size": decoding_checks.batch_size,
        "packaged model": decoding_checks.packaged_model,
        "one-rank FSDP": fsdp_checks.one_rank,
        "same run twice": training_checks.same_run_twice,
        "SIGTERM and resume": training_checks.sigterm_and_resume,
        "activation cache": training_checks.activation_cache,
        "chunked loss": training_checks.chunked_loss,
        "out of memory, training": training_checks.out_of_memory,
        "out of memory, decoding": decoding_checks.out_of_memory,
        "peak memory": memory_checks.peak_memory,
    },
    "speed": {  # what has not been measured yet comes first
        "ceilings": speed_checks.ceilings,
        "kernels": profile_checks.kernels,
        "late stage": speed_checks.late_stage,
        "scoring": speed_checks.scoring,
        "images": speed_checks.images,
        "decoding": speed_checks.decoding,
        "8B": speed_checks.large_model,
        "static generate": speed_checks.static_generate,
        "training": speed_checks.training,
        "Table 1 row": speed_checks.table1_row,
    },
}
DEFAULT_PATH = Path("outputs/bench/gpu.json")


def main() -> None:
    """Run the checks asked for; the exit status is 1 if one has failed."""
    arguments = _arguments()
    device = torch.empty(0, device=arguments.device).device  # with its index
    if device.type == "cpu":
        torch.set_num_threads(1)  # tiny models only lose by more, and by compiled optimizers
        torch.compiler.set_stance("force_eager")
    gc.freeze()  # `release` collects garbage often: leave the imports out of it
    machine = _machine(device)
    console = Console()
    findings: list[Finding] = []
    end = time.monotonic() + 60 * arguments.minutes
    checks = {
        name: check
        for part in ([arguments.part] if arguments.part else PARTS)
        for name, check in PARTS[part].items()
        if not arguments.only or name in arguments.only
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(device, REAL if arguments.shapes == "real" else TINY, Path(folder))
        for name, check in checks.items():
            console.print(f"{name} …", highlight=False)
            start = time.monotonic()
            for finding in _run(lab, check, end):
                findings.append(replace(finding, check=name))
                write_findings(arguments.out, machine, findings)
            release(device)
            console.print(f"  {time.monotonic() - start:.0f} s", highlight=False)
    console.print(findings_table(findings))
    console.print(f"results    {arguments.out}")
    sys.exit(any(finding.passed is False for finding in findings))


def _run(lab: Lab, check: Check, end: float) -> Iterator[Finding]:
    """Yield what a check finds until the time is over; a crash is a finding."""
    if time.monotonic() > end:
        yield Finding("skipped: no time left")
        return
    try:
        for finding in check(lab):
            yield finding
            if time.monotonic() > end:
                yield Finding("ended early: no time left")
                return
    except Exception as error:  # the other checks go on
        traceback.print_exc()
        yield Finding("crashed", {"error": f"{type(error).__name__}: {error}"}, False, "no error")


def _arguments() -> argparse.Namespace:
    names = [name for checks in PARTS.values() for name in checks]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=PARTS, help="one of the two parts (both)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (%(default)s)")
    parser.add_argument(
        "--shapes", choices=("real", "tiny"), default="real", help="sizes (%(default)s)"
    )
    parser.add_argument(
        "--minutes", type=float, default=18, help="no check starts after these (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_PATH, help="JSON file of the findings (%(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; to try the checks: --device cpu --shapes tiny")
    return arguments


def _machine(device: torch.device) -> dict[str, Any]:
    machine: dict[str, Any] = {
        "system": platform.platform(), "cpus": os.cpu_count(), "versions": package_versions(),
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "gpu": properties.name, "gpu_memory_gb": properties.total_memory / 1e9,
            "cuda": torch.version.cuda, "capability": f"{properties.major}.{properties.minor}",
        }  # fmt: skip
    return machine


if __name__ == "__main__":
    main()
