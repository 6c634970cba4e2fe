"""Tables of records, and the colouring of continuations."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hyperfitting.errors import UserError
from hyperfitting.reporting import colouring, table
from tests.conftest import hyperfit

HOSTILE = "<script>alert('x')</script> & \"quoted\" | pipe"


class Reader(HTMLParser):
    """What a browser would see: the tags, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_colouring_is_escaped_and_loses_no_text() -> None:
    pieces = [HOSTILE, " b", " c"] * 4
    reader = Reader()
    reader.feed(colouring.html(pieces, [1, 2, 3] * 4))
    assert reader.text == "".join(pieces)
    assert set(reader.tags) == {"div", "span"}


def test_the_page_of_a_hostile_record_holds_no_script_and_loads_nothing() -> None:
    side = {"pieces": [HOSTILE, " b"], "tokens": [1, 2]}
    sample = {
        "set": HOSTILE, "context": HOSTILE, "reference": HOSTILE,
        "continuation": side, "original_continuation": side,
    }  # fmt: skip
    names = {key: {"name": HOSTILE} for key in ("model", "dataset", "decode")}
    page = colouring.page({"config": names, "samples": [sample, sample]})
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags
    assert reader.text.count(HOSTILE) == 2 * 3 + 2 * 5
    assert reader.tags.count("tr") == 3
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)\s*=", page)


def test_a_longer_repeat_is_darker() -> None:
    new = list(range(100, 130))
    for length, shade in ((1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (9, 3), (10, 4), (20, 4)):
        tokens = [*new[:20], 1, *new[:length], 2]
        assert colouring.shades(tokens) == [0] * 21 + [shade] * length + [0]
    for shade in range(1, len(colouring.SHADES) + 1):
        assert f".r{shade} " in colouring.STYLE


def test_as_many_pieces_as_tokens() -> None:
    with pytest.raises(ValueError, match="zip"):
        colouring.html(["a"], [1, 2])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoding")
    done = hyperfit(
        folder, "experiment=decoding", "preset=debug", "evaluation=held_out",
        "hydra.sweep.dir=sweep",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tables     " in done.stdout
    return folder / "sweep"


def rows(text: str, heading: str) -> dict[tuple[str, str], str]:
    """The table under a heading: its rows by their first two cells."""
    part = text.split(f"### {heading}")[1].split("###", maxsplit=1)[0]
    cells = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return {(line[0], line[1]): line[2] for line in cells[2:]}


def test_one_command_makes_the_table_of_all_decodings(sweep: Path) -> None:
    text = (sweep / "tables.md").read_text()
    found = rows(text, "How varied is it?")
    names = {path.name for path in sweep.iterdir() if path.is_dir()}
    assert len(names) == 11
    # the original with the blocker is the original without it
    assert {name for name, model in found if model == "hyperfitted"} <= names
    assert ("citation_blocker", "original") not in found
    record = json.loads((sweep / "top_p" / "results.json").read_text())
    for side, model in (("metrics", "hyperfitted"), ("baseline", "original")):
        ttr = record[side]["gen/ttr"]
        expected = f"{ttr['mean']:.3f} [{ttr['ci95'][0]:.3f}, {ttr['ci95'][1]:.3f}]"
        assert found["top_p", model] == expected
    assert any(model == "real text" for _, model in found)
    assert len(list((sweep.parent / "outputs/store/tuned").glob("*/manifest.json"))) == 1
    against = text.split("less the hyperfitted one greedy")[1]
    assert re.search(r"\| top_p \| [+-]\d\.\d{3} \[.*\], p ", against)


def test_a_record_of_another_version_or_none_is_said(sweep: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no member of this sweep has a results\.json"):
        table.read(tmp_path)
    record: dict[str, Any] = json.loads((sweep / "beam" / "results.json").read_text())
    (tmp_path / "beam").mkdir()
    (tmp_path / "beam" / "results.json").write_text(json.dumps(record | {"schema_version": 1}))
    with pytest.raises(UserError, match="another version of this software") as told:
        table.write(tmp_path)
    assert "valid: schema_version 2" in str(told.value)
    assert not (tmp_path / "tables.md").exists()
