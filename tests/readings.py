"""Numbers that a text on results cites, and the values of committed reports that they round to.

A sentence cites the experiments of its section's heading and those that it names in backticks. A
number comes from a cell of their tables or figures (`curves.csv`), from the evidence for claims, or
from their description: config, labels, prose. One that follows "published" or the like comes from
the published numbers of their tables, the claims, or the config at the papers' scale.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/results"
_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"
_CITED = re.compile(
    rf"(?<![\w.,/-])(?P<number>[-+]?{_NUMBER})(?![\w/]|\.\d|-\w)(?P<unit>%| points)?"
    rf"(?: \[(?P<low>-?{_NUMBER}), (?P<high>-?{_NUMBER})\])?"
)
_LISTED_IN_PERCENT = re.compile(
    rf"(?:(?:,| and| to| or|, and) {_NUMBER}(?: \[[^\]]*\])?)+(%| points)"
)
_NAMED = re.compile(r"\b(?:block|seed|epoch) $")
"""What precedes a number without a unit, though one in percent follows: at block 5, 4%."""
_NAMES = re.compile(r"`[^`]*`|\b([Rr]anks?|[Tt]able|[Ff]igure|[Bb]lock|top-) ?\d+")
_PUBLISHED = re.compile(r"published|Li et al|the papers? (?:reports?|uses?)", re.IGNORECASE)
_SECTION = re.compile(r"\[(\w+)\]\(\w+_embedded/README\.md\)")
_SENTENCE_END = re.compile(r"(?<=[.?])(?<!al\.)(?:\*{1,2} | (?=[^a-z\d]))")
_LEAD = re.compile(r"\s*\*(?!\*)[^*]*\*|")
_TOPICS = {
    "TTR": r"TTR|type-token|divers",
    "perplexity": r"perplexity",
    "entropy": r"entropy|nats",
    "BLEU": r"BLEU",
    "overlap": r"overlap|quot|share more than",
    "images": r"class|colors|nearest|nearer|farther",
    "repetition": r"grams?\b|rep_\d|repeat|repetition|rows?\b",
    "agreement": r"(most likely|top-1) tokens?|top1",
    "loop": r"loop",
}
"""What a sentence or a column is about, as a regular expression."""
_OTHER_UNIT = re.compile(
    r"nats|bits|tokens|colors|perplexity|Brier|rank|depth|L2|norm\b|distance|dimension|participation",
    re.IGNORECASE,
)
"""In the heading of a column that is no share."""
_VALUES = {"mean", "low", "high", "published", "missing", "figure", "panel", "x", "value"}
"""Columns of a CSV file without labels."""


@dataclass(frozen=True)
class Citation:
    """A number in a sentence, with its interval if one follows."""

    section: str
    """Experiments of the section's heading, separated by spaces."""
    sources: tuple[str, ...]
    """Experiments that it may come from: those, and the ones that the sentence names."""
    number: str
    interval: tuple[str, ...] = ()
    unit: str = ""
    """`%` or `points`, which follows directly or after the numbers listed with it."""
    is_published: bool = False
    topics: frozenset[str] = frozenset()
    sentence: str = ""

    @property
    def numbers(self) -> tuple[str, ...]:
        """The number and the ends of its interval."""
        return (self.number, *self.interval)

    def altered(self) -> Iterator["Citation"]:
        """Yield it with the last digit of one of its numbers one up or down."""
        for i, number in enumerate(self.numbers):
            for neighbor in neighbors(number):
                first, *rest = (*self.numbers[:i], neighbor, *self.numbers[i + 1 :])
                yield replace(self, number=first, interval=tuple(rest))


@dataclass(frozen=True)
class Cell:
    """A value of a report."""

    value: float
    interval: tuple[float, ...] = ()
    unit: str = "fraction"
    """`percent`, `fraction` (which may be cited in percent), or `other`."""
    topics: frozenset[str] = frozenset()
    is_difference: bool = False
    x: str = ""
    """Of a point of a curve that is not its first or last: where it is, which its sentence says."""


def citations(text: str) -> list[Citation]:
    """Return the numbers that the sentences of a text cite."""
    return [
        citation
        for section, lead, sentence in _sentences(text)
        for clause, is_published in _clauses(sentence)
        for citation in _cited(clause, section, lead, sentence, is_published)
    ]


