"""Scripted annotators who answer at a steady rate, retry, and undo: a load of known judgments."""

import asyncio
import random
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx2

from tests.preference_study import CHOICES, SECONDS, Parsed

RETRIED, UNDONE = 0.1, 0.05
"""Shares of the answers that are sent twice, and that are undone and given again."""


@dataclass
class Load:
    """What was sent, and how long each answer took."""

    seconds: list[float] = field(default_factory=list)
    """From when a request was due, so that one that waits for the one before counts as slow."""
    judged: dict[str, list[str]] = field(default_factory=dict)
    """Choices of each annotator, in order."""
    errors: list[str] = field(default_factory=list)


class _Annotator:
    def __init__(self, name: str, link: str, load: Load) -> None:
        self._link, self._load = link, load
        self._client = httpx2.AsyncClient(timeout=SECONDS)
        self._random = random.Random(name)
        self._judged = load.judged.setdefault(name, [])
        self._page, self._html = "", ""

    async def work(self, start: float, interval: float, n_answers: int) -> None:
        """Answer an item every ``interval`` seconds from ``start`` on."""
        async with self._client:
            response = await self._client.get(self._link, follow_redirects=True)
            self._page, self._html = str(response.url), response.text
            for number in range(n_answers):
                due = start + number * interval
                await asyncio.sleep(due - time.monotonic())
                await self._answer(due)

    async def _answer(self, due: float) -> None:
        choice = self._random.choice(CHOICES)
        fields = Parsed(self._html).forms["judge"] | {"choice": choice}
        copies = 2 if self._random.random() < RETRIED else 1
        sent = [self._request("judge", due, fields) for _ in range(copies)]
        await asyncio.gather(*sent)  # a retry while the first is on its way
        self._judged.append(choice)
        await self._request("", time.monotonic())
        if self._random.random() < UNDONE:
            await self._request("undo", time.monotonic(), Parsed(self._html).forms["undo"])
            self._judged.pop()
            await self._request("", time.monotonic())

    async def _request(
        self, action: str, due: float, fields: Mapping[str, str] | None = None
    ) -> None:
        url = self._page + action
        if fields is None:
            response = await self._client.get(url)
            self._html = response.text
        else:
            response = await self._client.post(url, data=dict(fields))
        self._load.seconds.append(time.monotonic() - due)
        if response.status_code != (200 if fields is None else 303):
            self._load.errors.append(f"{action} {response.status_code}")


async def _run(links: Mapping[str, str], rate: float, seconds: float) -> Load:
    load = Load()
    interval = 2 * len(links) / rate  # an answer is two requests
    start = time.monotonic() + 2  # everybody has opened their link
    annotators = [_Annotator(name, link, load) for name, link in links.items()]
    await asyncio.gather(
        *(
            annotator.work(
                start + interval * number / len(links), interval, int(seconds / interval)
            )
            for number, annotator in enumerate(annotators)
        )
    )
    return load


def annotate(links: Mapping[str, str], rate: float, seconds: float) -> Load:
    """Have annotators answer items at a rate of requests a second in all, for some time.

    Args:
        links: of the annotators, by name; each has more items than it will answer.
        rate: requests a second; retries and undone answers come on top.
        seconds: how long.
    """
    with ThreadPoolExecutor(1) as pool:  # in this thread Playwright may run an event loop
        return pool.submit(asyncio.run, _run(links, rate, seconds)).result()
