"""Every number in the sentences of docs/results/README.md is in a committed report, or published.

A number is found if a number of the experiment's report (its tables as CSV and Markdown), or of
another experiment that the sentence names, rounds to it, as it is or times 100.
"""

import re
from functools import cache
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[1] / "docs/results"
PUBLISHED = re.compile(r"published|Li et al|the paper reports", re.IGNORECASE)
NUMBER = re.compile(r"(?<![\w.,/])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?![\w/])")
SECTION = re.compile(r"\[(\w+)\]\(\w+_embedded/README\.md\)")
PROTOCOL = {"24", "32", "72", "80", "96", "128", "224", "992"}
"""Texts, sequences, steps and lengths: conf/preset/study.yaml and the experiments' files."""
ALSO_IN = {
    "figure5_left": ["seeds"],
    "figure5_right": ["table1"],  # the base model
    "sequences": ["table1"],
    "late_stage_depth": ["seeds"],
}
"""Experiments that a row quotes without a name."""
ALLOWED = {
    "table2": {"1": "the published rise of Dataset BLEU"},
    "downstream": {"50": "questions of a task"}
    | dict.fromkeys(
        ("4.3", "0.3", "8.3", "4.0", "12.6", "1.1", "0.6", "6.3", "3.1", "9.7", "11"),
        "downstream.estimates of the records, in percentage points",
    ),
    "early_stopping": {"8": "steps of the first epoch"},
    "learning_rate": {"64": "sequences"},
    "figure2": dict.fromkeys(("0.03", "3.4", "5.2", "4"), "figure2.svg"),
    "figure4": {"9": "figure4.svg", "78": "figure4.svg"},
    "figure5_left": {
        "22.0": "figure5_left.svg",
        "23.5": "figure5_left.svg",
        "19.9": "figure5_left.svg, claims.json",
        "5,000": "the paper's steps",
    },
    "figure6": {
        "200": "images",
        "120": "epochs",
        "0.10": "history of the runs",
        "0.12": "history of the runs",
    },
    "figure7": dict.fromkeys(("36", "33", "25", "42"), "figure7.svg"),
    "figure9": dict.fromkeys(
        ("26", "23", "29", "20", "19", "14", "25"), "figure9.svg, per_step of the records"
    ),
    "updates": {"5,000": "label of the row"}
    | dict.fromkeys(("10", "25", "156"), "epochs, experiments/updates.yaml"),
    "p2_controls": {
        "0.72": "T*, a note of the record",
        "1.34": "T*, a note of the record",
        "1.32": "T*, a note of the record",
        "4.1": "notes of the static bias",
        "4.3": "notes of the static bias",
        "36,000": "notes of static_bias",
        "27,000": "notes of static_bias",
        "500": "tokens with a bias",
        "102": "texts",
    },
    "images_seeds": dict.fromkeys(("0.10", "0.12"), "history of the run"),
    "images_sequences": {"3,000": "steps"}
    | dict.fromkeys(("0.03", "0.10", "0.57", "0.05", "0.74"), "history of the run"),
    "patching": {"64": "texts that do not change at the last block"},
    "late_stage_depth": {
        "5e-4": "optimizer.lr",
        "2e-4": "optimizer.lr",
        "0.03": "trainer.target_loss",
        "0.05": "history of the run",
        "79": "history of the run",
        "46": "history of the run",
        "30": "history of the run",
        "24": "history of the run",
    },
    "p2_late_stage": {"1e-3": "optimizer.lr"}
    | dict.fromkeys(("12", "25", "0.04"), "history of the run"),
    "stopping": {"4": "epochs"} | dict.fromkeys(("0.54", "0.03"), "history of the run"),
    "p2_geometry": dict.fromkeys(
        (
            "0.989",
            "0.986",
            "0.991",
            "42",
            "64",
            "0.90",
            "0.76",
            "0.73",
            "0.79",
            "20",
            "39",
            "10",
            "69",
            "0.8",
            "1.1",
            "2.8",
        ),
        "p2_geometry.svg, per_layer of the records",
    )
    | {"12": "texts", "30": "blocks"},
    "sequences": {"20": "steps", "160": "steps"},
}
"""By experiment, numbers that are in no table, with where they are from."""


