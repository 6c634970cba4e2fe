"""Want three artefacts, as seven others do on two machines (`want`); then say how it was (`judge`).

Run by run.sh.
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
from hyperfitting.store import Artefact, Store

NAMES = ("x", "y", "z")
LEASE = 15
"""Seconds after which the server takes a machine that is not heard of to be lost."""
TAKES = {"plain": 3, "killed": 6, "lost": 12}
SLACK = 8
"""Seconds: the machines are emulated."""


def want(phase: str, number: str, takes: float) -> None:
    log = Path(f"{phase}.{socket.gethostname()}.{number}.{os.getpid()}.log")

    def said(*what: Any) -> None:
        with log.open("a") as file:
            file.write(json.dumps(what) + "\n")
            os.fsync(file.fileno())

    def artefact(name: str) -> Artefact:
        def make(work: Path) -> None:
            said("begun", name)
            time.sleep(takes)
            (work / "a.txt").write_text(name)
            said("made", name)

        store = Store(Path(phase))
        return store.artefact("slow", version=1, config={"name": name}, inputs={}, make=make)

    names = random.Random(number).sample(NAMES, 3)
    assert not any(artefact(name).exists for name in names)  # which NFS remembers
    Path(f"{phase}.ready.{number}").touch()
    while not Path(f"{phase}.go.{number[0]}").exists():
        time.sleep(0.1)
    for name in names:
        start = time.monotonic()
        assert artefact(name).file("a.txt").read_text() == name
        said("had", name, time.monotonic() - start)


def judge(lines: list[str]) -> None:
    phases: dict[str, list[list[Any]]] = defaultdict(list)
    for line in lines:
        where, _, said = line.partition(":")
        phases[Path(where).name.split(".")[0]].append(json.loads(said))
    wrong = []
    for phase, takes in TAKES.items():
        events = phases[phase]
        made = sorted(name for what, name, *_ in events if what == "made")
        begun = sum(what == "begun" for what, *_ in events)
        had = [seconds for what, _, *rest in events if what == "had" for seconds in rest]
        print(f"{phase}: {len(made)} made, {begun} begun, {len(had)} had, after {max(had):.1f} s")
        disturbed = phase != "plain"
        wait = takes * (1 + disturbed) + LEASE * (phase == "lost") + SLACK
        # what was begun on machine 3 and made nowhere is begun again
        whole = begun == len(made) if not disturbed else begun > len(made)
        least = {"plain": 24, "killed": 21, "lost": 12}[phase]
        if made != list(NAMES) or not whole or len(had) < least or max(had) > wait:
            wrong.append(phase)
    if wrong:
        sys.exit(f"not as it should be: {', '.join(wrong)}")


if __name__ == "__main__":
    if sys.argv[1] == "want":
        want(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    else:
        judge(Path(sys.argv[2]).read_text().splitlines())
