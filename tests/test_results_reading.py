"""Every number in the sentences of docs/results/README.md is in a committed report, or published.

What `readings` finds in no report is an exception: derived by a formula from values of reports, or
pending, until its report has a `curves.csv` or another table with it. An exception that is no
longer needed fails.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import readings
from tests.readings import (
    RESULTS,
    Citation,
    cell_value,
    citations,
    is_founded,
    load_config,
    neighbors,
    published,
    rounds_to,
)

MIN_CAUGHT = 0.9
"""Share of altered numbers that must be noticed; 92% are. The others are another cell of the same
kind: reports have many close numbers."""
README = (RESULTS / "README.md").read_text("utf-8")
CITED = citations(README)


def points_over_base(system: str, column: str = "by likelihood, %") -> Callable[[], float]:
    return lambda: abs(
        cell_value("downstream", column, system) - cell_value("downstream", column, "base")
    )


def same_top1() -> list[float]:
    """Return the published shares of equal top-1 tokens, in percent, of two orders of the data."""
    return [cell.value for cell in published("figure5_left") if cell.value > 50]


def steps(n_sequences: int, epochs: int) -> float:
    return n_sequences * epochs / load_config("preset/study")["trainer"]["batch_size"]


DERIVED: dict[str, dict[str, Callable[[], float]]] = {
    "": {"850": lambda: load_config("model/imagegpt_digits")["pretraining"]["n_train"]},
    "decoding": {
        "62": lambda: (
            load_config("preset/paper")["dataset"]["n_train"]
            / load_config("preset/study")["dataset"]["n_train"]
        )
    },
    "figure5_left": {
        "25": lambda: 100 - max(same_top1()),
        "32": lambda: 100 - min(same_top1()),
    },
    "figure5_right sequences": {"160": lambda: steps(64, 10)},
    "learning_rate": {"80": lambda: steps(64, 5)},
    "downstream": {
        "4.3": points_over_base("hyperfitted"),
        "8.3": points_over_base("LoRA"),
        "1.1": points_over_base("early-stopped"),
        "0.6": points_over_base("late stage"),
        "+6.3": points_over_base("hyperfitted", "by generation, %"),
        "+11": points_over_base("late stage", "by generation, %"),
    },
    "p2_controls": {
        "99.9": lambda: math.floor(
            1000 * cell_value("p2_controls", "same top-1 token as the base", "static bias 0.5")
        ) / 10,  # at least
    },
}  # fmt: skip
"""By section, numbers that follow from values of reports, in the unit of the sentence."""

BLOCKS = {"30": "blocks of SmolLM2-135M", "22": "blocks of TinyLlama 1.1B"}
PENDING: dict[str, dict[str, str]] = {
    "": BLOCKS | {"0.54": "stopping: training loss"},
    "figure9 long_texts": dict.fromkeys(
        ("26", "23", "29", "20", "19", "14", "25"), "TTR of the last 96 of 992 tokens, in records"
    ),
    "figure2": dict.fromkeys(("0.03", "3.4", "5.2"), "figure2.svg: losses"),
    "figure4": {"9": "probability in another text"},
    "figure7": {"42": "sum over the ranks of a row"},
    "figure5_left": dict.fromkeys(("22.0", "23.5", "19.9"), "figure5_left.svg: agreement"),
    "stopping": {"0.54": "training loss", "0.03": "training loss", "6": "last epoch"},
    "downstream": dict.fromkeys(
        ("4.0", "12.6", "3.1", "9.7"), "intervals of differences, in the records"
    ),
    "p2_controls": dict.fromkeys(("0.72", "0.74", "1.32", "1.34"), "temperatures, in notes")
    | dict.fromkeys(("36,000", "27,000", "-4.1", "-4.3", "-6.5", "-6.9"), "static bias, in notes"),
    "p2_geometry": {"12": "texts"},
    "late_stage_depth": BLOCKS
    | dict.fromkeys(("79", "46"), "last epoch")
    | {"0.05": "training loss"},
    "p2_late_stage": BLOCKS | dict.fromkeys(("25", "12"), "last epoch") | {"0.04": "training loss"},
    "figure6": {"0.10": "training loss", "61": "class of the context alone"},
    "images_seeds": dict.fromkeys(("0.10", "0.12"), "training loss"),
    "images_sequences": dict.fromkeys(("0.03", "0.10", "0.57", "0.05", "0.74"), "training loss"),
}
"""By section, numbers that no report has yet, with what they are."""


def is_excepted(citation: Citation) -> bool:
    """Return whether all numbers of a citation are derived or pending."""
    derived, pending = (by.get(citation.section, {}) for by in (DERIVED, PENDING))
    return all(
        number in pending or (number in derived and rounds_to(derived[number](), number))
        for number in citation.numbers
    )


def unfounded(cited: list[Citation]) -> list[tuple[str, str]]:
    """Return the numbers that are in no report, each with its section."""
    return [(c.section, c.number) for c in cited if not is_founded(c) and not is_excepted(c)]


def test_every_number_of_the_reading_is_in_a_report() -> None:
    assert unfounded(CITED) == []


def test_every_exception_is_still_needed() -> None:
    needed = {(c.section, number) for c in CITED if not is_founded(c) for number in c.numbers}
    excepted = {(s, n) for by in (DERIVED, PENDING) for s, numbers in by.items() for n in numbers}
    assert excepted - needed == set()


def test_altered_numbers_are_noticed() -> None:
    altered = [other for citation in CITED for other in citation.altered()]
    missed = [c for c in altered if is_founded(c) or is_excepted(c)]
    caught = 1 - len(missed) / len(altered)
    assert caught >= MIN_CAUGHT, f"{caught:.1%} of {len(altered)} altered numbers are noticed"


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        ("0.10", ["0.11", "0.09"]),
        ("15,869", ["15,870", "15,868"]),
        ("-4.1", ["-4.0", "-4.2"]),
        ("2e-4", []),
        ("0.8", []),
    ],
)
def test_a_number_has_neighbors_in_its_last_digit(number: str, expected: list[str]) -> None:
    assert sorted(neighbors(number)) == sorted(expected)


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ("from 30.8% to 53.6% [48.9", "from 30.8% to 54.6% [48.9", ("table1", "54.6")),
        ("53.6% [48.9, 58.2] at 96", "53.6% [48.9, 36.8] at 96", ("table1", "53.6")),
        ("Perplexity 34 to 98", "Perplexity 34% to 98", ("table3", "34")),
        ("from 28.3% to 36.2%.", "from 28.3% to 37.2%.", ("seeds", "37.2")),
        ("is 15,869 in", "is 15,689 in", ("p2_ranks", "15,689")),
        ("(1.21 nats against", "(1.27 nats against", ("decoding", "1.27")),
        ("(Li et al.: 39.1%)", "(Li et al.: 29.6%)", ("p2_ranks", "29.6")),  # ours
        ("29.6% [25.6, 33.5] of", "39.1% of", ("p2_ranks", "39.1")),  # theirs
        ("28 to 36% TTR at 224 tokens", "28 to 37% TTR at 224 tokens", ("", "37")),
    ],
)  # fmt: skip
def test_an_altered_number_is_noticed(right: str, wrong: str, expected: tuple[str, str]) -> None:
    assert README.count(right) == 1
    changed = [c for c in citations(README.replace(right, wrong)) if c not in CITED]
    assert expected in unfounded(changed)


def test_a_point_of_a_curve_is_cited_with_its_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "curved_embedded"
    folder.mkdir()
    values = [(1, 0.51), (2, 0.42), (3, 0.33), (4, 0.26)]
    lines = [f"f,type-token ratio,tuned,{x},{value},," for x, value in values]
    head = "figure,panel,line,x,value,low,high"
    (folder / "curves.csv").write_text("\n".join([head, *lines]))
    monkeypatch.setattr(readings, "RESULTS", tmp_path)
    text = "TTR falls from 51% to 26% (`curved`). It is 42% at 2, not 33% (`curved`)."
    cited = citations(f"# Curves\n\n{text}")
    of_values = [(c.number, is_founded(c)) for c in cited if c.unit]
    assert of_values == [("51", True), ("26", True), ("42", True), ("33", False)]


def test_no_committed_result_is_of_changed_code() -> None:
    reports = list(RESULTS.glob("*/README.md"))
    assert len(reports) > 15
    assert not [path for path in reports if "with changes" in path.read_text("utf-8")]
