"""From documents to sequences of tokens: what is trained on, validated on, and evaluated on.

The three never share a document, and which document goes where does not depend on the tokenizer:

1. A hash of its own text puts `evaluation.share` of the documents aside for evaluation. So the
   evaluation texts stay the same for every seed and number of sequences.
2. The others stand in a random order set by `dataset.seed`; validation takes the first ones that it
   needs, training the next ones.
3. A document is long enough for n tokens if it has n words: a word is at least one token. The few
   that a tokenizer makes shorter are passed over.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperfitting.config import DatasetConfig, EvaluationConfig, TextsConfig
from hyperfitting.data import sources
from hyperfitting.errors import UserError
from hyperfitting.models import BaseModel
from hyperfitting.progress import Progress, silent
from hyperfitting.store import Artefact, Store, write_json

VERSION = 1
EVALUATION_VERSION = 2
Tokens = NDArray[np.int32]
WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")
# Packed training sequences are drawn from this many times as many, where the texts allow.
_CHOICE = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Training sequences (N, seq_len) and validation sequences (M, seq_len) of token ids."""

    train: Tokens
    val: Tokens


def corpus(
    cfg: DatasetConfig, evaluation_share: float, texts: Artefact, base: BaseModel, store: Store
) -> Artefact:
    """Return the artefact of the training and validation sequences."""

    def make(work: Path) -> None:
        base.check_length("dataset.seq_len", cfg.seq_len)
        _, pool = split(sources.load(texts), evaluation_share)
        documents = in_order(pool, cfg.seed)
        tokenizer = Tokenizer(base)
        if cfg.sequences == "prefix":
            val, rest = _prefixes(documents, cfg.n_val, cfg.seq_len, tokenizer)
            train, _ = _prefixes(rest, cfg.n_train, cfg.seq_len, tokenizer)
        else:
            val, rest = _packed(documents, cfg.n_val, cfg.seq_len, tokenizer, cfg.seed)
            train, _ = _packed(rest, cfg.n_train, cfg.seq_len, tokenizer, cfg.seed, _CHOICE)
        _check_number("dataset.n_val", cfg.n_val, len(val), cfg, cfg.seq_len)
        _check_number("dataset.n_train", cfg.n_train, len(train), cfg, cfg.seq_len)
        _save(work / "val.npy", val)
        _save(work / "train.npy", train)

    return store.artefact(
        "corpus",
        version=VERSION,
        config={
            "sequences": cfg.sequences,
            "seq_len": cfg.seq_len,
            "n_train": cfg.n_train,
            "n_val": cfg.n_val,
            "evaluation_share": evaluation_share,
            "seed": cfg.seed,
        },
        inputs={"texts": texts.id, "model": base.id},
        make=make,
    )


def load_corpus(artefact: Artefact) -> Corpus:
    """Return the sequences of a corpus artefact."""
    return Corpus(np.load(artefact.file("train.npy")), np.load(artefact.file("val.npy")))


def evaluation_texts(
    cfg: TextsConfig, evaluation: EvaluationConfig, texts: Artefact, base: BaseModel, store: Store
) -> Artefact:
    """Return the artefact of the held-out texts of one set: contexts and how they really go on."""
    length = evaluation.whole

    def make(work: Path) -> None:
        base.check_length("evaluation.text_len", length)
        pool, _ = split(sources.load(texts), evaluation.share)
        documents = in_order(pool, 0)
        if cfg.sequences == "packed":
            documents = passages(documents, length)
        found, _ = _prefixes(documents, evaluation.n_texts, length, Tokenizer(base))
        _check_number("evaluation.n_texts", evaluation.n_texts, len(found), cfg, length)
        _save(work / "texts.npy", found)
        decode = base.tokenizer().decode
        write_json(work / "pieces.json", [pieces(decode, text) for text in found])

    return store.artefact(
        "evaluation_texts",
        version=EVALUATION_VERSION,
        config={
            "sequences": cfg.sequences,
            "n": evaluation.n_texts,
            "length": length,
            "evaluation_share": evaluation.share,
        },
        inputs={"texts": texts.id, "model": base.id},
        make=make,
    )