def passages(text: str) -> list[tuple[str, str]]:
    """Return the paragraphs about results, each with the experiments of its section's heading."""
    found = []
    for section in re.split(r"^#+ ", text, flags=re.MULTILINE):
        heading, _, body = section.partition("\n")
        names = " ".join(SECTION.findall(heading))
        paragraphs = re.split(r"\n\n|\n- ", body) if names else []
        found += [(names, " ".join(paragraph.split())) for paragraph in paragraphs]
    return found


def unfounded(text: str) -> list[tuple[str, str]]:
    """Return the numbers that are in no report, each with its experiment."""
    return [
        (experiment, number)
        for experiment, passage in passages(text)
        for number in own_numbers(passage)
        if number not in PROTOCOL | allowed(experiment)
        and not any(rounds_to(value, number) for value in sources(experiment, passage))
    ]


def own_numbers(passage: str) -> list[str]:
    """Return the numbers of a passage, without those that are marked as published."""
    passage = re.sub(r"`[^`]*`|\b([Rr]anks?|[Tt]able|[Ff]igure|top-) ?\d+", " ", passage)
    passage = re.sub(r"\(([^()]*)\)", lambda m: "" if PUBLISHED.search(m[1]) else m[0], passage)
    sentences = [s for s in re.split(r"(?<=[.;:])(?<!al\.) ", passage) if not PUBLISHED.search(s)]
    return NUMBER.findall(" ".join(sentences))


def sources(experiment: str, passage: str) -> set[float]:
    named = [name for name in re.findall(r"`(\w+)`", passage) if folder(name).is_dir()]
    own = experiment.split()
    names = {*own, *named, *(other for name in own for other in ALSO_IN.get(name, []))}
    return set().union(*(report_numbers(name) for name in names))


def allowed(experiment: str) -> set[str]:
    return {number for name in experiment.split() for number in ALLOWED.get(name, {})}


def folder(experiment: str) -> Path:
    return RESULTS / f"{experiment}_embedded"


@cache
def report_numbers(experiment: str) -> set[float]:
    files = [path for path in folder(experiment).iterdir() if path.suffix in (".csv", ".md")]
    texts = [path.read_text("utf-8").partition("## Made with")[0] for path in files]
    pattern = r"\d+(?:\.\d+)?(?:e-?\d+)?"
    return {float(number) for text in texts for number in re.findall(pattern, text)}


def rounds_to(value: float, number: str) -> bool:
    """Whether a value, as it is or times 100, rounds to a number with its digits."""
    decimals = len(number.partition(".")[2]) if "e" not in number else 6
    target = float(number.replace(",", ""))
    return any(abs(value * k - target) <= 0.5001 * 10**-decimals for k in (1, 100))


README = (RESULTS / "README.md").read_text("utf-8")


def test_every_number_of_the_reading_is_in_a_report() -> None:
    assert unfounded(README) == []


def test_every_exception_is_still_needed() -> None:
    stated = {
        (name, number)
        for names, passage in passages(README)
        for number in own_numbers(passage)
        for name in names.split()
    }
    unused = [(e, n) for e, numbers in ALLOWED.items() for n in numbers if (e, n) not in stated]
    assert unused == []


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ("from 30.8% to 53.6% [48.9", "from 30.8% to 54.6% [48.9", ("table1", "54.6")),
        ("Perplexity 34 to 98", "Perplexity 34 to 89", ("table3", "89")),
        ("from 28.3% to 36.2%.", "from 28.3% to 37.2%.", ("seeds", "37.2")),
        ("is 15,869 in", "is 15,689 in", ("p2_ranks", "15,689")),
        ("(1.21 nats against", "(1.27 nats against", ("decoding", "1.27")),
    ],
)
def test_an_altered_number_is_noticed(right: str, wrong: str, expected: tuple[str, str]) -> None:
    assert README.count(right) == 1
    assert expected in unfounded(README.replace(right, wrong))


def test_no_committed_result_is_of_changed_code() -> None:
    reports = list(RESULTS.glob("*/README.md"))
    assert len(reports) > 15
    assert not [path for path in reports if "with changes" in path.read_text("utf-8")]
