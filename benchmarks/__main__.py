"""`make bench`: all comparisons, as a table and in outputs/bench/bench.json.

python -m benchmarks [metrics] [decoding] [training] [growth] [profile] [tracking] [page]
                     [mechanism] [annotation] [images]
"""

import argparse
import json
import os
import platform
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import (
    annotation,
    decoding,
    growth,
    images,
    mechanism,
    metrics,
    page,
    profile,
    tracking,
    training,
)
from hyperfitting.runtime.files import write_json
from hyperfitting.store.manifest import package_versions

SUITES = {
    "metrics": metrics.run, "decoding": decoding.run, "training": training.run,
    "growth": growth.run, "profile": profile.run, "tracking": tracking.run, "page": page.run,
    "mechanism": mechanism.run,
    "annotation": annotation.run, "images": images.run,
}  # fmt: skip
PATH = Path("outputs/bench/bench.json")


def main() -> None:
    """Run the suites asked for; results of the others stay in the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all")
    chosen = parser.parse_args().suites or list(SUITES)
    unknown = set(chosen) - set(SUITES)
    if unknown:
        parser.error(f"no such suite: {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    console = Console()
    table = Table("comparison", "ratio", "ours: median [range]", "peer: median [range]")
    found = json.loads(PATH.read_text("utf-8")) if PATH.is_file() else {}
    found["machine"] = {
        "system": platform.platform(), "cpus": os.cpu_count(), "versions": package_versions(),
    }  # fmt: skip
    with console.status("measuring") as status:
        for name in chosen:
            status.update(f"measuring {name}; all suites take half an hour")
            for result in SUITES[name]():
                console.print(f"{result.key} {result.ratio:.4g}", highlight=False)
                found[result.key] = result.ratio
                found.setdefault("details", {})[result.key] = result.details()
                PATH.parent.mkdir(parents=True, exist_ok=True)
                write_json(PATH, found)
                table.add_row(
                    f"{result.key}\n{result.what}", f"{result.ratio:.4g}",
                    str(result.ours), str(result.peer),
                )  # fmt: skip
                for key, value in result.more.items():
                    table.add_row(f"  {key}", _short(value), "", "")
                table.add_section()
    console.print(table)
    console.print(f"results    {PATH}")


def _short(value: object) -> str:
    if isinstance(value, dict):
        return "\n".join(
            f"{key}: " + ", ".join(f"{k} {v:.3g}" for k, v in part.items())
            for key, part in value.items()
        )
    if isinstance(value, list):
        return f"{min(value):.3f} to {max(value):.3f}"
    return f"{value:.4g}"


if __name__ == "__main__":
    main()
