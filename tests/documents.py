"""Documents, the files that hold them, and a tokenizer of whole words."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from hyperfitting.data.config import DatasetConfig
from hyperfitting.models.base import BaseModel
from hyperfitting.models.random_init import byte_tokenizer
from tests.conftest import tiny_model

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def document(i: int, n: int = 60) -> str:
    rng = np.random.default_rng(i)
    return f"{i:05d} " + " ".join(rng.choice(WORDS, n))


BYTES = byte_tokenizer()


def files_config(path: Path, **fields: Any) -> DatasetConfig:
    return DatasetConfig(
        **{"name": "mine", "source": "files", "path": str(path), "seed": 0} | fields
    )


def write(folder: Path, suffix: str, documents: list[str], field: str = "text") -> Path:
    path = folder / f"data{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps({field: d, "n": 1}) + "\n" for d in documents))
    elif suffix == ".csv":
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerows([["n", field], *([i, d] for i, d in enumerate(documents))])
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({field: documents}), path)
    elif suffix == ".arrow":
        import datasets

        path = folder / "saved"
        datasets.Dataset.from_dict({field: documents}).save_to_disk(str(path))
    else:
        for i, text in enumerate(documents):
            (folder / f"{i:04d}.txt").write_text(text)
        path = folder
    return path


def word_level_base(folder: Path) -> BaseModel:
    """A model whose tokens are whole words, with BOS and EOS."""
    vocabulary = ["<s>", "</s>", "<unk>", *WORDS, *(f"{i:05d}" for i in range(200))]
    word_level = tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"
    )
    tokenizer = tokenizers.Tokenizer(word_level)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tiny_model(folder, "llama", vocab_size=len(vocabulary))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return BaseModel.local("word_level", folder)
