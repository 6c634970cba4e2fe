"""Documents split by groups of near-duplicates, shuffled, and cut into passages."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperfitting.data.splits import (
    WORD,
    count_words,
    cut_passages,
    shuffled,
    split_documents,
)


@given(
    st.lists(st.tuples(st.text(max_size=30), st.integers(0, 9)), max_size=60),
    st.floats(0.1, 0.9),
    st.floats(0.1, 0.9),
)
def test_documents_are_split_by_groups(
    documents: list[tuple[str, int]], holdout: float, validation: float
) -> None:
    group_of = dict(reversed(documents))  # of copies the first counts
    split = split_documents(
        [text for text, _ in documents], [group for _, group in documents], holdout, validation
    )
    sides = (split.held_out, split.validation, split.train)
    groups = [{group_of[document] for document in side} for side in sides]
    assert not groups[0] & groups[1]
    assert not (groups[0] | groups[1]) & groups[2]
    assert set().union(*groups) == set(group_of.values())
    for side in sides[:2]:  # the longest of each group
        assert sorted(group_of[document] for document in side) == sorted(
            {group_of[document] for document in side}
        )
        for document in side:
            members = [text for text in group_of if group_of[text] == group_of[document]]
            assert len(document) == max(map(len, members))
    assert set(split.train) == {text for text in group_of if group_of[text] in groups[2]}
    assert len(split.train) == len(set(split.train))


@given(st.lists(st.text(max_size=30), unique=True, max_size=60), st.floats(0.1, 0.9))
def test_the_set_of_a_document_without_near_duplicates_does_not_depend_on_others(
    documents: list[str], fraction: float
) -> None:
    whole = split_documents(documents, range(len(documents)), fraction, 0.3)
    half = split_documents(documents[::2], range(len(documents[::2])), fraction, 0.3)
    for side in ("held_out", "validation", "train"):
        assert set(getattr(half, side)) == set(getattr(whole, side)) & set(documents[::2])


@given(st.lists(st.text(max_size=30), unique=True), st.integers(0, 5), st.randoms())
def test_the_shuffled_order_depends_on_seed_and_texts_only(
    documents: list[str], seed: int, random: Random
) -> None:
    permuted = list(documents)
    random.shuffle(permuted)
    assert shuffled(documents, seed) == shuffled(permuted, seed)


def test_passages_start_at_paragraphs_and_do_not_overlap() -> None:
    long = "\n\n".join(f"p{i} " + "word " * 9 for i in range(10)).strip()
    short = "q0 " + "word " * 20
    passages = cut_passages([long, short.strip()], 20)
    assert [passage[:2] for passage in passages] == ["p0", "q0", "p2", "p4", "p6", "p8"]
    assert all(count_words(passage) >= 20 for passage in passages)


@given(st.text(), st.text(st.characters(min_codepoint=0x3040, max_codepoint=0x9FFF)))
def test_characters_count_only_where_they_are_many_for_the_spaces(text: str, cjk: str) -> None:
    spaced = f"{text} {cjk}"
    n_spaced = len(WORD.findall(spaced))
    assert count_words(spaced) >= n_spaced
    assert count_words(f"{spaced} {'word ' * len(cjk)}") == n_spaced + len(cjk)


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("人人生而自由", 3),
        ("人人生而自由,在尊严和权利上一律平等。", 8),
        ("すべての人間は、生まれながらにして自由であり", 10),
        ("All are born free (人人生而自由).", 7),
    ],
)
def test_two_chinese_or_japanese_characters_are_a_word(text: str, n: int) -> None:
    assert count_words(text) == n
    assert len(cut_passages(["\n\n".join([text] * 9)], 3 * n)) >= 2


def test_a_passage_of_chinese_is_as_long_as_all_its_characters() -> None:
    passages = cut_passages(["人权宣\n\n言人人生\n\n而自由"], 3)
    assert passages == ["人权宣\n\n言人人生"]
