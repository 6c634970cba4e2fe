"""Documents as tokens, and the text of each token."""

from pathlib import Path

import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hyperfitting.data.tokenization import DocumentTokenizer, token_text_in_context, token_texts
from hyperfitting.models.base import BaseModel
from tests.documents import BYTES, word_level_base


def test_documents_begin_with_bos_and_are_packed_with_eos_between_them(
    base: BaseModel, tmp_path: Path
) -> None:
    with_bos = DocumentTokenizer(word_level_base(tmp_path / "word_level"))
    assert (with_bos.bos_ids, with_bos.separator) == ([0], [1])
    assert with_bos("alpha beta") == [0, 3, 4]
    without_bos = DocumentTokenizer(base)  # no special tokens at all
    assert (without_bos.bos_ids, without_bos.separator) == ([], BYTES("\n\n").input_ids)
    assert without_bos("alpha") == BYTES("alpha").input_ids


@given(st.text(max_size=20))
def test_token_texts_join_to_the_text_also_inside_characters(text: str) -> None:
    tokens = BYTES(text).input_ids
    texts = token_texts(BYTES.decode, tokens)
    assert len(texts) == len(tokens)
    assert "".join(texts) == BYTES.decode(tokens) == text


@given(st.text(max_size=20), st.integers(0, 20))
def test_token_texts_take_the_context_into_account(text: str, cut: int) -> None:
    tokens = BYTES(text).input_ids
    continuation = token_texts(BYTES.decode, tokens[cut:], tokens[:cut])
    assert continuation == token_texts(BYTES.decode, tokens)[cut:]


def test_a_word_keeps_its_space_where_the_tokenizer_drops_that_of_a_first_word() -> None:
    """As in Llama 2 and TinyLlama."""
    vocabulary = {word: i for i, word in enumerate(["a", "▁a", "▁the", "▁cat", "s", "<unk>"])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    metaspace = tokenizers.Tokenizer(model)
    metaspace.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    metaspace.decoder = tokenizers.decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=metaspace)
    assert tokenizer.decode([2, 3, 4]) == "the cats"
    assert token_texts(tokenizer.decode, [3, 4]) == ["cat", "s"]
    assert token_texts(tokenizer.decode, [3, 4], [2]) == [" cat", "s"]
    assert [token_text_in_context(tokenizer)(token) for token in (3, 4)] == [" cat", "s"]


@example([94] * 6 + [156, 94, 94])  # six stray bytes, then a character of three
@given(st.lists(st.integers(0, 255), max_size=30))
def test_token_texts_of_any_bytes_join_to_the_decoded_text(tokens: list[int]) -> None:
    texts = token_texts(BYTES.decode, tokens)
    assert len(texts) == len(tokens)
    assert "".join(texts) == BYTES.decode(tokens)
