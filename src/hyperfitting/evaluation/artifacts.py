"""What one model does on the evaluation texts, as artifacts with the steps that build them.

Token statistics of the reference texts, continuations of their contexts, the base model's
log-likelihoods of the tuned model's continuations, the most likely next tokens along a text, and
features for MAUVE, or of images for FID. The base model's are shared by all runs with the same
texts and decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hyperfitting.data.sequences import load_evaluation_texts, load_sequences
from hyperfitting.data.tokenization import token_text_in_context
from hyperfitting.decoding.citation_blocker import CitationBlocker
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.evaluation.arrays import (
    BATCHES_FILE,
    append_continuations,
    load_continuations,
    save_array,
    save_continuations,
)
from hyperfitting.evaluation.forward import (
    TOKEN_STATS,
    compute_token_stats,
)
from hyperfitting.evaluation.image_features import FeatureNetwork, image_features_steps
from hyperfitting.evaluation.mauve_features import mauve_features_steps
from hyperfitting.evaluation.next_tokens import next_tokens_step
from hyperfitting.evaluation.setting import LazyModel, Setting
from hyperfitting.models.size import forward_flops, model_size
from hyperfitting.runtime.files import write_json
from hyperfitting.store.artifact import Artifact, Step

VERSION = 5
CONTINUATIONS_VERSION = 6
LOGLIKELIHOODS = ("loss", "rank")
"""Of `TOKEN_STATS`, what the base model's log-likelihoods of a continuation hold."""


@dataclass(frozen=True)
class ModelArtifacts:
    """The artifacts of one model, by evaluation dataset."""

    token_stats: dict[str, Step]
    continuations: dict[str, Step]
    next_tokens: dict[str, Step]
    base_loglikelihoods: dict[str, Step] = field(default_factory=dict)
    """Empty for the base model: its step statistics are its log-likelihoods."""
    mauve_features: dict[str, Step] = field(default_factory=dict)
    """By `continuation/DATASET` and `reference/DATASET`."""
    image_features: dict[str, Step] = field(default_factory=dict)
    """By the same names."""

    @property
    def written(self) -> dict[str, Artifact]:
        """The continuations' artifacts, by dataset."""
        return {name: step.artifact for name, step in self.continuations.items()}

    def named(self) -> Iterator[tuple[str, Step]]:
        """Yield all steps with their names, such as `continuations/news`."""
        for kind, steps in vars(self).items():
            for name, step in steps.items():
                yield f"{kind}/{name}", step


def model_artifacts(
    setting: Setting,
    model: LazyModel,
    base: LazyModel,
    features: LazyModel | None,
    image_network: FeatureNetwork | None = None,
) -> ModelArtifacts:
    """Return the steps of everything that is asked of a model.

    Args:
        setting: texts, decoding and lengths.
        model: the tuned or the base model.
        base: the base model, which scores the tuned model's continuations.
        features: the model that gives MAUVE's features; none: MAUVE is not measured.
        image_network: gives features of images; none: FID and KID are not measured.
    """
    names = setting.texts
    continuations = {name: continuations_step(setting, model, name) for name in names}
    written = {name: step.artifact for name, step in continuations.items()}
    return ModelArtifacts(
        {name: token_stats_step(setting, model, name) for name in names},
        continuations,
        {name: next_tokens_step(setting, model, name) for name in names}
        if setting.evaluation.top_tokens
        else {},
        {}
        if model.state.is_base
        else {name: base_loglikelihoods_step(setting, base, name, written[name]) for name in names},
        dict(mauve_features_steps(setting, features, written)) if features is not None else {},
        dict(image_features_steps(setting, image_network, base.state.base, written))
        if image_network is not None
        else {},
    )


def texts_flops(
    setting: Setting, model: LazyModel, length: int, times: int = 1
) -> Callable[[], float]:
    """Return the function that estimates the operations of passes over a dataset's texts."""

    def estimate() -> float:
        size = model_size(model.state.base, setting.store)
        return times * forward_flops(size, setting.evaluation.n_texts, length)

    return estimate


