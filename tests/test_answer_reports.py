"""Answers to open questions wherever a run's texts are shown: pages, terminal, W&B."""

import io
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect
from rich.console import Console

from hyperfitting.metrics.estimate import Difference, Estimate
from hyperfitting.record.schema import Record
from hyperfitting.reporting.repetition_highlight import texts_page
from hyperfitting.reporting.report import write_report
from hyperfitting.reporting.spec import ColumnSpec, TableSpec
from hyperfitting.reporting.sweep_records import load_sweep
from hyperfitting.reporting.tables import build_table
from hyperfitting.reporting.terminal import outcome
from hyperfitting.reporting.texts import texts_by_context
from hyperfitting.tracking.payload import media, summary
from tests.browser import browser, open_page
from tests.records import make_chat, make_record, make_samples, make_slice, write_sweep

__all__ = ["browser"]

HOSTILE = "</script><script>window.evil = 1</script><img src=x onerror=alert(1)> {{ 7 * 7 }}"
LOOP = "so it is and so it is and so it is"
ANSWERS = {
    f"Why {HOSTILE}?": (f"Because {HOSTILE}", LOOP),
    "How?": ("By this and that", "By that"),
}


def answered(seed: int = 0) -> Record:
    """Return the record of a run on three texts, with answers to two questions."""
    chat = make_chat(
        ANSWERS,
        tuned={"gen/ttr": Estimate(0.75, (0.7, 0.8), 2), "gen/n_tokens": Estimate(6, (4, 8), 2)},
        base={"gen/ttr": Estimate(0.5, (0.4, 0.6), 2), "gen/n_tokens": Estimate(9, None, 2)},
        difference={"gen/ttr": Difference(0.25 + seed, (0.1, 0.4), 2, 0.03)},
        per_text={
            "tuned": {"gen/ttr": [0.9, 1.0], "gen/rep_2": [0.1, 0.0], "gen/n_tokens": [9, 4]},
            "base": {"gen/ttr": [0.4, 1.0]},
        },
    )
    ttr: list[float | None] = [0.6] * 3
    return make_record(
        [make_slice({"gen/ttr": Estimate(0.6, None, 3)}, dataset=None)],
        make_samples(3),
        per_text={"tuned": {"gen/ttr": ttr, "gen/rep_2": [0.5, 0.0, 0.0]}},
        chat=chat,
    )


@pytest.fixture(scope="module")
def report_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers") / "sweeps" / "x"
    records = {f"tuned_{seed}": answered(seed) for seed in range(2)}
    return write_report(write_sweep(folder, {}, records)) / "index.html"


@pytest.mark.server
def test_answers_are_browsed_as_continuations_of_their_questions(
    browser: Browser, report_page: Path
) -> None:
    opened = open_page(browser, report_page)
    page = opened.page
    assert page.locator("#dataset option").all_inner_texts() == ["all", "news", "chat"]
    page.locator("#dataset").select_option("chat")
    expect(page.locator("#contexts option")).to_have_count(2)
    assert page.locator("#context").inner_text() == f"Why {HOSTILE}?"
    heads = page.locator(".continuation h3").all_inner_texts()
    assert heads == ["base, greedy", "tuned_0", "tuned_1"]  # and no reference
    base, tuned = (page.locator(".continuation").nth(i) for i in (0, 1))
    assert base.locator(".text").inner_text().strip() == LOOP
    repeated = "".join(base.locator(".r1, .r2, .r3, .r4").all_inner_texts())
    assert repeated == " so it is and so it is"
    assert tuned.locator(".text").inner_text().strip() == f"Because {HOSTILE}"
    assert "length of an answer 9 tokens" in tuned.locator(".note").inner_text()
    page.get_by_label("repeated 2-grams at least").fill("0.1")
    expect(page.locator("#contexts option")).to_have_count(1)
    assert page.evaluate("window.evil") is None
    assert opened.messages == []


