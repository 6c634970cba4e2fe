"""The highlighting of repetition, and the page of a record's texts."""

import re
from html.parser import HTMLParser

import pytest

from hyperfitting.reporting import repetition_highlight
from tests.records import make_config, make_continuation, make_record, make_sample, make_slice

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


def test_highlighted_text_is_escaped_and_complete() -> None:
    token_texts = [HOSTILE, " b", " c"] * 4
    reader = Reader()
    reader.feed(repetition_highlight.to_html(token_texts, [1, 2, 3] * 4))
    assert reader.text == "".join(token_texts)
    assert set(reader.tags) == {"div", "span"}


def test_the_texts_page_of_a_hostile_record_has_no_script_and_loads_nothing() -> None:
    continuation = make_continuation("a b").model_copy(
        update={"token_texts": [HOSTILE, " b"], "tokens": [1, 2]}
    )
    sample = make_sample(continuation, continuation, HOSTILE, HOSTILE, HOSTILE)
    names = {group: {"name": HOSTILE} for group in ("model", "dataset", "decode")}
    record = make_record([make_slice({})], [sample, sample], config=make_config(**names))
    page = repetition_highlight.texts_page(record)
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags
    assert reader.text.count(HOSTILE) == 2 * 3 + 2 * 5
    assert reader.tags.count("tr") == 3
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)\s*=", page)
    assert repetition_highlight.texts_page(record, limit=1).count("<tr>") == 2


def test_longer_repeats_are_darker() -> None:
    new = list(range(100, 130))
    for length, shade in ((1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (9, 3), (10, 4), (20, 4)):
        tokens = [*new[:20], 1, *new[:length], 2]
        assert repetition_highlight.shades(tokens) == [0] * 21 + [shade] * length + [0]
    for shade in range(1, len(repetition_highlight.SHADES) + 1):
        assert f".r{shade} " in repetition_highlight.STYLE


def test_the_number_of_token_texts_must_be_that_of_the_tokens() -> None:
    with pytest.raises(ValueError, match="zip"):
        repetition_highlight.to_html(["a"], [1, 2])