def token_stats_step(setting: Setting, model: LazyModel, dataset: str) -> Step:
    """Return the step of how a model predicts a dataset's texts.

    Files: for each of `TOKEN_STATS` ``NAME.npy`` (N, text_len - 1).
    """
    texts = setting.texts[dataset]

    def build(work: Path) -> None:
        tokens = load_evaluation_texts(texts).tokens
        task = f"scoring {dataset} with {model.label}"
        with setting.progress(task, tokens.size, "tokens") as advance:
            stats = compute_token_stats(
                model(), tokens, setting.hardware.evaluation_batch_size, advance
            )
        for name in TOKEN_STATS:
            save_array(work, name, stats[name])

    artifact = setting.store.artifact(
        "token_stats",
        version=VERSION,
        config=_ties_config(model),
        inputs={"model": model.state.id, "texts": texts.id},
    )
    return Step(artifact, build, texts_flops(setting, model, setting.evaluation.reference_len))


def _ties_config(model: LazyModel) -> dict[str, str]:
    """Return what enters the ids of token ranks, for a model in half precision."""
    return {} if model.state.base.dtype == "float32" else {"ties": "by id"}


def continuations_step(setting: Setting, model: LazyModel, dataset: str) -> Step:
    """Return the step of a model's continuations of a dataset's contexts.

    Files: `continuations.json`, one object per text: the continuation's `tokens` (ids) and
    `token_texts`; for each of `STEP_STATS` ``NAME.npy`` (N, max_new_tokens), NaN past the end of
    a continuation.
    """
    evaluation, texts = setting.evaluation, setting.texts[dataset]
    blocked = setting.decode.citation_blocker.enabled and not model.state.is_base

    def build(work: Path) -> None:
        contexts = load_evaluation_texts(texts).tokens[:, : evaluation.context_len]
        tokenizer = model.state.base.tokenizer()
        total = len(contexts) * evaluation.continuation_len
        task = f"continuing {dataset} with {model.label}"
        with setting.progress(task, total, "tokens") as advance:
            continuations = continue_texts(
                model(),
                contexts,
                evaluation.continuation_len,
                setting.decode,
                setting.hardware.generation_batch_size,
                advance,
                citation_blocker(setting.sequences, setting.decode, tokenizer) if blocked else None,
            )
        save_continuations(work, contexts, continuations.tokens, continuations.stats, tokenizer)
        write_json(work / BATCHES_FILE, continuations.batch_sizes)

    artifact = setting.store.artifact(
        "continuations",
        version=CONTINUATIONS_VERSION,
        config={
            "decode": setting.decode.id_config(blocked),
            "context_len": evaluation.context_len,
            "max_new_tokens": evaluation.continuation_len,
        },
        inputs={"model": model.state.id, "texts": texts.id}
        | ({"blocked": setting.sequences.id} if blocked else {}),
    )
    flops = texts_flops(setting, model, evaluation.total_len, setting.decode.num_candidates)
    return Step(artifact, build, flops)


def citation_blocker(sequences: Artifact, decode: DecodeConfig, tokenizer: Any) -> CitationBlocker:
    """Return the blocker of a decode config, for the training sequences of an artifact."""
    return CitationBlocker(
        load_sequences(sequences).train,
        decode.citation_blocker,
        token_text_in_context(tokenizer),
    )


def base_loglikelihoods_step(
    setting: Setting, base: LazyModel, dataset: str, continuations: Artifact
) -> Step:
    """Return the step of the base model's log-likelihoods of the tuned model's continuations.

    Files: ``loss.npy`` and ``rank.npy`` (N, max_new_tokens) of each token, NaN past the end.
    """
    evaluation, texts = setting.evaluation, setting.texts[dataset]

    def build(work: Path) -> None:
        start = evaluation.context_len
        contexts = load_evaluation_texts(texts).tokens[:, :start]
        generated = [sample["tokens"] for sample in load_continuations(continuations)]
        tokens = append_continuations(contexts, generated, evaluation.total_len)  # (N, T)
        task = f"scoring the tuned model's continuations of {dataset} with {base.label}"
        with setting.progress(task, tokens.size, "tokens") as advance:
            stats = compute_token_stats(
                base(), tokens, setting.hardware.evaluation_batch_size, advance
            )
        lengths = np.array([len(continuation) for continuation in generated])
        past_end = np.arange(evaluation.continuation_len) >= lengths[:, None]
        for name in LOGLIKELIHOODS:
            save_array(work, name, np.where(past_end, np.nan, stats[name][:, start - 1 :]))

    artifact = setting.store.artifact(
        "base_loglikelihoods",
        version=VERSION,
        config=_ties_config(base),
        inputs={"model": base.state.id, "continuations": continuations.id},
    )
    return Step(artifact, build, texts_flops(setting, base, evaluation.total_len))
