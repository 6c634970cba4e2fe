"""From documents to token sequences: for training, for validation, and held out for evaluation.

No document of one set is a near-duplicate of a document of another, and a document's set does not
depend on the tokenizer:

1. `holdout_fraction` of the documents are held out, chosen by a hash of their own text. So the
   evaluation texts are the same for every seed and number of sequences.
2. `validation_fraction` of the others are for validation, chosen alike; the rest is for training.
3. `dataset.seed` orders validation and training documents, or blocks of them, and the first ones
   are taken: fewer sequences are a prefix of more, and the number of validation sequences does not
   change the training sequences.

As a prefix, a document counts as long enough for n tokens if it has n words, since a word is at
least one token (and so are two Chinese or Japanese characters): so the same documents are taken for
every tokenizer, at the price of documents that have n tokens but not n words. The few that a
tokenizer makes shorter are skipped.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hyperfitting.data.config import DatasetConfig, TextsConfig
from hyperfitting.data.duplicates import near_duplicate_groups
from hyperfitting.data.sources import Documents, load_documents
from hyperfitting.data.splits import Split, cut_passages, shuffled, split_documents
from hyperfitting.data.take import MaskedSequences, take_blocks, take_prefixes
from hyperfitting.data.tokenization import DocumentTokenizer, token_texts
from hyperfitting.errors import UserError
from hyperfitting.fields import id_config
from hyperfitting.models.base import BaseModel
from hyperfitting.progress import ProgressReporter, no_op
from hyperfitting.runtime.files import write_json
from hyperfitting.store.artifact import Artifact, Step, Store

SEQUENCES_VERSION = 2
Tokens = NDArray[np.int32]
TokenLists = Sequence[Sequence[int] | NDArray[np.int32]] | Tokens
Mask = NDArray[np.bool_]

EVALUATION_SEED = 0
"""Order of the held-out documents; the same for every run, so that all are compared on the same."""
_SIZES_FILE = "split.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitSizes:
    """How the documents of a dataset were split; numbers of documents unless said."""

    documents: int
    distinct: int
    """Without exact copies."""
    groups: int
    """Groups of near-duplicates; a document without near-duplicates is a group."""
    held_out: int
    """For evaluation."""
    validation: int
    train: int
    near_duplicate_train_sequences: int
    """Training sequences that are near-duplicates of another one."""


@dataclass(frozen=True)
class Sequences:
    """Token ids to train and validate on."""

    train: Tokens
    """(n_train, seq_len)."""
    val: Tokens
    """(n_val, seq_len)."""
    train_mask: Mask | None = None
    """(n_train, seq_len) the tokens whose loss counts; none: all of them."""
    val_mask: Mask | None = None
    """(n_val, seq_len)."""


@dataclass(frozen=True)
class EvaluationTexts:
    """Held-out texts of one length: contexts with their reference continuations."""

    tokens: Tokens
    """(N, T) token ids."""
    token_texts: list[list[str]]
    """N lists of the text of each token; they join to the text."""


def sequences_step(
    cfg: DatasetConfig,
    documents: Artifact,
    base: BaseModel,
    store: Store,
    progress: ProgressReporter = no_op,
) -> Step:
    """Return the step that builds the training and validation sequences.

    Its build raises UserError if there are too few documents, or they are too short.
    """

    def build(work: Path) -> None:
        base.check_length("dataset.seq_len", cfg.seq_len)
        loaded = load_documents(documents)
        split = _split(loaded, cfg)
        tokenizer = DocumentTokenizer(base, cfg.chat)

        def take(texts: list[str], n: int) -> MaskedSequences:
            ordered = shuffled(texts, cfg.seed)
            if cfg.sequences == "prefix":
                return take_prefixes(ordered, n, cfg.seq_len, tokenizer)
            with progress(f"tokenizing {cfg.name}", len(texts), "documents") as advance:
                return take_blocks(ordered, n, cfg.seq_len, cfg.seed, tokenizer, advance)

        val, val_mask = take(split.validation, cfg.n_val)
        train, train_mask = take(split.train, cfg.n_train)
        _check_count("dataset.n_val", cfg.n_val, len(val), cfg, cfg.seq_len, loaded)
        _check_count("dataset.n_train", cfg.n_train, len(train), cfg, cfg.seq_len, loaded)
        save_sequences(work, train, val, _sizes(loaded, split, train, tokenizer))
        if cfg.chat and cfg.assistant_only_loss:
            np.save(work / "val_mask.npy", np.asarray(val_mask, bool), allow_pickle=False)
            np.save(work / "train_mask.npy", np.asarray(train_mask, bool), allow_pickle=False)

    artifact = store.artifact(
        "sequences",
        version=SEQUENCES_VERSION,
        config=id_config(cfg, "sequences") | (id_config(cfg, "chat") if cfg.chat else {}),
        inputs={"documents": documents.id, "model": base.id},
    )
    return Step(artifact, build)


def load_sequences(artifact: Artifact) -> Sequences:
    """Return the sequences of a `sequences` artifact."""
    files = artifact.manifest().files
    names = ["train.npy", "val.npy"]
    names += [name for name in ("train_mask.npy", "val_mask.npy") if name in files]
    return Sequences(*(np.load(artifact.file(name), allow_pickle=False) for name in names))


def load_split_sizes(artifact: Artifact) -> SplitSizes:
    """Return how the documents were split, of a `sequences` artifact."""
    return SplitSizes(**json.loads(artifact.file(_SIZES_FILE).read_text("utf-8")))


def held_out_texts(
    cfg: TextsConfig, documents: Documents, base: BaseModel, n: int, length: int
) -> EvaluationTexts:
    """Return the first ``n`` held-out texts, cut to ``length`` tokens.

    Raises:
        UserError: there are too few documents, or they are too short.
    """
    base.check_length("evaluation.text_len", length)
    candidates = shuffled(_split(documents, cfg).held_out, EVALUATION_SEED)
    if cfg.sequences == "packed":
        candidates = cut_passages(candidates, length)
    texts, _ = take_prefixes(candidates, n, length, DocumentTokenizer(base, cfg.chat))
    _check_count("evaluation.n_texts", n, len(texts), cfg, length, documents)
    decode = base.tokenizer().decode
    return EvaluationTexts(
        np.asarray(texts, np.int32), [token_texts(decode, text) for text in texts]
    )


def load_evaluation_texts(artifact: Artifact) -> EvaluationTexts:
    """Return the texts of an `evaluation_texts` artifact."""
    return EvaluationTexts(
        np.load(artifact.file("texts.npy")),
        json.loads(artifact.file("token_texts.json").read_text("utf-8")),
    )


def save_sequences(work: Path, train: TokenLists, val: TokenLists, sizes: SplitSizes) -> None:
    """Write the files of a `sequences` artifact."""
    _save(work / "val.npy", val)
    _save(work / "train.npy", train)
    write_json(work / _SIZES_FILE, asdict(sizes))


def save_evaluation_texts(work: Path, texts: EvaluationTexts) -> None:
    """Write the files of an `evaluation_texts` artifact."""
    _save(work / "texts.npy", texts.tokens)
    write_json(work / "token_texts.json", texts.token_texts)


def _save(path: Path, sequences: TokenLists) -> None:
    np.save(path, np.asarray(sequences, dtype=np.int32), allow_pickle=False)


_COUNTED = {
    "dataset.n_train": ("training sequences", "dataset.seq_len"),
    "dataset.n_val": ("validation sequences", "dataset.validation_fraction or dataset.seq_len"),
    "evaluation.n_texts": (
        "held-out texts",
        "dataset.holdout_fraction or shorter evaluation.text_len (or evaluation.max_new_tokens)",
    ),
}
"""By field: what it counts, and which other fields limit the number."""


def _check_count(
    field: str, wanted: int, available: int, cfg: TextsConfig, length: int, documents: Documents
) -> None:
    if available >= wanted:
        return
    counted, limiting = _COUNTED[field]
    reason = f"{cfg.name} has only {available} {counted} of {length} tokens ({cfg.sequences})"
    n_documents, n_groups = len(documents.texts), len(set(documents.groups))
    if n_groups < n_documents:
        reason += f"; {n_documents - n_groups} of its {n_documents} documents nearly repeat others"
    hint = f"more texts, another {limiting}"
    if cfg.sequences == "prefix":
        hint += ", or dataset.sequences=packed"
    if n_documents == 1:
        hint = f"dataset.document_start=REGEX, as one text is one document without it; {hint}"
    if available:
        hint = f"{field}={available}, {hint}"
    if cfg.source == "package":
        hint += "; preset=smollm2_135m has sizes that fit the packaged texts"
    raise UserError(
        reason,
        field=field,
        value=wanted,
        valid=f"at most {available}" if available else "nothing, with these texts",
        hint=hint,
    )


def _split(documents: Documents, cfg: TextsConfig) -> Split:
    validation_fraction = cfg.validation_fraction if isinstance(cfg, DatasetConfig) else 0.0
    return split_documents(
        documents.texts, documents.groups, cfg.holdout_fraction, validation_fraction
    )


def _sizes(
    documents: Documents, split: Split, train: TokenLists, tokenizer: DocumentTokenizer
) -> SplitSizes:
    train_groups = near_duplicate_groups([tokenizer.decode(sequence) for sequence in train])
    return SplitSizes(
        documents=len(documents.texts),
        distinct=len(set(documents.texts)),
        groups=len(set(documents.groups)),
        held_out=len(split.held_out),
        validation=len(split.validation),
        train=len(split.train),
        near_duplicate_train_sequences=len(train) - len(set(train_groups.tolist())),
    )