def evaluation_sets(
    dataset: DatasetConfig,
    evaluation: EvaluationConfig,
    base: BaseModel,
    store: Store,
    show: Progress = silent,
) -> dict[str, Artefact]:
    """Return the artefact of the held-out texts of each set, by its name.

    Raises:
        UserError: a set's source does not exist; the message names its fields.
    """
    sets = evaluation.contexts or {dataset.name: dataset}
    found: dict[str, Artefact] = {}
    for name, cfg in sets.items():
        with _of_set(name, evaluation):
            texts = sources.texts(cfg, store, show)
            found[name] = evaluation_texts(cfg, evaluation, texts, base, store)
    return found


def ensure_sets(sets: Mapping[str, Artefact], evaluation: EvaluationConfig) -> None:
    """Make the held-out texts of all sets, before anything is trained.

    Raises:
        UserError: a set cannot be had; the message names its fields.
    """
    for name, artefact in sets.items():
        with _of_set(name, evaluation):
            artefact.ensure()


@contextmanager
def _of_set(name: str, evaluation: EvaluationConfig) -> Iterator[None]:
    """Have errors in this context name the fields of a set."""
    at = f"evaluation.contexts.{name}." if evaluation.contexts else "dataset."
    try:
        yield
    except UserError as error:
        raise error.moved("dataset.", at) from error


@dataclass(frozen=True)
class EvaluationTexts:
    """Held-out texts of one length."""

    tokens: Tokens
    """(N, text_len) token ids."""
    pieces: list[list[str]]
    """N lists of the text of each token."""


def load_evaluation_texts(artefact: Artefact) -> EvaluationTexts:
    """Return the held-out texts of an artefact."""
    return EvaluationTexts(
        np.load(artefact.file("texts.npy")),
        json.loads(artefact.file("pieces.json").read_text("utf-8")),
    )


def _save(path: Path, sequences: Sequence[Sequence[int]]) -> None:
    np.save(path, np.asarray(sequences, dtype=np.int32), allow_pickle=False)


_ROLES = {
    "dataset.n_train": ("training sequences", "dataset.seq_len"),
    "dataset.n_val": ("validation sequences", "dataset.seq_len"),
    "evaluation.n_texts": (
        "held-out texts",
        "evaluation.share or shorter evaluation.text_len (or evaluation.new_tokens)",
    ),
}
"""What the field counts, and which others decide how many there are."""


def _check_number(field: str, wanted: int, found: int, cfg: TextsConfig, length: int) -> None:
    if found < wanted:
        what, deciding = _ROLES[field]
        raise UserError(
            f"{cfg.name} has only {found} {what} of {length} tokens ({cfg.sequences})",
            field=field,
            value=wanted,
            valid=f"at most {found}" if found else "nothing, with these texts",
            hint=f"{field}={max(found, 1)}, more texts, another {deciding}"
            + (", or dataset.sequences=packed" if cfg.sequences == "prefix" else "")
            + (
                "; one text is one document, unless dataset.document_start says where others begin"
                if found == 0
                else ""
            ),
        )


def split(documents: Iterable[str], evaluation_share: float) -> tuple[list[str], list[str]]:
    """Return the documents for evaluation and those for training and validation.

    Each goes by a hash of its own text alone; exact duplicates count once.
    """
    pools: tuple[list[str], list[str]] = ([], [])
    for document in dict.fromkeys(documents):
        pools[_hash("split", document) >= evaluation_share].append(document)
    return pools


def in_order(documents: Iterable[str], seed: int) -> list[str]:
    """Return documents in a random order that only ``seed`` and their own texts determine."""
    return sorted(documents, key=lambda document: (_hash(str(seed), document), document))


