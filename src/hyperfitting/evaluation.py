"""From a model to its scores: likelihoods of held-out texts, continuations, and their metrics.

Each step is an artefact, so that the original model's are made once for all members that share
texts and decoding. Metric keys: `val/…` for how the model predicts the held-out texts, `gen/…` for
what it writes itself.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from hyperfitting.config import DecodeConfig, EvaluationConfig, HardwareConfig
from hyperfitting.data.corpus import load_evaluation_texts
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.decoding.likelihood import MEASURES, measure
from hyperfitting.metrics.diversity import rep_n, ttr
from hyperfitting.metrics.uncertainty import Estimate, bootstrap_mean
from hyperfitting.models import ModelState
from hyperfitting.progress import Progress
from hyperfitting.store import Artefact, Store, write_json

VERSION = 1
PerText = dict[str, list[float | None]]
"""Values by metric key, in the order of the texts; none where a text has no value."""


class LoadedModel:
    """A model state that is read from disk when first needed, and then kept."""

    def __init__(self, state: ModelState, device: torch.device) -> None:
        self.state, self.device = state, device
        self._model: PreTrainedModel | None = None

    def __call__(self) -> PreTrainedModel:
        """Return the model on its device, in evaluation mode."""
        if self._model is None:
            self._model = self.state.load(self.device)
        return self._model

    def release(self) -> None:
        """Let go of the model's memory."""
        self._model = None


def likelihoods(
    model: LoadedModel, texts: Artefact, store: Store, hardware: HardwareConfig, show: Progress
) -> Artefact:
    """Return the artefact of how a model predicts the held-out texts: `likelihoods.json`.

    It holds, by measure of `metrics.distribution`, the mean over the tokens of each text.
    """

    def make(work: Path) -> None:
        tokens = load_evaluation_texts(texts)
        with show(f"scoring texts with {_label(model.state)}", tokens.size, "tokens") as advance:
            found = measure(model(), tokens, hardware.evaluation_batch_size, advance)
        write_json(work / "likelihoods.json", {key: found[key].tolist() for key in MEASURES})

    return store.artefact(
        "likelihoods",
        version=VERSION,
        config={},
        inputs={"model": model.state.id, "texts": texts.id},
        make=make,
    )


def continuations(
    model: LoadedModel,
    texts: Artefact,
    decode: DecodeConfig,
    evaluation: EvaluationConfig,
    store: Store,
    hardware: HardwareConfig,
    show: Progress,
) -> Artefact:
    """Return the artefact of a model's continuations: `continuations.json`, one object a text.

    Each has `tokens` (ids), `pieces` (the text of each token; they join to the continuation),
    `context` and `reference` (text).
    """

    def make(work: Path) -> None:
        tokens = load_evaluation_texts(texts)
        contexts = tokens[:, : evaluation.context_len]
        total = len(contexts) * evaluation.new_tokens
        with show(f"continuing texts with {_label(model.state)}", total, "tokens") as advance:
            made = continue_texts(
                model(),
                contexts,
                evaluation.new_tokens,
                decode,
                hardware.generation_batch_size,
                advance,
            )
        tokenizer = model.state.base.tokenizer()
        write_json(
            work / "continuations.json",
            [
                {
                    "context": tokenizer.decode(text[: evaluation.context_len]),
                    "reference": tokenizer.decode(text[evaluation.context_len :]),
                    "tokens": continuation,
                    "pieces": pieces(tokenizer.decode, continuation),
                }
                for text, continuation in zip(tokens.tolist(), made, strict=True)
            ],
        )

    return store.artefact(
        "continuations",
        version=VERSION,
        config={
            "decode": _determining(decode),
            "context_len": evaluation.context_len,
            "new_tokens": evaluation.new_tokens,
        },
        inputs={"model": model.state.id, "texts": texts.id},
        make=make,
    )


def _determining(decode: DecodeConfig) -> dict[str, Any]:
    """Return what of a decode config changes its tokens: greedy has no temperature and no seed."""
    if decode.strategy == "greedy":
        return {"strategy": "greedy", "stop_at_eos": decode.stop_at_eos}
    return {key: value for key, value in asdict(decode).items() if key != "name"}


def _label(state: ModelState) -> str:
    return "the tuned model" if state.tuned else "the original model"


def pieces(decode: Callable[[list[int]], str], tokens: list[int], window: int = 8) -> list[str]:
    """Return the text of each token, so that the pieces join to the text of all.

    A token that is only part of a character gives "", and the one that completes it the character.

    Args:
        decode: the tokenizer's, from ids to text.
        tokens: (T,) ids.
        window: tokens before it that can change how one is written.
    """
    found: list[str] = []
    done = 0  # tokens whose text is out
    for end in range(1, len(tokens) + 1):
        start = max(0, done - window)
        before, now = decode(tokens[start:done]), decode(tokens[start:end])
        complete = not now.endswith("\ufffd") or end == len(tokens) or end - done >= window
        found.append(now[len(before) :] if complete else "")
        done = end if complete else done
    return found


@dataclass(frozen=True)
class Scores:
    """What a model is worth on the held-out texts."""

    metrics: dict[str, Estimate]
    per_text: PerText
    samples: list[dict[str, Any]]
    """As in `continuations`, in the order of the texts."""


def score(likelihood: Artefact, continuation: Artefact, evaluation: EvaluationConfig) -> Scores:
    """Return the metrics of a model from its two artefacts: per text, and their means."""
    samples = json.loads(continuation.file("continuations.json").read_text("utf-8"))
    measured = json.loads(likelihood.file("likelihoods.json").read_text("utf-8"))
    values: dict[str, NDArray[np.float64]] = {
        f"val/{name}": np.array(measured[name]) for name in MEASURES
    }
    for key, function in GENERATION_METRICS.items():
        values[key] = np.array([function(sample["tokens"]) for sample in samples])
    metrics = {
        key: estimate
        for key, found in values.items()
        if (estimate := bootstrap_mean(found, evaluation.bootstrap)) is not None
    }
    perplexity = bootstrap_mean(values["val/loss"], evaluation.bootstrap, transform=np.exp)
    if perplexity is not None:
        metrics["val/perplexity"] = perplexity
    values["val/perplexity"] = np.exp(values["val/loss"])
    return Scores(metrics, {key: _jsonable(found) for key, found in values.items()}, samples)


GENERATION_METRICS: Mapping[str, Callable[[list[int]], float]] = {
    "gen/ttr": ttr,
    "gen/rep_2": lambda tokens: rep_n(tokens, 2),
    "gen/rep_3": lambda tokens: rep_n(tokens, 3),
}


def _jsonable(values: NDArray[np.float64]) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
