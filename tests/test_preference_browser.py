"""The annotation page in a real browser, served by the command, which is killed and restarted."""

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect

from hyperfitting.preference import cli
from hyperfitting.preference.items import (
    FOLDER,
    JUDGMENTS_FILE,
    Item,
    Shown,
    Task,
    read_task,
    write_task,
)
from hyperfitting.preference.judgments import read_judgments
from hyperfitting.preference.results import SCRIPTS, read_analysis
from hyperfitting.reporting.cells import table_cell
from hyperfitting.reporting.spec import ColumnSpec
from hyperfitting.reporting.sweep_records import load_sweep
from tests.browser import OpenedPage, open_page
from tests.cli import hyperfit
from tests.conftest import only_sweep
from tests.preference_load import annotate
from tests.preference_study import SECONDS, Server, make_study, shown_by_annotator

pytestmark = pytest.mark.server
HOSTILE = "</script><script>window.evil = 1</script><img src=x onerror=alert(1)> {{ 7 * 7 }} & \"' "
Serve = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    servers = []

    def start(task: Task, *arguments: str) -> Server:
        write_task(tmp_path / "study", task)
        servers.append(Server(tmp_path / "study"))
        servers[-1].start(*arguments)
        return servers[-1]

    yield start
    for server in servers:
        if server.process and server.process.poll() is None:
            server.end(signal.SIGKILL)


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    created = browser.new_context()
    created.set_default_timeout(SECONDS * 1000)
    yield created
    created.close()


def opened(browser: Browser, link: str, scheme: str = "light", width: int = 1280) -> OpenedPage:
    """Open a link in a browser of its own."""
    result = open_page(browser, link, scheme, width)
    result.page.set_default_timeout(SECONDS * 1000)
    return result


def item_number(page: Page) -> int:
    """Return the number of the item that is shown."""
    return int(page.locator("h1").inner_text().split()[1])


def side_texts(page: Page) -> tuple[str, str]:
    left, right = (page.locator(f"#{side} .text").text_content() for side in ("left", "right"))
    return left or "", right or ""


def expect_item(page: Page, number: int) -> None:
    expect(page.locator("h1")).to_have_text(re.compile(rf"Item {number} "), timeout=SECONDS * 1000)


# three annotators with known rules: what each chooses, given the item and the texts on both sides


def always_left(item: Item, left: str, right: str) -> Shown:
    return "left"


def by_length(item: Item, left: str, right: str) -> Shown:
    return "left" if len(left) > len(right) else "right" if len(left) < len(right) else "equal"


def careful(item: Item, left: str, right: str) -> Shown:
    """Recognize the text that was written by a person."""
    real = item.first if item.first.origin.side == "reference" else item.second
    return "left" if real.text == left else "right"


RULES = {"lefty": always_left, "longer": by_length, "careful": careful}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep on the debug preset, base and tuned, for which a study has been made."""
    folder = tmp_path_factory.mktemp("sweep")
    texts = ["decode=top_p", "evaluation.n_texts=24", "evaluation.max_new_tokens=[96]"]
    overrides = ["preset=debug", "tuning=none,full", *texts]
    result = hyperfit(folder, "-m", *overrides, "hydra.launcher.workers=1", timeout=1200)
    assert result.returncode == 0, result.stderr
    made = only_sweep(folder)
    arguments = ["make", str(made), "--annotators", *RULES, "--scripts", "--checks", "2"]
    command([*arguments, "--repeats", "0"])
    return made


def command(arguments: list[str]) -> None:
    """Run a subcommand to its successful end."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 0


