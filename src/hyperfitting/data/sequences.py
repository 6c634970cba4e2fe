"""From documents to token sequences: for training, for validation, and held out for evaluation.

The three sets share no document, and a document's set does not depend on the tokenizer:

1. `holdout_fraction` of the documents are held out, chosen by a hash of their own text. So the
   evaluation texts are the same for every seed and number of sequences.
2. The others are shuffled by `dataset.seed`; validation takes the first ones that it needs,
   training the next ones.
3. A document counts as long enough for n tokens if it has n words, since a word is at least one
   token. The few that a tokenizer makes shorter are skipped.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hyperfitting.data.config import DatasetConfig, TextsConfig
from hyperfitting.data.sources import errors_at, load_documents
from hyperfitting.data.splits import count_words, cut_passages, shuffled, split_holdout
from hyperfitting.data.tokenization import DocumentTokenizer, token_texts
from hyperfitting.errors import UserError
from hyperfitting.fields import id_config
from hyperfitting.models.base import BaseModel
from hyperfitting.runtime.files import write_json
from hyperfitting.store import Artifact, Step, Store

SEQUENCES_VERSION = 1
EVALUATION_TEXTS_VERSION = 3
Tokens = NDArray[np.int32]

_EVALUATION_SEED = 0
"""Order of the held-out documents; the same for every run, so that all are compared on the same."""
_OVERSAMPLING = 4
"""Packed training sequences are drawn from this many times as many, where the texts suffice."""
_MAX_CHARS_PER_TOKEN = 40
"""More than any tokenizer needs; the text after that is not tokenized."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sequences:
    """Token ids to train and validate on."""

    train: Tokens
    """(n_train, seq_len)."""
    val: Tokens
    """(n_val, seq_len)."""


@dataclass(frozen=True)
class EvaluationTexts:
    """Held-out texts of one length: contexts with their reference continuations."""

    tokens: Tokens
    """(N, T) token ids."""
    token_texts: list[list[str]]
    """N lists of the text of each token; they join to the text."""


def sequences_step(cfg: DatasetConfig, documents: Artifact, base: BaseModel, store: Store) -> Step:
    """Return the step that builds the training and validation sequences.

    Its build raises UserError if there are too few documents, or they are too short.
    """

    def build(work: Path) -> None:
        base.check_length("dataset.seq_len", cfg.seq_len)
        _, pool = split_holdout(load_documents(documents), cfg.holdout_fraction)
        shuffled_pool = shuffled(pool, cfg.seed)
        tokenizer = DocumentTokenizer(base)
        if cfg.sequences == "prefix":
            val, rest = _take_prefixes(shuffled_pool, cfg.n_val, cfg.seq_len, tokenizer)
            train, _ = _take_prefixes(rest, cfg.n_train, cfg.seq_len, tokenizer)
        else:
            val, rest = _take_packed(shuffled_pool, cfg.n_val, cfg, tokenizer)
            train, _ = _take_packed(rest, cfg.n_train, cfg, tokenizer, _OVERSAMPLING)
        _check_count("dataset.n_val", cfg.n_val, len(val), cfg, cfg.seq_len)
        _check_count("dataset.n_train", cfg.n_train, len(train), cfg, cfg.seq_len)
        _save(work / "val.npy", val)
        _save(work / "train.npy", train)

    artifact = store.artifact(
        "sequences",
        version=SEQUENCES_VERSION,
        config=id_config(cfg, "sequences"),
        inputs={"documents": documents.id, "model": base.id},
    )
    return Step(artifact, build)


def load_sequences(artifact: Artifact) -> Sequences:
    """Return the sequences of a `sequences` artifact."""
    return Sequences(np.load(artifact.file("train.npy")), np.load(artifact.file("val.npy")))