def _hash(salt: str, text: str) -> float:
    """Return a number in [0, 1), uniform over texts."""
    value = hashlib.sha256(f"{salt}\0{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(value[:8], "big") / 2**64


def words(text: str) -> int:
    """Return the number of words and runs of punctuation in a text."""
    return sum(1 for _ in WORD.finditer(text))


def passages(documents: list[str], length: int) -> list[str]:
    """Cut documents into non-overlapping passages of ``length`` words or more.

    Each starts at a paragraph. The first passages of all documents come first, then the second
    ones, and so on, so that few passages come from many documents.
    """
    cut = [list(_passages_of(document, length)) for document in documents]
    deepest = max(map(len, cut), default=0)
    return [found[depth] for depth in range(deepest) for found in cut if depth < len(found)]


def _passages_of(document: str, length: int) -> Iterator[str]:
    gathered: list[str] = []
    count = 0
    for paragraph in document.split("\n\n"):
        gathered.append(paragraph)
        count += words(paragraph)
        if count >= length:
            yield "\n\n".join(gathered)
            gathered, count = [], 0


class Tokenizer:
    """A model's tokenizer as documents need it: with its opening token, without padding."""

    def __init__(self, base: BaseModel) -> None:
        self._tokenizer = base.tokenizer()
        eos = self._tokenizer.eos_token_id
        opening = list(self._tokenizer("").input_ids)
        while opening and opening[-1] == eos and eos != self._tokenizer.bos_token_id:
            opening.pop()
        self.opening: list[int] = opening

    @cached_property
    def separator(self) -> list[int]:
        """What stands between packed documents: end of text, or a blank line if there is none."""
        eos = self._tokenizer.eos_token_id
        return [eos] if eos is not None else self._plain("\n\n")

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of a document."""
        return self.opening + self._plain(text)

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


Taken = tuple[list[list[int]], list[str]]
"""Sequences of token ids, and the documents that were not needed for them."""


def _prefixes(documents: list[str], n: int, length: int, tokenizer: Tokenizer) -> Taken:
    """Return the first ``length`` tokens of the first ``n`` long enough documents, and the rest."""
    found: list[list[int]] = []
    rest = iter(documents)
    for document in rest:
        if words(document) < length:
            continue
        # 40 characters a token is more than any tokenizer needs; a long text is not read to its end
        tokens = tokenizer(document[: 40 * length])[:length]
        if len(tokens) < length:
            log.info("a document of %d words has only %d tokens", words(document), len(tokens))
            continue
        found.append(tokens)
        if len(found) == n:
            break
    return found, list(rest)


def _packed(
    documents: list[str], n: int, length: int, tokenizer: Tokenizer, seed: int, choice: int = 1
) -> Taken:
    """Return ``n`` random cuts of ``length`` tokens out of documents end to end, and the rest.

    As many documents are packed as hold ``choice * n`` sequences by their number of words.
    """
    stream: list[int] = []
    counted = 0
    rest = iter(documents)
    for document in rest:
        stream += tokenizer(document) + tokenizer.separator
        counted += words(document)
        if counted >= choice * n * length:
            break
    chosen = np.random.default_rng(seed).permutation(len(stream) // length)[:n]
    return [stream[block * length : (block + 1) * length] for block in chosen], list(rest)


_WINDOW = 8
"""Tokens before one that can change how it is written."""
Decode = Callable[[list[int]], str]
"""From ids to text, as a tokenizer does it."""


def pieces(decode: Decode, tokens: list[int], given: Sequence[int] = ()) -> list[str]:
    """Return the text of each token, so that the pieces join to the text of all.

    A token that is only part of a character gives "", and the one that completes it the character.

    Args:
        decode: the tokenizer's.
        tokens: (T,) ids.
        given: ids that stand before them; many tokenizers write the first word of a text without
            its space.
    """
    before = [int(token) for token in given[-_WINDOW:]]
    tokens = before + tokens
    found: list[str] = []
    done = 0  # tokens whose text is out
    for end in range(1, len(tokens) + 1):
        start = max(0, done - _WINDOW)
        out, now = decode(tokens[start:done]), decode(tokens[start:end])
        complete = not now.endswith("\ufffd") or end == len(tokens) or end - done >= _WINDOW
        found.append(now[len(out) :] if complete else "")
        done = end if complete else done
    return found[len(before) :]


def piece_in_text(tokenizer: Any) -> Callable[[int], str]:
    """Return the function from a token to its text inside a text, with the space before it."""
    anchor = list(tokenizer("a", add_special_tokens=False).input_ids)
    return lambda token: pieces(tokenizer.decode, [token], anchor)[0]