def test_a_study_from_a_sweep_to_a_table_with_a_kill_in_the_middle(
    browser: Browser, sweep: Path
) -> None:
    task = read_task(sweep / FOLDER)
    server = Server(sweep / FOLDER)
    server.start()
    pages = {name: opened(browser, server.links[name]).page for name in RULES}
    clicked: dict[tuple[str, str], str] = {}

    def judge(name: str, item: Item) -> None:
        shown = item.shown(task.left(name, item))
        texts = side_texts(pages[name])
        assert texts == (shown["left"], shown["right"])
        choice = clicked[name, item.id] = RULES[name](item, *texts)
        pages[name].locator(f"#answer button[value={choice}]").click()

    n_items = len(task.items_of("lefty"))
    for number in range(1, n_items + 1):
        for name, page in pages.items():
            expect_item(page, number)
            item = task.items_of(name)[number - 1]
            if (number, name) != (4, "longer"):
                judge(name, item)
                continue
            server.end(signal.SIGKILL)
            judge(name, item)
            expect(page.locator("#status")).to_contain_text("not saved yet; trying again")
            expect_item(page, number)
            server.start()
    for page in pages.values():
        expect(page.locator("h1")).to_have_text("Finished", timeout=SECONDS * 1000)
    status, stdout, stderr = server.end(signal.SIGINT)
    assert (status, stderr) == (0, "")
    assert f"{len(clicked)} new" in stdout

    judgments = read_judgments(sweep / FOLDER / JUDGMENTS_FILE)
    assert len(judgments) == len(clicked)
    assert {(one.annotator, one.item): one.shown for one in judgments} == clicked
    assert all(0.3 < (one.seconds or 0) < SECONDS * 4 for one in judgments)

    command(["analyze", str(sweep), "--resamples", "200"])
    analysis = read_analysis(sweep / FOLDER)
    assert analysis is not None
    group = analysis.group(SCRIPTS)
    assert group is not None
    annotators = {annotator.name: annotator for annotator in group.annotators}
    assert annotators["lefty"].left_share == 1
    assert "chose left in 100% of 23 preferences" in annotators["lefty"].excluded
    assert not any("chose" in reason for reason in annotators["careful"].excluded)
    assert (annotators["careful"].failed_checks, annotators["careful"].checks) == (0, 2)
    column = ColumnSpec(key="preference", scale=100, format="{:.1f}")
    cell = table_cell(load_sweep(sweep), {"tuning": "full"}, column)
    assert cell.estimate is not None
    assert "3 scripts, alpha " in cell.note
    assert f"n {cell.estimate.n}" in cell.note


def test_keys_answer_and_can_be_switched_off(context: BrowserContext, serve: Serve) -> None:
    task = make_study(["alice"], 8, aspects=("fluency",))
    server = serve(task)
    page = context.new_page()
    page.goto(server.links["alice"])
    first_button = page.locator("#answer button[name=choice]").first

    def press(key: str, number: int) -> None:
        """Press a key once the item may be answered, and wait for an item."""
        expect(first_button).to_be_enabled(timeout=SECONDS * 1000)
        page.keyboard.press(key)
        expect_item(page, number)

    for at, key in enumerate(("1", "2", "3", "ArrowLeft", "ArrowRight")):
        press(key, at + 2)
    # no answers: other keys, a modifier, and in a radio group Enter and the arrows
    for key in ("4", "x", "Enter", "Control+1", "ArrowDown"):
        press(key, 6)
    page.get_by_label("A", exact=True).check()
    press("ArrowRight", 6)
    press("Enter", 6)
    page.wait_for_timeout(300)
    assert page.get_by_label("Equal").is_checked()
    page.locator("#shortcuts").click()
    press("1", 6)
    assert page.locator("#hints").is_hidden()
    page.reload()  # the choice is kept
    press("1", 6)
    page.locator("#shortcuts").click()
    press("3", 7)
    page.locator("#undo").click()
    expect_item(page, 6)
    press("2", 7)
    server.end(signal.SIGTERM)
    shown = [j.shown for j in read_judgments(server.folder / JUDGMENTS_FILE)]
    assert shown == ["left", "equal", "right", "left", "right", "equal"]


def test_a_double_click_answers_one_item(context: BrowserContext, serve: Serve) -> None:
    server = serve(make_study(["alice"]))
    page = context.new_page()
    page.goto(server.links["alice"])
    page.locator("#answer button[value=equal]").dblclick()
    expect_item(page, 2)
    page.wait_for_timeout(600)
    assert item_number(page) == 2


def test_of_two_tabs_the_stale_one_is_told(context: BrowserContext, serve: Serve) -> None:
    server = serve(make_study(["alice"]))
    tab, stale = context.new_page(), context.new_page()
    for page in (tab, stale):
        page.goto(server.links["alice"])
    tab.locator("#answer button[value=left]").click()
    expect_item(tab, 2)
    stale.locator("#answer button[value=right]").click()
    expect(stale.locator("[role=alert]")).to_contain_text("out of date")
    expect_item(stale, 2)
    server.end(signal.SIGINT)
    assert [j.shown for j in read_judgments(server.folder / JUDGMENTS_FILE)] == ["left"]


