"""A small preference study, without a sweep, its server, and a scripted annotator of its page."""

import re
import subprocess
import sys
from collections.abc import Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx2

from hyperfitting.preference.items import (
    JUDGMENTS_FILE,
    Annotator,
    Aspect,
    Form,
    Item,
    Origin,
    Question,
    Shown,
    Task,
    Text,
)
from hyperfitting.preference.judgments import read_judgments

CHOICES: tuple[Shown, ...] = ("left", "equal", "right")
SECONDS = 120
"""How long anything may take on a busy machine."""


def make_item(number: int, words: str = "", **fields: Any) -> Item:
    """Return an item whose two texts differ in length; ``words`` begin each of its texts."""
    return Item(
        **{
            "dataset": "hidden-dataset",
            "length": 96,
            "context": f"{words}Once there was a number {number}",
            "first": Text(
                text=f"{words}a text {number}" + " and on" * (number % 3),
                origin=Origin(run="hidden-run", side="tuned", sample=number),
            ),
            "second": Text(
                text=f"{words}another text {number}" + " and so" * (number % 2),
                origin=Origin(run="hidden-run", side="reference", sample=number),
            ),
        }
        | fields
    )


def make_study(
    annotators: Sequence[str] = ("alice", "bob"),
    n_items: int = 6,
    form: Form = "p1",
    aspects: tuple[Aspect, ...] = (),
    words: str = "",
) -> Task:
    """Return a study in which every annotator has all items, each in another order."""
    items = [make_item(number, words) for number in range(n_items)]
    ids = [item.id for item in items]
    return Task(
        sweep="hidden-sweep",
        question=Question(
            form=form,
            wording=f"{words}Which text is better?",
            guidelines=f"{words}Read both.\nThen choose.",
            aspects=aspects,
        ),
        seed=0,
        votes=len(annotators),
        texts={},
        annotators={
            name: Annotator(kind="script", items=tuple(ids[at % n_items :] + ids[: at % n_items]))
            for at, name in enumerate(annotators)
        },
        items=tuple(items),
    )


class Parsed(HTMLParser):
    """What stands in a page: hidden fields by action of their form, texts by id, inline code."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.forms: dict[str, dict[str, str]] = {}
        self.tags: list[str] = []
        self.code: dict[str, list[str]] = {"script": [], "style": []}
        self.attributes: list[tuple[str, str]] = []
        self._action, self._tag = "", ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += values.items()
        self._tag = tag
        if tag == "form":
            self._action = values["action"]
            self.forms[self._action] = {}
        if tag == "input" and values["type"] == "hidden":
            self.forms[self._action][values["name"]] = values["value"]

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag in self.code:
            self.code[self._tag].append(data)


def shown_texts(html: str) -> list[str]:
    """Return the context and the two texts that a page shows."""
    return [
        unescape(text) for text in re.findall(r'<p class="text" dir="auto">(.*?)</p>', html, re.S)
    ]


class ScriptedAnnotator:
    """An annotator of the page without a browser.

    Args:
        client: of the server, alone this annotator's.
        link: path of the link.
    """

    def __init__(self, client: httpx2.Client, link: str) -> None:
        self.client = client
        response = client.get(link, follow_redirects=False)
        assert response.status_code == 303, response.text
        self.page = str(response.url.join(response.headers["location"]))
        self.html = ""
        self.load()

    def load(self) -> httpx2.Response:
        """Load the page."""
        response = self.client.get(self.page)
        self.html = response.text
        return response

    def fields(self, action: str) -> dict[str, str]:
        """Return the hidden fields of one of the page's forms; {} if it has no such form."""
        return Parsed(self.html).forms.get(action, {})

    def send(self, action: str, **fields: str) -> httpx2.Response:
        """Send one of the forms, as it is in the page that was loaded last."""
        url = httpx2.URL(self.page).join(action)
        data = self.fields(action) | fields
        return self.client.post(url, data=data, follow_redirects=False)

    def judge(self, choice: str, **fields: str) -> httpx2.Response:
        """Answer the item that is shown; load the next."""
        response = self.send("judge", choice=choice, **fields)
        self.load()
        return response


class Server:
    """`hyperfit-preference serve` of a study in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.links: dict[str, str] = {}
        self.port = 0
        self.process: subprocess.Popen[str] | None = None

    def start(self, *arguments: str) -> None:
        """Start it, at the port that it had before."""
        command = ["-m", "hyperfitting.preference.cli", "serve", str(self.folder), *arguments]
        self.process = subprocess.Popen(
            [sys.executable, *command, "--port", str(self.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        for line in self.process.stdout:
            name, _, value = line.strip().partition(" ")
            if name == "listens":
                self.port = int(value.rpartition(":")[2])
            if "/join/" in value:
                self.links[name] = value.strip()
            if "Ctrl+C ends" in line:
                return
        raise AssertionError(self.process.stderr and self.process.stderr.read())

    def end(self, signum: int) -> tuple[int, str, str]:
        """Send a signal; return the exit status and what it printed at the end."""
        assert self.process
        self.process.send_signal(signum)
        stdout, stderr = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, stdout, stderr


def shown_by_annotator(folder: Path, task: Task) -> dict[str, list[str]]:
    """Return the choices that were exported, in the order of each annotator's items.

    Raises:
        AssertionError: an item has two judgments, or one was skipped.
    """
    judgments = read_judgments(folder / JUDGMENTS_FILE)
    shown = {(one.annotator, one.item): one.shown for one in judgments}
    assert len(shown) == len(judgments)
    choices = {}
    for name, annotator in task.annotators.items():
        judged = [item for item in annotator.items if (name, item) in shown]
        assert judged == list(annotator.items[: len(judged)])
        choices[name] = [shown[name, item] for item in judged]
    return choices
