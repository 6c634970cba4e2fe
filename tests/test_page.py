"""The page of a report in a real browser: charts, filters, accessibility, and hostile texts."""

import json
import shutil
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from hyperfitting.errors import UserError
from hyperfitting.metrics.estimate import Estimate
from hyperfitting.record.files import RECORD_FILE
from hyperfitting.record.schema import Record, Sample
from hyperfitting.record.texts import Continuation
from hyperfitting.reporting.report import write_report
from hyperfitting.reporting.serve import serving, update_reports
from hyperfitting.reporting.sweep_records import load_sweep
from hyperfitting.reporting.texts import MIN_OVERLAP, highlighted_spans, texts_by_context
from tests.browser import open_page
from tests.records import (
    make_config,
    make_continuation,
    make_record,
    make_sample,
    make_slice,
    ttr_record,
    write_sweep,
)

HOSTILE = "</script><script>window.evil = 1</script><img src=x onerror=alert(1)> {{ 7 * 7 }} & \"'"
LOOP = "again and again and again and again"


def samples(seed: int) -> list[Sample]:
    """Return three texts of two datasets: a hostile one, a loop, and one with an overlap."""
    continuations = {
        HOSTILE: make_continuation(f"{HOSTILE} {seed}"),
        "a loop": make_continuation(f"{LOOP} {seed}"),
        "an overlap": make_continuation(f"so it is that we all go home {seed}", overlap=(6, 1)),
    }
    datasets = (HOSTILE, "news", "news")
    return [
        make_sample(
            tuned,
            make_continuation(f"as it was {number}"),
            dataset=dataset,
            context=f"{name} {number}",
            reference=name,
        )
        for number, (dataset, (name, tuned)) in enumerate(
            zip(datasets, continuations.items(), strict=True)
        )
    ]


def hostile_record(
    seed: int, base: Continuation | None = None, config: dict[str, Any] | None = None
) -> Record:
    """Return a record in which hostile texts stand wherever data or a model can put one."""
    shown = samples(seed)
    if base is not None:
        shown = [sample.model_copy(update={"base": base}) for sample in shown]
    validation = {"val/loss": 3.0 + seed, "val/entropy": 3.0 + seed, "gen/ttr": 0.5}
    metrics = {
        "gen/ttr": Estimate(0.5, (0.4, 0.6), 3),
        "val/perplexity": Estimate(30.0 + seed, (29.0, 40.0), 3),
    }
    ttr: list[float | None] = [0.9, 0.2, 0.5]
    return make_record(
        [make_slice(metrics)],
        shown,
        per_text={
            "tuned": {
                "gen/ttr": ttr,
                "gen/rep_2": [0.0, 0.8, 0.1],
                "gen/dataset_overlap": [0, 1, 6],
            },
            "base": {"gen/ttr": ttr},
        },
        history=[
            {"epoch": epoch, "step": epoch, "train/loss": 1 / epoch, **validation}
            for epoch in (1, 2)
        ],
        notes=[HOSTILE],
        device=HOSTILE,
        config=config or make_config(dataset={"name": f"{HOSTILE} {seed}"}),
    )


