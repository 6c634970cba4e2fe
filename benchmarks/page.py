"""The page of a large sweep in a real browser: how long until it is there, and until it answers."""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright
from tests.records import record

from benchmarks.timing import Result, Timing, seconds
from hyperfitting.data import packaged
from hyperfitting.reporting import report

SMALL, LARGE = (2, 10), (20, 300)
"""Members, and contexts of each."""
TOKENS = 224
REPEATS = 5


def run() -> Iterator[Result]:
    """Yield how long each thing takes on a large page, over a small one."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser)
        small, large = (_measured(Path(folder), *size, opened.new_page) for size in (SMALL, LARGE))
        opened.close()
    for name, (what, timing) in large[0].items():
        yield Result(
            f"page_{name}_{LARGE[0]}x{LARGE[1]}",
            timing.median / small[0][name][1].median,
            f"{what}, {LARGE[0]} members x {LARGE[1]} contexts over {SMALL[0]} x {SMALL[1]}",
            timing,
            small[0][name][1],
            {"megabytes": large[1] / 1e6, "peer_megabytes": small[1] / 1e6},
        )


def _measured(
    folder: Path, members: int, contexts: int, new_page: Callable[[], Page]
) -> tuple[dict[str, tuple[str, Timing]], int]:
    """Return, by name, what was timed of a page and how long it took; and the page's size."""
    sweep = _sweep(folder / "sweeps" / f"{members}", members, contexts)
    found = {"draw": ("writing the report", seconds(lambda: report.write(sweep), 1))}
    path = folder / "reports" / f"{members}" / "index.html"
    page = new_page()
    page.set_default_timeout(120_000)
    found["load"] = (
        "opening the page, all charts drawn",
        seconds(lambda: page.goto(path.as_uri()), REPEATS),
    )
    turn = iter(range(10**6))
    jobs: dict[str, tuple[str, Callable[[int], object]]] = {
        "next_text": ("the next context", lambda n: page.keyboard.press("ArrowDown")),
        "filter": (
            "a filter by repetition",
            lambda n: page.get_by_label("repeated 2-grams at least").fill(f"0.{1 + n % 2}"),
        ),
        "member": (
            "a member off or on",
            lambda n: page.get_by_label("hyperfitted_1", exact=True).set_checked(n % 2 == 1),
        ),
    }
    page.locator("#contexts").focus()
    for name, (what, job) in jobs.items():

        def until_painted(job: Callable[[int], object] = job) -> None:
            job(next(turn))
            page.evaluate("() => new Promise(requestAnimationFrame)")

        found[name] = (what, seconds(until_painted, REPEATS))
    return found, path.stat().st_size


def _sweep(folder: Path, members: int, contexts: int) -> Path:
    """Write a sweep's folder: real words, of which some members say some again and again."""
    chance = random.Random(0)
    words = "\n".join(packaged.read("shakespeare")).split()

    def text(loops: bool) -> dict[str, Any]:
        start, unit = chance.randrange(len(words) - TOKENS), chance.randrange(4, 40)
        chosen = words[start : start + unit] * (TOKENS // unit + 1) if loops else words[start:]
        pieces = [f" {word}" for word in chosen[:TOKENS]]
        tokens = [int.from_bytes(piece.encode()[:4], "big") for piece in pieces]
        overlap = {"length": chance.randrange(12), "start": 20, "sequence": 0, "offset": 0}
        return {"text": "".join(pieces), "pieces": pieces, "tokens": tokens, "overlap": overlap}

    original = [text(loops=True) for _ in range(contexts)]
    names = [f"hyperfitted_{number}" for number in range(members)]
    for name in names:
        made = record([chance.random() for _ in range(contexts)], 0.5)
        made["per_text"]["metrics"]["gen/rep_2"] = [chance.random() for _ in range(contexts)]
        made["per_text"]["metrics"]["gen/dataset_overlap"] = [5] * contexts
        for number, sample in enumerate(made["samples"]):
            sample["set"] = ("fiction", "wikipedia", "news")[number % 3]
            sample["original_continuation"] = original[number]
            sample["continuation"] = text(loops=number % 4 == 0)
        (folder / name).mkdir(parents=True)
        (folder / name / "results.json").write_text(json.dumps(made))
    spec = {
        "version": 1, "name": folder.name, "scale": "embedded", "command": ["hyperfit"],
        "axes": {}, "scales": {"embedded": {}},
        "report": {"tables": {"main": {"rows": ["seed"], "columns": {"TTR": {"key": "gen/ttr"}}}}},
        "members": [{"name": n, "labels": {"seed": n.rpartition("_")[2]}} for n in names],
    }  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(spec))
    return folder