def evaluation_texts_step(
    cfg: TextsConfig,
    documents: Artifact,
    base: BaseModel,
    store: Store,
    *,
    n_texts: int,
    length: int,
    at: str = "dataset",
) -> Step:
    """Return the step that cuts the held-out texts of one evaluation dataset.

    Its build raises UserError if there are too few documents, or they are too short.

    Args:
        cfg: the dataset; its seed, if it has one, changes nothing here.
        documents: its documents.
        base: tokenizes them.
        store: where the texts are kept.
        n_texts: number of texts, N.
        length: tokens of each text, T: the context and its reference continuation.
        at: position of ``cfg`` in the whole config, for error messages.
    """

    def build(work: Path) -> None:
        base.check_length("evaluation.text_len", length)
        held_out, _ = split_holdout(load_documents(documents), cfg.holdout_fraction)
        candidates = shuffled(held_out, _EVALUATION_SEED)
        if cfg.sequences == "packed":
            candidates = cut_passages(candidates, length)
        texts, _ = _take_prefixes(candidates, n_texts, length, DocumentTokenizer(base))
        with errors_at(at):
            _check_count("evaluation.n_texts", n_texts, len(texts), cfg, length)
        _save(work / "texts.npy", texts)
        decode = base.tokenizer().decode
        write_json(work / "token_texts.json", [token_texts(decode, text) for text in texts])

    artifact = store.artifact(
        "evaluation_texts",
        version=EVALUATION_TEXTS_VERSION,
        config={
            "sequences": cfg.sequences,
            "holdout_fraction": cfg.holdout_fraction,
            "n_texts": n_texts,
            "length": length,
        },
        inputs={"documents": documents.id, "model": base.id},
    )
    return Step(artifact, build)


def load_evaluation_texts(artifact: Artifact) -> EvaluationTexts:
    """Return the texts of an `evaluation_texts` artifact."""
    return EvaluationTexts(
        np.load(artifact.file("texts.npy")),
        json.loads(artifact.file("token_texts.json").read_text("utf-8")),
    )


def _save(path: Path, sequences: Sequence[Sequence[int]]) -> None:
    np.save(path, np.asarray(sequences, dtype=np.int32), allow_pickle=False)


_COUNTED = {
    "dataset.n_train": ("training sequences", "dataset.seq_len"),
    "dataset.n_val": ("validation sequences", "dataset.seq_len"),
    "evaluation.n_texts": (
        "held-out texts",
        "dataset.holdout_fraction or shorter evaluation.text_len (or evaluation.max_new_tokens)",
    ),
}
"""By field: what it counts, and which other fields limit the number."""


def _check_count(field: str, wanted: int, available: int, cfg: TextsConfig, length: int) -> None:
    if available >= wanted:
        return
    counted, limiting = _COUNTED[field]
    hint = f"{field}={max(available, 1)}, more texts, another {limiting}"
    if cfg.sequences == "prefix":
        hint += ", or dataset.sequences=packed"
    if available == 0:
        hint += "; one text is one document, unless dataset.document_start says where others begin"
    raise UserError(
        f"{cfg.name} has only {available} {counted} of {length} tokens ({cfg.sequences})",
        field=field,
        value=wanted,
        valid=f"at most {available}" if available else "nothing, with these texts",
        hint=hint,
    )


_Taken = tuple[list[list[int]], list[str]]
"""Sequences of token ids, and the documents that were not needed for them."""


def _take_prefixes(
    documents: list[str], n: int, length: int, tokenizer: DocumentTokenizer
) -> _Taken:
    """Return the first ``length`` tokens of the first ``n`` long enough documents, and the rest."""
    sequences: list[list[int]] = []
    remaining = iter(documents)
    for document in remaining:
        n_words = count_words(document)
        if n_words < length:
            continue
        tokens = tokenizer(document[: _MAX_CHARS_PER_TOKEN * length])[:length]
        if len(tokens) < length:
            log.info("skipped a document of %d words: only %d tokens", n_words, len(tokens))
            continue
        sequences.append(tokens)
        if len(sequences) == n:
            break
    return sequences, list(remaining)


def _take_packed(
    documents: list[str],
    n: int,
    cfg: DatasetConfig,
    tokenizer: DocumentTokenizer,
    oversampling: int = 1,
) -> _Taken:
    """Return ``n`` random blocks of `seq_len` tokens of concatenated documents, and the rest.

    As many documents are concatenated as have words for ``oversampling * n`` sequences.
    """
    stream: list[int] = []
    n_words = 0
    remaining = iter(documents)
    for document in remaining:
        stream += tokenizer(document) + tokenizer.separator
        n_words += count_words(document)
        if n_words >= oversampling * n * cfg.seq_len:
            break
    n_blocks = len(stream) // cfg.seq_len
    chosen = np.random.default_rng(cfg.seed).permutation(n_blocks)[:n]
    sequences = [stream[block * cfg.seq_len : (block + 1) * cfg.seq_len] for block in chosen]
    return sequences, list(remaining)