@pytest.fixture(scope="module")
def report_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a sweep of three runs that have finished and three that have not."""
    report = {
        "title": HOSTILE,
        "about": HOSTILE,
        "tables": {"main": {"rows": ["system", "seed"], "columns": {HOSTILE: {"key": "gen/ttr"}}}},
        "figures": {"curve": {"kind": "curves", "series": ["train/loss"], "caption": HOSTILE}},
    }
    folder = write_sweep(
        tmp_path_factory.mktemp("reports") / "sweeps" / "x",
        report,
        {f"tuned_{seed}": hostile_record(seed) for seed in range(3)},
        command=["hyperfit", HOSTILE],
    )
    return write_report(folder) / "index.html"


@pytest.mark.server
def test_charts_are_drawn_without_requests_or_errors(browser: Browser, report_page: Path) -> None:
    opened = open_page(browser, report_page)
    for key in ("train/loss", "val/loss", "gen/ttr", "val/entropy"):
        expect(opened.page.locator(f'[data-curve="{key}"] .scatterlayer .trace')).to_have_count(3)
    expect(opened.page.locator("#scatter .scatterlayer .trace")).to_have_count(3)
    expect(opened.page.locator("#figures img")).to_have_count(1)
    assert opened.page.evaluate("document.querySelector('#figures img').naturalWidth") > 100
    assert [url for url in opened.requests if not url.startswith("data:")] == [report_page.as_uri()]
    assert opened.messages == []


@pytest.mark.server
def test_hostile_texts_are_shown_literally(browser: Browser, report_page: Path) -> None:
    opened = open_page(browser, report_page)
    assert opened.page.evaluate("window.evil") is None
    assert opened.page.title() == HOSTILE
    for place in ("h1", "header p >> nth=0", "figcaption", "#provenance li", "#context"):
        assert HOSTILE in opened.page.locator(place).first.inner_text()
    assert f" {HOSTILE} 1" in opened.page.locator(".continuation .text").nth(2).inner_text()
    assert opened.page.locator("main script, main img:not(#figures img), iframe").count() == 0
    assert opened.messages == []


@pytest.mark.server
def test_runs_and_base_models_are_shown_or_hidden(browser: Browser, report_page: Path) -> None:
    opened = open_page(browser, report_page)
    heads = opened.page.locator(".continuation h3")
    tuned = ["tuned_0", "tuned_1", "tuned_2"]
    assert heads.all_inner_texts() == ["base, greedy", *tuned, "reference"]
    opened.page.get_by_label("tuned_1").uncheck()
    assert heads.all_inner_texts() == ["base, greedy", "tuned_0", "tuned_2", "reference"]
    expect(opened.page.locator("#scatter .scatterlayer .trace")).to_have_count(2)
    opened.page.get_by_label("base models").uncheck()
    assert heads.first.inner_text() == "tuned_0"
    opened.page.get_by_role("button", name="None", exact=True).click()
    assert heads.all_inner_texts() == ["reference"]
    opened.page.get_by_role("button", name="All", exact=True).click()
    assert heads.count() == 4
    assert opened.page.get_by_label("base_0").is_disabled()


@pytest.mark.server
def test_contexts_are_filtered_sorted_and_reached_by_keyboard(
    browser: Browser, report_page: Path
) -> None:
    opened = open_page(browser, report_page)
    contexts = opened.page.locator("#contexts option")

    def listed() -> list[str]:
        return [text.partition(" ")[0] for text in contexts.all_inner_texts()]

    assert listed() == ["1", "2", "3"]
    opened.page.locator("#dataset").select_option("news")
    assert listed() == ["2", "3"]
    opened.page.locator("#order").select_option("gen/dataset_overlap")
    assert listed() == ["3", "2"]
    opened.page.get_by_label("repeated 2-grams at least").fill("0.5")
    assert listed() == ["2"]
    opened.page.get_by_label("repeated 2-grams at least").fill("0")
    opened.page.get_by_label("overlap at least").fill("6")
    assert listed() == ["3"]
    assert opened.page.locator("#count").inner_text() == "1 of 3"
    assert opened.page.locator(".continuation .o").first.inner_text() == " it is that we all go"
    opened.page.get_by_label("overlap at least").fill("7")
    assert listed() == []
    assert opened.page.locator(".continuation").count() == 0
    opened.page.get_by_label("overlap at least").fill("0")
    opened.page.locator("#order").select_option("gen/ttr")
    assert listed() == ["2", "3"]
    assert opened.page.locator("#context").inner_text() == "an overlap 2"  # the selection is kept
    opened.page.locator("#contexts").press("ArrowUp")
    assert opened.page.locator("#context").inner_text() == "a loop 1"
    opened.page.get_by_role("button", name="Next").press("Enter")
    assert opened.page.locator("#context").inner_text() == "an overlap 2"
    opened.page.get_by_role("button", name="Previous").press("Enter")
    assert opened.page.locator("#context").inner_text() == "a loop 1"
    assert opened.page.url.endswith("#text-2")
    linked = open_page(browser, opened.page.url)
    assert linked.page.locator("#context").inner_text() == "a loop 1"


@pytest.mark.server
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_accessibility_check_passes(browser: Browser, report_page: Path, scheme: str) -> None:
    for path in (report_page, report_page.parents[1] / "index.html"):
        opened = open_page(browser, path, scheme)
        if path == report_page:
            opened.page.locator("#contexts").select_option("1")
            opened.page.get_by_text("All numbers", exact=True).click()
        result = Axe().run(opened.page)
        assert result.violations_count == 0, result.generate_report()


@pytest.mark.server
def test_dark_and_light_can_be_chosen(browser: Browser, report_page: Path) -> None:
    opened = open_page(browser, report_page)

    def background() -> str:
        return str(opened.page.evaluate("getComputedStyle(document.body).backgroundColor"))

    assert background() == "rgb(255, 255, 255)"
    opened.page.get_by_role("button", name="Dark or light").click()
    assert background() == "rgb(23, 23, 27)"
    opened.page.get_by_role("button", name="Dark or light").click()
    assert background() == "rgb(255, 255, 255)"


@pytest.mark.server
def test_the_page_fits_a_narrow_window(browser: Browser, report_page: Path) -> None:
    opened = open_page(browser, report_page, width=360)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_base_models_with_other_settings_of_one_decoding_have_other_names(tmp_path: Path) -> None:
    records = {}
    for seed in range(3):
        decode = {"name": "top_p", "top_p": (0.8, 0.9, 0.8)[seed]}
        base = make_continuation(f"it was {seed % 2}")
        config = make_config(decode=decode)
        records[f"tuned_{seed}"] = hostile_record(seed, base, config)
    folder = write_sweep(tmp_path / "x", {}, records)
    texts = next(texts_by_context(load_sweep(folder)))
    assert [c.name for c in texts.continuations if c.run is None] == [
        "base, top_p",
        "base, decoding of tuned_1",
    ]


@pytest.mark.server
def test_the_index_links_to_every_report(browser: Browser, report_page: Path) -> None:
    opened = open_page(browser, report_page.parents[1] / "index.html")
    link = opened.page.get_by_role("link")
    assert link.all_inner_texts() == [HOSTILE]
    assert "3 of 6" in opened.page.locator("tbody").inner_text()
    link.click()
    assert opened.page.url == report_page.as_uri()
    assert opened.page.locator("h1").inner_text() == HOSTILE


@pytest.mark.server
def test_the_dashboard_draws_outdated_reports_and_serves_them(
    browser: Browser, report_page: Path, tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    shutil.copytree(report_page.parents[2] / "sweeps", outputs / "sweeps")
    assert list(update_reports(outputs)) == [("x", "")]
    assert list(update_reports(outputs)) == []
    record_file = outputs / "sweeps" / "x" / "tuned_1" / RECORD_FILE
    record_file.write_text(json.dumps({"schema_version": 1}))
    ((_, error),) = update_reports(outputs)
    assert "another version of this software" in error
    with serving(outputs / "reports", 0) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        opened = open_page(browser, f"http://127.0.0.1:{server.server_port}/")
        opened.page.get_by_role("link").click()
        expect(opened.page.locator("#scatter .scatterlayer .trace")).to_have_count(3)
        assert opened.messages == []
        with (
            pytest.raises(UserError, match="cannot be listened on"),
            serving(tmp_path, server.server_port),
        ):
            pass
        server.shutdown()


def test_an_overlap_is_underlined_from_five_tokens_on_and_no_text_is_lost() -> None:
    words = "a b c a b c d e f g"
    for length in (4, 5):
        continuation = make_continuation(words, overlap=(length, 3))
        spans = list(highlighted_spans(continuation))
        assert "".join(text for text, _, _ in spans) == "".join(continuation.token_texts)
        overlap = "".join(text for text, _, underlined in spans if underlined)
        assert overlap == ("" if length < MIN_OVERLAP else " a b c d e")


def test_texts_with_equal_contexts_are_each_shown_with_all_runs(tmp_path: Path) -> None:
    """The references of two runs differ in length if their continuations do."""
    base, tuned = make_continuation("on it went"), make_continuation("on and on")
    records = {}
    for number, references in enumerate(
        (["the first", "the second"], ["the first one", "the sec"])
    ):
        samples = [make_sample(tuned, base, reference=reference) for reference in references]
        records[f"tuned_{number}"] = ttr_record([0.1, 0.2], 0.5, samples=samples)
    shown = list(texts_by_context(load_sweep(write_sweep(tmp_path / "x", {}, records))))
    assert [texts.reference for texts in shown] == ["the first one", "the second"]
    assert [len(texts.continuations) for texts in shown] == [3, 3]  # base once, and both tuned


@pytest.mark.server
def test_the_contact_sheet_shows_every_figure_at_its_printed_size(
    browser: Browser, report_page: Path
) -> None:
    opened = open_page(browser, report_page.parent.parent / "figures.html")
    images = opened.page.locator("section#x img")
    expect(images).to_have_count(1)
    width = opened.page.evaluate("document.querySelector('img').naturalWidth")
    assert 3.0 < width / 96 < 3.6  # a paper's column, in inches
    assert opened.messages == []
