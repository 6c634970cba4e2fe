"""The page of a large sweep in a real browser: time to draw, to load and to respond."""

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from tests.records import make_continuation, make_predictions, make_sample, ttr_record

from benchmarks.timing import Result, Timing, seconds
from hyperfitting.data import packaged
from hyperfitting.record.files import write_record
from hyperfitting.record.schema import Record
from hyperfitting.record.texts import Continuation
from hyperfitting.reporting.report import write_report
from hyperfitting.sweep.spec import RunEntrySpec, write_sweep_spec

SMALL, LARGE = (2, 10), (20, 300)
"""Runs, and contexts of each."""
DATASETS = ("fiction", "wikipedia", "news")
TOKENS = 224
REPEATS = 5


def run() -> Iterator[Result]:
    """Yield how long each action takes on a large page, relative to a small one."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser)
        small, large = (_measure(Path(folder), *size, opened.new_page) for size in (SMALL, LARGE))
        opened.close()
    for name, (action, timing) in large[0].items():
        yield Result(
            f"page_{name}_{LARGE[0]}x{LARGE[1]}",
            timing.median / small[0][name][1].median,
            f"{action}, {LARGE[0]} runs x {LARGE[1]} contexts over {SMALL[0]} x {SMALL[1]}",
            timing,
            small[0][name][1],
            {"megabytes": large[1] / 1e6, "peer_megabytes": small[1] / 1e6},
        )


def _measure(
    folder: Path, runs: int, contexts: int, new_page: Callable[[], Page]
) -> tuple[dict[str, tuple[str, Timing]], int]:
    """Return by name the timed actions on a page, with their timings; and the page's size."""
    sweep = _write_sweep(folder / "sweeps" / f"{runs}", runs, contexts)
    timings = {"draw": ("writing the report", seconds(lambda: write_report(sweep), 1))}
    path = folder / "reports" / f"{runs}" / "index.html"
    page = new_page()
    page.set_default_timeout(120_000)
    timings["load"] = (
        "opening the page, all charts drawn",
        seconds(lambda: page.goto(path.as_uri()), REPEATS),
    )
    repeat = iter(range(10**6))
    actions: dict[str, tuple[str, Callable[[int], object]]] = {
        "next_text": ("the next context", lambda n: page.keyboard.press("ArrowDown")),
        "filter": (
            "a filter by repetition",
            lambda n: page.get_by_label("repeated 2-grams at least").fill(f"0.{1 + n % 2}"),
        ),
        "run": (
            "hiding or showing a run",
            lambda n: page.get_by_label("tuned_1", exact=True).set_checked(n % 2 == 1),
        ),
    }
    page.locator("#contexts").focus()
    for name, (description, action) in actions.items():

        def until_painted(action: Callable[[int], object] = action) -> None:
            action(next(repeat))
            page.evaluate("() => new Promise(requestAnimationFrame)")

        timings[name] = (description, seconds(until_painted, REPEATS))
    return timings, path.stat().st_size


def _write_sweep(folder: Path, runs: int, contexts: int) -> Path:
    """Write a sweep's folder, with texts of real words, some of them in loops."""
    generator = random.Random(0)
    words = "\n".join(packaged.read("shakespeare")).split()

    def continuation(loops: bool) -> Continuation:
        start, unit = generator.randrange(len(words) - TOKENS), generator.randrange(4, 40)
        chosen = words[start : start + unit] * (TOKENS // unit + 1) if loops else words[start:]
        return make_continuation(" ".join(chosen[:TOKENS]), (generator.randrange(12), 20))

    def record() -> Record:
        random_values: list[float | None] = [generator.random() for _ in range(contexts)]
        samples = [
            make_sample(
                continuation(loops=number % 4 == 0),
                base[number],
                dataset=DATASETS[number % len(DATASETS)],
                context=f"text {number}",
            )
            for number in range(contexts)
        ]
        ttr = [generator.random() for _ in range(contexts)]
        per_text = {
            "tuned": {
                "gen/ttr": list(ttr),
                "gen/rep_2": random_values,
                "gen/dataset_overlap": [5] * contexts,
            }
        }
        return ttr_record(ttr, 0.5, samples=samples, per_text=per_text)

    base = [continuation(loops=True) for _ in range(contexts)]
    names = [f"tuned_{number}" for number in range(runs)]
    write_sweep_spec(
        folder,
        name=folder.name,
        scale="embedded",
        command=["hyperfit"],
        axes={},
        scales={"embedded": {}},
        report={"tables": {"main": {"rows": ["seed"], "columns": {"TTR": {"key": "gen/ttr"}}}}},
        runs=[RunEntrySpec(name=n, labels={"seed": n.rpartition("_")[2]}) for n in names],
    )
    for name in names:
        (folder / name).mkdir()
        write_record(folder / name, record(), make_predictions())
    return folder