def _sentences(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield the sentences, each with its section's experiments and opening in italics."""
    for part in re.split(r"^#+ ", text, flags=re.MULTILINE):
        heading, _, body = part.partition("\n")
        section = " ".join(_SECTION.findall(heading))
        opening = _LEAD.match(body)
        lead = opening[0] if opening else ""
        for paragraph in re.split(r"\n\n|\n- ", body):
            words = " ".join(paragraph.split())
            for sentence in _SENTENCE_END.split(words):
                yield section, lead, sentence


def _clauses(sentence: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a sentence, each with whether it is on published numbers."""
    sentence = _NAMES.sub(" ", re.sub(r"\]\([^)]*\)", "]", sentence))
    aside = [p for p in re.findall(r"\(([^()]*)\)", sentence) if _PUBLISHED.search(p)]
    for parenthesis in aside:
        sentence = sentence.replace(f"({parenthesis})", "")
    parts = [part for parenthesis in aside for part in parenthesis.split("; ")]
    for part in [*parts, *re.split(r"(?<=[;:]) ", sentence)]:
        yield part, bool(_PUBLISHED.search(part))


def _cited(
    clause: str, section: str, lead: str, sentence: str, is_published: bool
) -> Iterator[Citation]:
    named = [name for name in re.findall(r"`(\w+)`", sentence) if folder(name).is_dir()]
    sources = tuple(dict.fromkeys([*section.split(), *named]))
    about = topics(f"{lead} {sentence}")
    for match in _CITED.finditer(clause):
        is_listed = _LISTED_IN_PERCENT.match(clause, match.end())
        is_named = _NAMED.search(clause[: match.start()])
        unit = match["unit"] or (is_listed[1] if is_listed and not is_named else "")
        interval = (match["low"], match["high"]) if match["low"] else ()
        yield Citation(
            section, sources, match["number"], interval, unit.strip(), is_published, about, sentence
        )


def topics(text: str) -> frozenset[str]:
    """Return what a sentence or a column is about; empty: anything."""
    return frozenset(topic for topic, words in _TOPICS.items() if re.search(words, text, re.I))


def folder(experiment: str) -> Path:
    """Return the folder of an experiment's report."""
    return RESULTS / f"{experiment}_embedded"


def is_founded(citation: Citation) -> bool:
    """Return whether the experiments of a citation have its numbers."""
    number = citation.number
    kind = (number[0] if number[0] in "+-" else "", citation.unit, citation.is_published)
    candidates = _candidates(citation.sources, kind, citation.topics, citation.sentence)
    if any(_has_numbers(citation, values) for values in candidates):
        return True
    if citation.unit or citation.interval or re.match(r"[-+]|\d+\.\d*0$", number):
        return False  # a description has no rounded numbers, such as 1.20
    value = float(number.replace(",", ""))
    return any(value in described(name, citation.is_published) for name in citation.sources)


@cache
def _candidates(
    sources: tuple[str, ...], kind: tuple[str, str, bool], about: frozenset[str], sentence: str
) -> list[tuple[float, ...]]:
    """Return the numbers and ends of intervals of the cells that a sentence may cite."""
    sign, unit, is_published = kind
    found = [cell for s in sources for cell in (published(s) if is_published else cells(s))]
    return [
        tuple(number * (100 if unit and cell.unit == "fraction" else 1) for number in numbers)
        for cell in found
        if cell.unit != ("other" if unit else "percent")
        and not (cell.topics and about and not cell.topics & about)
        and (is_published or _is_shown(cell, sign, unit))
        and re.search(rf"(?<![\w.]){re.escape(cell.x)}(?![\w%]|\.\d)", sentence)
        for numbers in [(cell.value, *cell.interval)]
    ]


def _is_shown(cell: Cell, sign: str, unit: str) -> bool:
    """Return whether a cell is cited thus: a rise has a plus, a difference a sign or "points"."""
    return sign != "+" if not cell.is_difference else bool(sign) or unit == "points"


def _has_numbers(citation: Citation, values: tuple[float, ...]) -> bool:
    """Return whether the numbers of a cell round to those of a citation."""
    cited = citation.numbers
    return len(values) >= len(cited) and all(map(rounds_to, values, cited))


def rounds_to(value: float, number: str) -> bool:
    """Return whether a value, or without a sign its size, rounds to a number with its digits."""
    low, high = _rounded_from(number)
    return low <= (value if number[0] in "+-" else abs(value)) <= high


@cache
def _rounded_from(number: str) -> tuple[float, float]:
    digits, _, exponent = number.replace(",", "").partition("e")
    half = 0.5001 * 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    target = float(number.replace(",", ""))
    return target - half, target + half


def neighbors(number: str) -> list[str]:
    """Return a number of two or more significant digits with its last digit one up and down."""
    sign, digits, exponent = re.fullmatch(r"([-+]?)([\d,.]+)(.*)", number).groups()
    digits = digits.replace(",", "")
    if len(digits.replace(".", "").lstrip("0")) < 2:
        return []
    decimals = len(digits.partition(".")[2])
    values = (float(digits) + step * 10**-decimals for step in (1, -1))
    return [f"{sign}{value:,.{decimals}f}{exponent}" for value in values]


@cache
def cells(experiment: str) -> tuple[Cell, ...]:
    """Return the values of a report's tables and figures, and of the evidence for claims."""
    by_column: dict[str, list[dict[str, str]]] = {}
    for row in _rows(experiment):
        if _value(row):
            by_column.setdefault(row.get("column") or row["panel"], []).append(row)
    found = [cell for column in by_column.items() for cell in _cells_of_column(*column)]
    return tuple(dict.fromkeys(found + _evidence(experiment)))


def _value(row: dict[str, str]) -> str:
    return row.get("mean") or row.get("value") or ""


def _cells_of_column(heading: str, rows: list[dict[str, str]]) -> list[Cell]:
    values = [float(_value(row)) for row in rows]
    intervals = [tuple(float(row[end]) for end in ("low", "high") if row[end]) for row in rows]
    unit, about = _unit(heading, values), topics(heading)
    minus, inner = "minus" in heading, _inner_positions(rows)
    return [
        Cell(value, interval, unit, about, minus, x)
        for value, interval, x in zip(values, intervals, inner, strict=True)
    ]


def _inner_positions(rows: list[dict[str, str]]) -> list[str]:
    """Return the x of points of curves; empty: of a cell of a table, or an end of its curve."""
    lines = [(row.get("figure"), row.get("line")) for row in rows]
    around = zip([None, *lines[:-1]], lines, [*lines[1:], None], strict=True)
    is_inner = [before == line == after for before, line, after in around]
    return [row.get("x", "") if inner else "" for row, inner in zip(rows, is_inner, strict=True)]


def _unit(heading: str, values: Iterable[float]) -> str:
    if "%" in heading:
        return "percent"
    if _OTHER_UNIT.search(heading):
        return "other"
    return "percent" if max(map(abs, values)) > 1 else "fraction"


def _evidence(experiment: str) -> list[Cell]:
    """Return the values of the evidence for claims, which may be differences."""
    found = []
    for item in (e for c in _claims() for e in c["outcomes"]["embedded"]["evidence"]):
        criterion = item["criterion"]["value"]
        if criterion["experiment"] == experiment and item["estimate"] is not None:
            key = criterion["key"]
            unit = _unit(key, [item["value"] or 0, item["estimate"]])
            found.append(
                Cell(
                    item["estimate"],
                    tuple(item["ci95"] or ()),
                    unit,
                    topics(key),
                    item["criterion"]["minus"] is not None,
                )
            )
    return found


@cache
def _claims() -> list[dict[str, Any]]:
    return list(json.loads((ROOT / "docs/claims.json").read_text("utf-8"))["entries"])


@cache
def published(experiment: str) -> tuple[Cell, ...]:
    """Return the numbers of the papers in a report's tables, and in the claims on them."""
    rows = [row for row in _rows(experiment) if row.get("published")]
    texts = [(row["published"], row["column"]) for row in rows]
    texts += [(c["theirs"], c["theirs"]) for c in _claims() if experiment in _experiments(c)]
    return tuple(
        Cell(float(number.replace(",", "")), (), "percent" if "%" in heading else "fraction")
        for text, heading in texts
        for number in re.findall(rf"-?{_NUMBER}", text)
    )


def _experiments(claim: dict[str, Any]) -> set[str]:
    """Return the experiments that a claim is compared with."""
    outcomes = claim["outcomes"].values()
    evidence = [e["criterion"]["value"]["experiment"] for o in outcomes for e in o["evidence"]]
    commands = " ".join(outcome["command"] for outcome in outcomes)
    return {*evidence, *re.findall(r"experiment=(\w+)", commands)}


def cell_value(experiment: str, column: str, *labels: str) -> float:
    """Return a cell of a report's tables by the heading of its column and labels of its row.

    Raises:
        ValueError: there is no such cell, or several.
    """
    (cell,) = (
        row
        for row in _rows(experiment)
        if row.get("column") == column and {*labels} <= {*row.values()}
    )
    return float(cell["mean"])


@cache
def described(experiment: str, is_published: bool) -> frozenset[float]:
    """Return the numbers of an experiment's description: config, labels, titles."""
    spec = load_config(f"experiment/{experiment}")["hydra"]["sweeper"]
    scale = spec["scales"]["paper" if is_published else "embedded"]
    presets = [load_config(f"preset/{name}") for name in re.findall(r"preset=(\w+)", str(scale))]
    report = spec["report"]
    texts = [str([spec["axes"], scale, *presets]), f"{report['title']} {report.get('about')}"]
    for row in _rows(experiment):
        texts += [text for column, text in row.items() if column not in _VALUES]
    numbers = (number for text in texts for number in re.findall(_NUMBER, text))
    return frozenset(float(number.replace(",", "")) for number in numbers)


def load_config(name: str) -> Any:
    """Return a config file by its path in `conf` without suffix."""
    return yaml.load((ROOT / f"conf/{name}.yaml").read_text("utf-8"), yaml.CSafeLoader)


@cache
def _rows(experiment: str) -> tuple[dict[str, str], ...]:
    return tuple(
        row
        for path in sorted(folder(experiment).glob("*.csv"))
        for row in csv.DictReader(path.read_text("utf-8").splitlines())
    )