def test_time_counts_while_the_item_is_visible(context: BrowserContext, serve: Serve) -> None:
    server = serve(make_study(["alice"]))
    page = context.new_page()
    page.goto(server.links["alice"])

    def seconds() -> float:
        return float(page.evaluate("visibleMs() / 1000"))

    def hide(hidden: bool) -> None:
        page.evaluate(
            "(hidden) => { Object.defineProperty(document, 'hidden', {value: hidden, "
            "configurable: true}); document.dispatchEvent(new Event('visibilitychange')); }",
            hidden,
        )

    page.wait_for_timeout(300)
    hide(True)
    before = seconds()
    page.wait_for_timeout(500)
    assert seconds() == before  # nothing while it is hidden
    hide(False)
    page.wait_for_timeout(100)
    assert seconds() > before
    page.get_by_role("link", name="Pause").click()
    page.locator("#resume").click()
    expect_item(page, 1)
    assert seconds() > before  # of all views of the item
    page.locator("#answer button[value=left]").click()
    expect_item(page, 2)
    page.wait_for_load_state()
    assert page.evaluate("sessionStorage.length") <= 1  # that of the new item alone


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible_and_fits(
    browser: Browser, serve: Serve, scheme: str, width: int
) -> None:
    words = "a_long_word_" * 9
    task = make_study(["alice"], 2, form="fine", aspects=("fluency", "coherence"), words=words)
    server = serve(task)
    page = opened(browser, server.links["alice"], scheme, width).page

    def check() -> None:
        result = Axe().run(page)
        assert result.violations_count == 0, result.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    def enabled() -> None:
        expect(page.locator("#answer button[value=left]")).to_be_enabled()

    enabled()
    check()
    page.locator("#answer button[value=both_bad]").click()
    expect_item(page, 2)
    page.goto(page.url.partition("?")[0] + "?stale")
    enabled()
    check()
    page.get_by_role("link", name="Pause").click()
    expect(page.locator("h1")).to_have_text("Paused")
    check()
    page.locator("#resume").click()
    page.locator("#answer button[value=left]").click()
    expect(page.locator("h1")).to_have_text("Finished")
    check()
    page.goto(f"http://127.0.0.1:{server.port}/")
    check()


def test_hostile_texts_are_shown_literally_and_nothing_else_is_requested(
    browser: Browser, serve: Serve
) -> None:
    server = serve(make_study(["alice"], words=HOSTILE))
    result = opened(browser, server.links["alice"])
    page = result.page
    assert page.evaluate("window.evil") is None
    assert all(HOSTILE.strip() in text for text in side_texts(page))
    assert page.locator("img, iframe, main script").count() == 0
    page.locator("#answer button[value=left]").click()
    expect_item(page, 2)
    assert result.messages == []
    origin = f"http://127.0.0.1:{server.port}/"
    assert all(url.startswith((origin, "data:")) for url in result.requests)


def test_it_works_without_javascript(browser: Browser, serve: Serve) -> None:
    server = serve(make_study(["alice"]))
    plain = browser.new_context(java_script_enabled=False)
    page = plain.new_page()
    page.set_default_timeout(SECONDS * 1000)
    page.goto(server.links["alice"])
    page.locator("#answer button[value=right]").click()
    expect_item(page, 2)
    page.locator("#undo").click()
    expect_item(page, 1)
    plain.close()


def test_forwarded_headers_are_read_from_trusted_proxies_alone(serve: Serve) -> None:
    server = serve(make_study(["alice"]), "--public-url", "http://127.0.0.1:1/study")
    forwarded = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.7"}

    def cookie() -> str:
        path = "/join/" + server.links["alice"].rpartition("/")[2]  # the proxy leaves out its own
        url = f"http://127.0.0.1:{server.port}{path}"
        return httpx2.get(url, headers=forwarded, timeout=SECONDS).headers["set-cookie"]

    assert server.links["alice"].startswith("http://127.0.0.1:1/study/join/")
    untrusted = cookie()
    assert "Path=/study/a/" in untrusted
    assert "Secure" not in untrusted
    server.end(signal.SIGKILL)
    server.start("--public-url", "http://127.0.0.1:1/study", "--trusted-proxies", "127.0.0.0/8")
    assert "Secure" in cookie()


def test_under_load_no_answer_is_lost_or_doubled(serve: Serve) -> None:
    names = [f"annotator{number}" for number in range(10)]
    task = make_study(names, n_items=20)
    server = serve(task)
    load = annotate(server.links, rate=20, seconds=10)
    status, _, stderr = server.end(signal.SIGINT)
    assert (status, stderr, load.errors) == (0, "", [])
    assert shown_by_annotator(server.folder, task) == load.judged
    assert sum(map(len, load.judged.values())) >= 80
