"""Build three artifacts in competition with other processes (`build`); check the logs (`check`).

Started by boot.sh, in eight processes on two machines, and by run.sh.
"""

import json
import os
import random
import socket
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
from hyperfitting.store.artifact import Step, Store

NAMES = ("x", "y", "z")
LEASE_SECONDS = 15
"""After which the NFS server frees the locks of a machine that it cannot reach."""
BUILD_SECONDS = {"undisturbed": 3, "killed": 6, "lost": 12}
"""Duration of a build, by phase."""
SLACK_SECONDS = 8
"""The machines are emulated."""
MIN_READS = {"undisturbed": 24, "killed": 21, "lost": 12}
"""Artifacts that the surviving processes read: three each."""


def build(phase: str, number: str, seconds: float) -> None:
    """Ensure the three artifacts in random order; log each build and each read."""
    log_file = Path(f"{phase}.{socket.gethostname()}.{number}.{os.getpid()}.log")

    def log(*event: Any) -> None:
        with log_file.open("a") as file:
            file.write(json.dumps(event) + "\n")
            os.fsync(file.fileno())

    def step(name: str) -> Step:
        def fill(folder: Path) -> None:
            log("started", name)
            time.sleep(seconds)
            (folder / "a.txt").write_text(name)
            log("built", name)

        artifact = Store(phase).artifact("slow", version=1, config={"name": name}, inputs={})
        return Step(artifact, fill)

    names = random.Random(number).sample(NAMES, 3)
    assert not any(step(name).artifact.exists for name in names)  # cached by the NFS client
    Path(f"{phase}.ready.{number}").touch()
    while not Path(f"{phase}.go.{number[0]}").exists():
        time.sleep(0.1)
    for name in names:
        start = time.monotonic()
        assert step(name).ensure().file("a.txt").read_text() == name
        log("read", name, time.monotonic() - start)


def check(lines: list[str]) -> None:
    """Exit with an error unless each phase built each artifact once, in time for every process."""
    phases: dict[str, list[list[Any]]] = defaultdict(list)
    for line in lines:
        path, _, event = line.partition(":")
        phases[Path(path).name.split(".")[0]].append(json.loads(event))
    failed = []
    for phase, seconds in BUILD_SECONDS.items():
        events = phases[phase]
        built = sorted(name for kind, name, *_ in events if kind == "built")
        n_started = sum(kind == "started" for kind, *_ in events)
        waits = [wait for kind, _, *rest in events if kind == "read" for wait in rest]
        print(
            f"{phase}: {n_started} builds started, {len(built)} finished, {len(waits)} reads, "
            f"the slowest after {max(waits):.1f} s"
        )
        disturbed = phase != "undisturbed"
        max_wait = seconds * (1 + disturbed) + LEASE_SECONDS * (phase == "lost") + SLACK_SECONDS
        # a build that died on machine 3 is started again elsewhere
        restarted = n_started > len(built) if disturbed else n_started == len(built)
        complete = built == list(NAMES) and len(waits) >= MIN_READS[phase]
        if not (complete and restarted and max(waits) <= max_wait):
            failed.append(phase)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    else:
        check(Path(sys.argv[2]).read_text().splitlines())
