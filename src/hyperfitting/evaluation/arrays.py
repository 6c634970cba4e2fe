"""Arrays and continuations as evaluation artifacts hold them: one writer, one reader."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hyperfitting.data.tokenization import token_texts
from hyperfitting.runtime.files import write_json
from hyperfitting.store.artifact import Artifact, Step

Arrays = TypeVar("Arrays")

_CONTINUATIONS_FILE = "continuations.json"
BATCHES_FILE = "batches.json"
"""Of continuations: the number of texts in each batch that was generated."""


def save_array(work: Path, name: str, values: NDArray[Any]) -> None:
    """Write ``NAME.npy``: token ids as int32, everything else as float32."""
    dtype = np.int32 if name == "top1" else np.float32
    np.save(work / f"{name}.npy", values.astype(dtype), allow_pickle=False)


def load_arrays(steps: Mapping[str, Step], names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Return arrays by name, those of all datasets concatenated along the texts."""
    return {
        name: np.concatenate(
            [
                np.load(step.artifact.file(f"{name}.npy"), allow_pickle=False)
                for step in steps.values()
            ]
        )
        for name in names
    }


def load_npz(artifact: Artifact, name: str, kind: Callable[..., Arrays]) -> Arrays:
    """Return the dataclass whose fields are the arrays of an artifact's `.npz`."""
    with np.load(artifact.file(name), allow_pickle=False) as arrays:
        return kind(**arrays)


def save_continuations(
    work: Path,
    contexts: Iterable[Sequence[int]],
    continuations: Iterable[list[int]],
    step_stats: Mapping[str, NDArray[Any]],
    tokenizer: Any,
) -> None:
    """Write `continuations.json`, and ``NAME.npy`` of each statistic of the decoding steps.

    Args:
        work: folder of the artifact.
        contexts: N sequences of token ids.
        continuations: N lists of token ids.
        step_stats: by name (N, max_new_tokens).
        tokenizer: the model's.
    """
    samples = [
        {"tokens": tokens, "token_texts": token_texts(tokenizer.decode, tokens, context)}
        for context, tokens in zip(contexts, continuations, strict=True)
    ]
    write_json(work / _CONTINUATIONS_FILE, samples)
    for name, values in step_stats.items():
        save_array(work, name, values)


def load_continuations(artifact: Artifact) -> list[dict[str, Any]]:
    """Return the content of a `continuations.json`."""
    samples: list[dict[str, Any]] = json.loads(
        artifact.file(_CONTINUATIONS_FILE).read_text("utf-8")
    )
    return samples


def load_batch_sizes(artifact: Artifact) -> list[int]:
    """Return how many texts each batch of continuations held when they were generated."""
    sizes: list[int] = json.loads(artifact.file(BATCHES_FILE).read_text("utf-8"))
    return sizes


def append_continuations(
    contexts: NDArray[np.int32], continuations: Sequence[Sequence[int]], length: int
) -> NDArray[np.int32]:
    """Return contexts with their continuations (N, length), zeros past the end of each.

    Args:
        contexts: (N, T) token ids.
        continuations: N sequences of token ids.
        length: T plus that of the longest continuation, or more.
    """
    start = contexts.shape[1]
    tokens = np.zeros((len(contexts), length), np.int32)
    tokens[:, :start] = contexts
    for row, continuation in zip(tokens, continuations, strict=True):
        row[start : start + len(continuation)] = continuation
    return tokens
