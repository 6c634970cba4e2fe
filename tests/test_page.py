"""The page of a report, in a real browser: it draws, filters, loads nothing, and trusts no text."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from hyperfitting.errors import UserError
from hyperfitting.reporting import page, report
from hyperfitting.reporting.serve import draw_anew, served
from hyperfitting.reporting.sweeps import SweepRecords
from tests.records import a_sweep, continuation, record

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass
class Seen:
    """A page, with what it said and asked for since it was opened."""

    page: Page
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip(f"no browser is installed: one of {', '.join(_NAMES)}")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path)
        yield launched
        launched.close()


def opened(browser: Browser, path: Path | str, scheme: str = "light", width: int = 1280) -> Seen:
    """Return a page once its script has run to its end, with what goes wrong on the way."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    seen = Seen(page)
    page.on("console", lambda message: seen.said.append(message.text))
    page.on("pageerror", lambda error: seen.said.append(str(error)))
    page.on("dialog", lambda dialog: (seen.said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: seen.requests.append(request.url))
    page.goto(path if isinstance(path, str) else path.as_uri())
    return seen


HOSTILE = "</script><script>window.evil = 1</script><img src=x onerror=alert(1)> {{ 7 * 7 }} & \"'"
LOOP = "again and again and again and again"


def samples(member: int) -> list[dict[str, Any]]:
    """Return three texts of two sets: a hostile one, a loop, and one that quotes six tokens."""
    quoting = continuation("so it is that we all go home")
    quoting["overlap"] = {"length": 6, "start": 1, "sequence": 0, "offset": 0}
    written = [continuation(HOSTILE), continuation(LOOP), quoting]
    return [
        {
            "set": texts,
            "context": f"{words} {number}",
            "reference": words,
            "continuation": one | {"pieces": [*one["pieces"], f" {member}"],
                                   "tokens": [*one["tokens"], member]},
            "original_continuation": continuation(f"as it was {number}"),
        }
        for number, (texts, words, one) in enumerate(
            zip((HOSTILE, "news", "news"), (HOSTILE, "a loop", "a quotation"), written, strict=True)
        )
    ]  # fmt: skip


def hostile(member: int) -> dict[str, Any]:
    made = record([0.9, 0.2, 0.5], 0.5)
    made["per_text"]["metrics"] |= {"gen/rep_2": [0.0, 0.8, 0.1], "gen/dataset_overlap": [0, 1, 6]}
    made["metrics"]["val/perplexity"] = {"mean": 30.0 + member, "ci95": [29.0, 40.0], "n": 3}
    for key in ("val/loss", "val/entropy"):
        for row in made["history"]:
            row[key] = 3.0 + member
    made |= {"samples": samples(member), "notes": [HOSTILE], "device": HOSTILE}
    made["config"]["dataset"] = {"name": f"{HOSTILE} {member}"}
    return made


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of three members that have finished and three that have not."""
    folder = tmp_path_factory.mktemp("reports") / "sweeps" / "x"
    a_sweep(
        folder,
        {"rows": ["writer", "seed"], "columns": {HOSTILE: {"key": "gen/ttr"}}},
        **{f"hyperfitted_{seed}": hostile(seed) for seed in range(3)},
    )
    spec = json.loads((folder / "sweep.json").read_text())
    spec["report"] |= {
        "title": HOSTILE,
        "about": HOSTILE,
        "figures": {"curve": {"kind": "curves", "series": ["train/loss"], "caption": HOSTILE}},
    }
    spec["command"] = ["hyperfit", HOSTILE]
    (folder / "sweep.json").write_text(json.dumps(spec))
    return report.write(folder) / "index.html"


def test_charts_are_drawn_and_nothing_is_loaded_or_complained_of(
    browser: Browser, written: Path
) -> None:
    seen = opened(browser, written)
    for key in ("train/loss", "val/loss", "gen/ttr", "val/entropy"):
        expect(seen.page.locator(f'[data-series="{key}"] .scatterlayer .trace')).to_have_count(3)
    expect(seen.page.locator("#scatter .scatterlayer .trace")).to_have_count(3)
    expect(seen.page.locator("#figures img")).to_have_count(1)
    assert seen.page.evaluate("document.querySelector('#figures img').naturalWidth") > 100
    assert [url for url in seen.requests if not url.startswith("data:")] == [written.as_uri()]
    assert seen.said == []


def test_hostile_texts_stay_texts(browser: Browser, written: Path) -> None:
    seen = opened(browser, written)
    assert seen.page.evaluate("window.evil") is None
    assert seen.page.title() == HOSTILE
    for place in ("h1", "header p >> nth=0", "figcaption", "#made li", "#context"):
        assert HOSTILE in seen.page.locator(place).first.inner_text()
    assert f" {HOSTILE} 1" in seen.page.locator(".writer .text").nth(2).inner_text()
    assert seen.page.locator("main script, main img:not(#figures img), iframe").count() == 0
    assert seen.said == []


def test_members_and_originals_are_shown_or_not(browser: Browser, written: Path) -> None:
    seen = opened(browser, written)
    heads = seen.page.locator(".writer h3")
    after = ["hyperfitted_0", "hyperfitted_1", "hyperfitted_2"]
    assert heads.all_inner_texts() == ["original, greedy", *after, "as it really goes on"]
    seen.page.get_by_label("hyperfitted_1").uncheck()
    assert heads.all_inner_texts() == [
        "original, greedy", "hyperfitted_0", "hyperfitted_2", "as it really goes on"
    ]  # fmt: skip
    expect(seen.page.locator("#scatter .scatterlayer .trace")).to_have_count(2)
    seen.page.get_by_label("original models").uncheck()
    assert heads.first.inner_text() == "hyperfitted_0"
    seen.page.get_by_role("button", name="None", exact=True).click()
    assert heads.all_inner_texts() == ["as it really goes on"]
    seen.page.get_by_role("button", name="All", exact=True).click()
    assert heads.count() == 4
    assert seen.page.get_by_label("original_0").is_disabled()


def test_contexts_are_filtered_ordered_and_reached_by_keyboard(
    browser: Browser, written: Path
) -> None:
    seen = opened(browser, written)
    contexts = seen.page.locator("#contexts option")

    def listed() -> list[str]:
        return [text.partition(" ")[0] for text in contexts.all_inner_texts()]

    assert listed() == ["1", "2", "3"]
    seen.page.locator("#set").select_option("news")
    assert listed() == ["2", "3"]
    seen.page.locator("#order").select_option("overlap")
    assert listed() == ["3", "2"]
    seen.page.get_by_label("repeated 2-grams at least").fill("0.5")
    assert listed() == ["2"]
    seen.page.get_by_label("repeated 2-grams at least").fill("0")
    seen.page.get_by_label("overlap at least").fill("6")
    assert listed() == ["3"]
    assert seen.page.locator("#count").inner_text() == "1 of 3"
    assert seen.page.locator(".writer .o").first.inner_text() == " it is that we all go"
    seen.page.get_by_label("overlap at least").fill("7")
    assert listed() == []
    assert seen.page.locator(".writer").count() == 0
    seen.page.get_by_label("overlap at least").fill("0")
    seen.page.locator("#order").select_option("ttr")
    assert listed() == ["2", "3"]
    assert seen.page.locator("#context").inner_text() == "a quotation 2"  # still the chosen one
    seen.page.locator("#contexts").press("ArrowUp")
    assert seen.page.locator("#context").inner_text() == "a loop 1"
    seen.page.get_by_role("button", name="Next").press("Enter")
    assert seen.page.locator("#context").inner_text() == "a quotation 2"
    seen.page.get_by_role("button", name="Previous").press("Enter")
    assert seen.page.locator("#context").inner_text() == "a loop 1"
    assert seen.page.url.endswith("#text-2")
    again = opened(browser, seen.page.url)
    assert again.page.locator("#context").inner_text() == "a loop 1"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_accessibility_check_passes(browser: Browser, written: Path, scheme: str) -> None:
    for path in (written, written.parents[1] / "index.html"):
        seen = opened(browser, path, scheme)
        if path == written:
            seen.page.locator("#contexts").select_option("1")
            seen.page.get_by_text("All numbers", exact=True).click()
        found = Axe().run(seen.page)
        assert found.violations_count == 0, found.generate_report()


def test_dark_and_light_can_be_chosen(browser: Browser, written: Path) -> None:
    seen = opened(browser, written)

    def paper() -> str:
        return str(seen.page.evaluate("getComputedStyle(document.body).backgroundColor"))

    assert paper() == "rgb(255, 255, 255)"
    seen.page.get_by_role("button", name="Dark or light").click()
    assert paper() == "rgb(23, 23, 27)"
    seen.page.get_by_role("button", name="Dark or light").click()
    assert paper() == "rgb(255, 255, 255)"


def test_a_narrow_window_is_enough(browser: Browser, written: Path) -> None:
    seen = opened(browser, written, width=360)
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_originals_with_other_settings_of_one_decoding_have_other_names(tmp_path: Path) -> None:
    records = [hostile(number) for number in range(3)]
    for number, made in enumerate(records):
        made["config"]["decode"] = {"name": "top_p", "top_p": (0.8, 0.9, 0.8)[number]}
        for sample in made["samples"]:
            sample["original_continuation"] = continuation(f"it was {number % 2}")
    folder = a_sweep(
        tmp_path / "x", {}, **{f"hyperfitted_{n}": made for n, made in enumerate(records)}
    )
    found = next(page.blocks(SweepRecords.of(folder)))
    assert [writer["name"] for writer in found["writers"] if writer["original"]] == [
        "original, top_p",
        "original, decoding of hyperfitted_1",
    ]


def test_the_index_links_to_every_report(browser: Browser, written: Path) -> None:
    seen = opened(browser, written.parents[1] / "index.html")
    link = seen.page.get_by_role("link")
    assert link.all_inner_texts() == [HOSTILE]
    assert "3 of 6" in seen.page.locator("tbody").inner_text()
    link.click()
    assert seen.page.url == written.as_uri()
    assert seen.page.locator("h1").inner_text() == HOSTILE


def test_the_dashboard_draws_what_is_new_and_serves_it(
    browser: Browser, written: Path, tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    shutil.copytree(written.parents[2] / "sweeps", outputs / "sweeps")
    assert list(draw_anew(outputs)) == [("x", "")]
    assert list(draw_anew(outputs)) == []
    record_ = outputs / "sweeps" / "x" / "hyperfitted_1" / "results.json"
    record_.write_text(json.dumps({"schema_version": 1}))
    (again,) = draw_anew(outputs)
    assert "another version of this software" in again[1]
    with served(outputs / "reports", 0) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        seen = opened(browser, f"http://127.0.0.1:{server.server_port}/")
        seen.page.get_by_role("link").click()
        expect(seen.page.locator("#scatter .scatterlayer .trace")).to_have_count(3)
        assert seen.said == []
        with (
            pytest.raises(UserError, match="cannot be listened on"),
            served(tmp_path, server.server_port),
        ):
            pass
        server.shutdown()


def test_a_quotation_is_underlined_from_five_tokens_on_and_loses_no_text() -> None:
    one = continuation("a b c a b c d e f g")
    for length in (4, 5):
        one["overlap"] = {"length": length, "start": 3, "sequence": 0, "offset": 0}
        found = list(page.stretches(one))
        assert "".join(text for text, _, _ in found) == "".join(one["pieces"])
        quoted = "".join(text for text, _, underlined in found if underlined)
        assert quoted == ("" if length < page.SHORTEST_SHARED else " a b c d e")
