"""The browser that is installed, and what a page in it says and requests."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.programs import find_program

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass
class OpenedPage:
    """A page, with its console messages and requests since it was opened."""

    page: Page
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser for the tests of a file: its event loop would break those of others."""
    path = find_program(*_NAMES)
    expect.set_options(timeout=30_000)  # as navigation has it: other tests keep the cores busy
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path)
        yield launched
        launched.close()


def open_page(
    browser: Browser, path: Path | str, scheme: str = "light", width: int = 1280
) -> OpenedPage:
    """Open a page and run its script to its end."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    opened = OpenedPage(page)
    page.on("console", lambda message: opened.messages.append(message.text))
    page.on("pageerror", lambda error: opened.messages.append(str(error)))
    page.on("dialog", lambda dialog: (opened.messages.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: opened.requests.append(request.url))
    page.goto(path if isinstance(path, str) else path.as_uri())
    return opened