@pytest.mark.server
def test_the_page_compares_both_models_answers_with_intervals(
    browser: Browser, report_page: Path
) -> None:
    page = open_page(browser, report_page).page
    rows = [row.split("\t") for row in page.locator("#answers tbody tr").all_inner_texts()]
    ttr = ["type-token ratio", "0.500 [0.400, 0.600]", "0.750 [0.700, 0.800]"]
    assert [cell.strip() for cell in rows[0]] == [
        "tuned_0", *ttr, "+0.250 [+0.100, +0.400]", "0.030",
    ]  # fmt: skip
    assert [cell.strip() for cell in rows[3]] == [
        "tuned_1", "length of an answer, tokens", "9", "6 [4, 8]", "", "",
    ]  # fmt: skip
    result = Axe().run(page)
    assert result.violations_count == 0, result.generate_report()


def test_answers_follow_the_contexts_of_a_sweep(tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path / "x", {}, {"tuned_0": answered()}))
    *_, hostile, last = texts_by_context(sweep)
    assert [texts.context for texts in (hostile, last)] == list(ANSWERS)
    assert last.reference == ""
    shown = {c.name: (c.text.strip(), c.metrics) for c in last.continuations}
    assert shown == {
        "base, greedy": ("By that", [("type-token ratio", "1.000")]),
        "tuned_0": (
            "By this and that",
            [
                ("type-token ratio", "1.000"),
                ("repeated 2-grams", "0.000"),
                ("length of an answer", "4 tokens"),
            ],
        ),
    }


def test_the_best_answers_of_a_table_are_found_by_pairing_questions(tmp_path: Path) -> None:
    """The intervals of both runs overlap; on each question the same one is better."""
    records = {}
    for seed, gain in enumerate((0.0, 0.01)):
        ttr = [0.1 * i + gain for i in range(9)]
        chat = make_chat(
            {f"question {i}": ("a b", "a b") for i in range(9)},
            tuned={"gen/ttr": Estimate(float(np.mean(ttr)), (0.2, 0.6), 9)},
            per_text={"tuned": {"gen/ttr": list(ttr)}},
        )
        records[f"tuned_{seed}"] = make_record([make_slice({})], make_samples(3), chat=chat)
    sweep = load_sweep(write_sweep(tmp_path / "x", {}, records))
    column = ColumnSpec(key="gen/ttr", dataset="chat")
    table = build_table(sweep, "t", TableSpec(rows=["system", "seed"], columns={"TTR": column}))
    best = [row.labels["seed"] for row in table.rows if row.best]
    assert best == ["1"]


def test_a_run_without_answers_has_no_place_for_them(tmp_path: Path) -> None:
    without = answered().model_copy(update={"chat": None})
    page = write_report(write_sweep(tmp_path / "x", {}, {"tuned_0": without})) / "index.html"
    assert "Answers to questions" not in page.read_text("utf-8")
    assert not [key for key in summary(without) if "chat" in key]
    assert "answers" not in media(without)


def test_the_texts_of_a_run_end_with_its_answers() -> None:
    page = texts_page(answered())
    assert page.count("<tr>") == 1 + 3 + 2
    assert page.index("How?") > page.index("Why &lt;/script&gt;") > page.index("text 2")
    assert "<script" not in page


def test_the_terminal_compares_both_models_answers() -> None:
    file = io.StringIO()
    Console(file=file, width=120).print(outcome(answered(), color=False))
    _, _, text = file.getvalue().partition("answers to 2 open questions, 16 tokens at most")
    for cell in ("length of an answer, tokens", "0.750 [0.700, 0.800]", "+0.250 [+0.100, +0.400]"):
        assert cell in text


def test_wandb_receives_both_models_answers_and_their_metrics() -> None:
    logged = summary(answered())
    assert (logged["chat/gen/ttr"], logged["chat/gen/ttr_low"]) == (0.75, 0.7)
    assert (logged["base/chat/gen/n_tokens"], logged["chat/gen/n_tokens_high"]) == (9, 8)
    assert logged["difference/chat/gen/ttr"] == 0.25
    assert logged["difference/chat/gen/ttr_p"] == 0.03
    assert logged["gen/ttr"] == 0.6
    table = media(answered())["answers"]()
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.data]
    assert [row["question"] for row in rows] == list(ANSWERS)
    assert rows[0] == {
        "question": f"Why {HOSTILE}?", "base": f" {LOOP}", "tuned": f" Because {HOSTILE}",
        "gen/ttr": 0.9, "gen/rep_2": 0.1, "gen/n_tokens": 9, "base/gen/ttr": 0.4,
    }  # fmt: skip
