"""`hyperfit-preference judge`: a model judges what people judge, and how reliable it is.

The model gets the items and the words that people get, each item in both orders. Its answers are
kept as they come and never asked for twice: the same command resumes. Its judgments join those of
people in `judgments.jsonl`, and `judge.json` says how reliable it is.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from hyperfitting import formatting
from hyperfitting.errors import UserError
from hyperfitting.fields import above_zero, at_least
from hyperfitting.metrics.estimate import Estimate
from hyperfitting.preference.items import JUDGMENTS_FILE, Question, Task, read_task
from hyperfitting.preference.judge_answers import (
    AnswerFile,
    JudgeQuestion,
    answer_file,
    judge_questions,
)
from hyperfitting.preference.judge_local import load_local_judge
from hyperfitting.preference.judge_prompt import parse
from hyperfitting.preference.judge_reliability import report_on_judges
from hyperfitting.preference.judge_report import JUDGE_FILE, JudgeReport
from hyperfitting.preference.judge_server import Budget, ServerJudge, check_base_url, read_key
from hyperfitting.preference.judgments import (
    JUDGE,
    Answer,
    append,
    make_judgment,
    read_judgments,
    validate,
)
from hyperfitting.progress import Advance

_SERVER_OPTIONS = ("concurrency", "max_tokens", "temperature", "timeout")
_PRICES = ("price_in", "price_out", "max_cost")


class Judge(Protocol):
    """A model that answers questions about items."""

    @property
    def settings(self) -> dict[str, Any]:
        """What determines an answer, beside the prompt."""
        ...

    def ask(
        self, questions: Sequence[JudgeQuestion], answers: AnswerFile, advance: Advance
    ) -> bool:
        """Ask questions and keep the answers; return whether all were asked."""
        ...


def ask_judge(study: Path, name: str, judge: Judge) -> bool:
    """Ask a judge what it has not answered, and add its judgments; return whether that was all.

    Args:
        study: folder of the study.
        name: of the judge, in its judgments and in the report.
        judge: the model.

    Raises:
        UserError: the study is damaged, the model fails, or answered other prompts under this name.
    """
    task = read_task(study)
    questions = judge_questions(task, judge.settings)
    with answer_file(study, name) as answers:
        answers.check_same(questions)
        try:
            complete = True
            while complete and (pending := answers.pending(questions)):
                with _bar(f"asking {name}", len(pending)) as advance:
                    complete = judge.ask(pending, answers, advance)
            return complete
        finally:
            _add_judgments(study / JUDGMENTS_FILE, task, JUDGE + name, questions, answers)


def _add_judgments(
    file: Path, task: Task, annotator: str, questions: Sequence[JudgeQuestion], answers: AnswerFile
) -> None:
    """Add the judgments that valid answers are, unless they are there."""
    judgments = []
    for question in questions:
        kept = answers.valid(question.key)
        parsed = parse(task.question, kept.text) if kept else None
        if kept is not None and isinstance(parsed, Answer):
            answer = Answer(parsed.shown, parsed.aspects, kept.seconds, kept.created)
            left, item = question.left, question.item
            judgments.append(make_judgment(task, item, annotator, answer, annotator, left))
    accepted, _ = validate(task, judgments, read_judgments(file))
    if accepted:
        append(file, accepted)


@contextmanager
def _bar(task: str, total: int) -> Iterator[Advance]:
    """Show progress with the time left on a terminal; nothing elsewhere."""
    from rich.progress import MofNCompleteColumn, Progress

    console = formatting.make_console()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        bar = bars.add_task(formatting.printable_line(task), total=total)
        yield lambda n, **_: bars.advance(bar, n)


def _build(arguments: argparse.Namespace, question: Question) -> Judge:
    """Return the judge that the command line describes.

    Raises:
        UserError: options do not fit together.
    """
    given = {name: getattr(arguments, name) for name in (*_SERVER_OPTIONS, *_PRICES, "key_env")}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.in_process:
        for name in given:
            raise UserError("is for --base-url", field=f"--{name.replace('_', '-')}", value="given")
        return load_local_judge(arguments.model, arguments.dtype or "float32", question)
    if arguments.dtype is not None:
        raise UserError("is for --in-process", field="--dtype", value=arguments.dtype)
    prices = {name: given[name] for name in _PRICES if name in given}
    for name, price in prices.items():
        if not price >= 0 or math.isinf(price):
            raise UserError("is no amount", field=f"--{name.replace('_', '-')}", value=price)
    if "max_cost" in prices and len(prices) < len(_PRICES):
        hint = "--price-in and --price-out, per million tokens"
        raise UserError("needs prices", field="--max-cost", value=prices["max_cost"], hint=hint)
    if find_spec("openai") is None:
        raise UserError(
            "needs the package openai, which is not installed",
            field="--base-url",
            value=arguments.base_url,
            hint="pip install 'hyperfitting[preference]'",
        )
    at_least("--concurrency", given.get("concurrency"), 1)
    at_least("--max-tokens", given.get("max_tokens"), 1)
    above_zero("--timeout", given.get("timeout"))
    url = check_base_url(arguments.base_url)
    key = read_key(url, given.get("key_env"))
    options = {name: given[name] for name in _SERVER_OPTIONS if name in given}
    return ServerJudge(arguments.model, url, question, Budget(**prices), key, **options)


def _run(arguments: argparse.Namespace) -> None:
    question = read_task(arguments.study).question
    judge = _build(arguments, question)
    name = arguments.name or arguments.model
    complete = ask_judge(arguments.study, name, judge)
    report = report_on_judges(arguments.study).judges[name]
    if isinstance(judge, ServerJudge) and judge.budget.price_in + judge.budget.price_out:
        print(f"cost       {judge.budget.spent:.4f}")
    if not complete:
        print("stopped    --max-cost does not allow another question; a higher one resumes")
    for line in describe(name, report):
        print(formatting.printable_line(line))
    print(f"report     {arguments.study / JUDGE_FILE}")


def describe(name: str, report: JudgeReport) -> Iterator[str]:
    """Yield the lines that tell how reliable a judge is."""

    def shown(value: Estimate | None) -> str:
        return formatting.estimate(value, "{:.2f}") or "-"

    yield f"judge      {name}, {report.items} items in both orders"
    if report.usage is not None:
        usage = report.usage
        yield (
            f"asked      {usage.questions} questions, {usage.invalid} without a valid answer, "
            f"{usage.prompt_tokens} + {usage.completion_tokens} tokens"
        )
    yield f"flips      {shown(report.flip_rate)} of the items"
    yield f"prefers    left {shown(report.left_rate)}, longer {shown(report.longer_rate)}"
    yield f"ties       {shown(report.tie_rate)}"
    if report.checks_passed is not None:
        yield f"checks     {shown(report.checks_passed)} passed"
    if report.with_people is not None:
        yield (
            f"{report.compared_with:<10} alpha {shown(report.with_people.alpha)} with their "
            f"majority; among themselves {shown(report.people)}"
        )
    for other, agreed in report.with_judges.items():
        yield f"{other[:10]:10} alpha {shown(agreed.alpha)}"
    for reason in report.reasons:
        yield f"no ranking {reason}"
    for preference in report.preferences if report.reliable else ():
        yield (
            f"wins       {preference.first} against {preference.second}: "
            f"{shown(preference.win_rate)}, of one length {shown(preference.length_controlled)}"
        )


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `judge`."""
    parser = commands.add_parser("judge", help="have a model judge, and measure its reliability")
    parser.add_argument("study", type=Path, metavar="STUDY", help="folder with task.json")
    parser.add_argument("--model", required=True, help="as the server names it; a folder; a Hub id")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--base-url", metavar="URL", help="server with OpenAI's protocol, up to /v1")
    where.add_argument("--in-process", action="store_true", help="load the model here")
    parser.add_argument("--name", help="of the judge in judgments and reports (default: --model)")
    parser.add_argument("--dtype", help="of the weights in process (float32)")
    parser.add_argument(
        "--key-env",
        metavar="VARIABLE",
        help="environment variable with the server's key (OPENAI_API_KEY for api.openai.com)",
    )
    parser.add_argument("--concurrency", type=int, help="requests at a time (4)")
    parser.add_argument("--max-tokens", type=int, help="of an answer (256)")
    parser.add_argument("--temperature", type=float, help="of the server's sampling (0)")
    parser.add_argument("--timeout", type=float, help="of a request, in seconds (600)")
    parser.add_argument("--price-in", type=float, help="per million tokens of prompts")
    parser.add_argument("--price-out", type=float, help="per million tokens of answers")
    parser.add_argument("--max-cost", type=float, help="ask nothing that might cost more in all")
    parser.set_defaults(run=_run)
