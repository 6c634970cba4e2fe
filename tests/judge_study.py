"""A study for a model as judge, and the rules by which a scripted judge answers."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hyperfitting.preference.cli import main
from hyperfitting.preference.items import read_task, write_task
from hyperfitting.preference.judge_reliability import report_on_judges
from hyperfitting.preference.judge_report import JudgeReport
from hyperfitting.preference.judge_server import Budget, ServerJudge
from tests.awkward_study import make_item, make_task
from tests.openai_server import OpenAIServer, serving

KEY = "sk-secret-0123456789"
_TEXTS = re.compile(r"<continuation_(\w)>\n(.*?)\n</continuation", re.S)


def always_a(_: str) -> str:
    return '{"choice": "A"}'


def texts_in(prompt: str) -> dict[str, str]:
    return dict(_TEXTS.findall(prompt))


def longer(prompt: str) -> str:
    """Prefer the longer text, whatever it says."""
    lengths = {side: len(text) for side, text in texts_in(prompt).items()}
    return json.dumps({"choice": max(lengths, key=lambda side: lengths[side])})


def careful(prompt: str) -> str:
    """Prefer the text that says it is good; a tie if both or none do."""
    good = [side for side, text in texts_in(prompt).items() if "good" in text]
    return json.dumps({"choice": good[0] if len(good) == 1 else "equal"})


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with serving(always_a) as server:
        yield server


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path)


def write_study(folder: Path) -> Path:
    """Write six items; the run's text is the longer one in five, and the good one in two."""
    items = [
        make_item(n, "good" * (n < 2) + "long" * (n + 1), "good" * (n > 3) + "other")
        for n in range(6)
    ]
    write_task(folder, make_task(items))
    return folder


def judge_of(study: Path, server: OpenAIServer, **fields: Any) -> ServerJudge:
    question = read_task(study).question
    options: dict[str, Any] = {"budget": Budget(), "concurrency": 1} | fields
    return ServerJudge("model", server.url, question, **options)


def command(study: Path, server: OpenAIServer, *more: str) -> list[str]:
    return ["judge", str(study), "--model", "model", "--base-url", server.url, *more]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return int(end.value.code or 0)


def report_of(study: Path, name: str = "model") -> JudgeReport:
    return report_on_judges(study).judges[name]
