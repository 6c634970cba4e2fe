"""Controls as artifacts: a changed logit distribution in the tuned model's place.

    token_stats of the target model -> logit_transform          entropy_matched
    base, tuned -> logit_means (each) -> logit_transform        static_bias

A control is evaluated as a tuned model is: its predictions on the texts, its continuations, and the
base model's log-likelihoods of these.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from hyperfitting.data.sequences import load_evaluation_texts
from hyperfitting.evaluation.arrays import load_arrays
from hyperfitting.evaluation.artifacts import texts_flops, token_stats_step
from hyperfitting.evaluation.setting import LazyModel, Setting
from hyperfitting.mechanism.entropy_matching import N_PASSES, TOLERANCE, temperature_of
from hyperfitting.mechanism.notes import SUMMARY_FILE
from hyperfitting.mechanism.static_bias import (
    LogitMeans,
    logit_means,
    static_bias,
    tokens_that_gain,
)
from hyperfitting.models.loading import ModelState
from hyperfitting.models.logit_transform import LogitTransform
from hyperfitting.runtime.files import write_json
from hyperfitting.store.artifact import Artifact, Step

VERSION = 1
_MEANS_VERSION = 2
_MEANS = tuple(field.name for field in fields(LogitMeans))


def control_steps(setting: Setting, base: LazyModel, tuned: LazyModel) -> dict[str, Step]:
    """Return the steps of the control that `decode.control` describes, inputs first.

    Args:
        setting: the evaluation texts, and the control.
        base: the base model.
        tuned: the tuned model that the control is made of.

    Returns:
        By name; the last, `control`, holds the `LogitTransform`.
    """
    if setting.decode.control.method == "entropy_matched":
        return _entropy_matched_steps(setting, base, tuned)
    means = {
        "control/logit_means/base": _logit_means_step(setting, base),
        "control/logit_means/tuned": _logit_means_step(setting, tuned),
    }
    return means | {"control": _static_bias_step(setting, *(s.artifact for s in means.values()))}


def control_state(setting: Setting, base: LazyModel, tuned: LazyModel, step: Step) -> ModelState:
    """Return the model with the control's logits; ``step``: `control` of `control_steps`."""
    model = tuned if setting.decode.control.model == "tuned" else base
    return replace(model.state, logit_transform=step.artifact)


def _entropy_matched_steps(setting: Setting, base: LazyModel, tuned: LazyModel) -> dict[str, Step]:
    model, target = (tuned, base) if setting.decode.control.model == "tuned" else (base, tuned)
    target_stats = {name: token_stats_step(setting, target, name) for name in setting.texts}

    def build(work: Path) -> None:
        goal = float(load_arrays(target_stats, ("entropy",))["entropy"].mean(dtype=np.float64))
        texts = _texts(setting)
        target.release()
        total = N_PASSES * sum(tokens.size for tokens in texts)
        with setting.progress("matching the entropy", total, "tokens") as advance:
            temperature = temperature_of(
                model(), texts, goal, setting.hardware.evaluation_batch_size, advance
            )
        LogitTransform(temperature).save(work)
        values = {"temperature": temperature, "target_entropy": goal, "tolerance": TOLERANCE}
        write_json(work / SUMMARY_FILE, values)

    artifact = setting.store.artifact(
        "logit_transform",
        version=VERSION,
        config=setting.decode.control.id_config(),
        inputs={"model": model.state.id}
        | {f"target/{name}": step.artifact.id for name, step in target_stats.items()},
    )
    flops = texts_flops(
        setting, model, setting.evaluation.reference_len, N_PASSES * len(setting.texts)
    )
    named = {f"control/token_stats/{name}": step for name, step in target_stats.items()}
    return named | {"control": Step(artifact, build, flops)}


def _logit_means_step(setting: Setting, model: LazyModel) -> Step:
    """Return the step of a model's mean logits and ranks on all evaluation texts.

    Files: ``FIELD.npy`` (V,) of each field of `LogitMeans`, float64.
    """

    def build(work: Path) -> None:
        texts = _texts(setting)
        total = sum(tokens.size for tokens in texts)
        with setting.progress(f"mean logits of {model.label}", total, "tokens") as advance:
            means = logit_means(model(), texts, setting.hardware.evaluation_batch_size, advance)
        model.release()
        for name in _MEANS:
            np.save(work / f"{name}.npy", getattr(means, name), allow_pickle=False)

    artifact = setting.store.artifact(
        "logit_means",
        version=_MEANS_VERSION,
        config={},
        inputs={"model": model.state.id}
        | {f"texts/{name}": texts.id for name, texts in setting.texts.items()},
    )
    flops = texts_flops(setting, model, setting.evaluation.reference_len, len(setting.texts))
    return Step(artifact, build, flops)


def _static_bias_step(setting: Setting, base: Artifact, tuned: Artifact) -> Step:
    control = setting.decode.control
    strength = float(control.strength or 0)

    def build(work: Path) -> None:
        base_means, tuned_means = _load_means(base), _load_means(tuned)
        tokens = tokens_that_gain(base_means, tuned_means, control.n_tokens, control.gain)
        bias = static_bias(base_means, tuned_means, tokens, control.center)
        LogitTransform(bias=strength * torch.from_numpy(bias)).save(work)
        summary = {
            "n_tokens": len(tokens),
            "mean_offset": float(bias[tokens].mean()),
            "mean_rank_base": float(base_means.rank[tokens].mean()),
            "mean_rank_tuned": float(tuned_means.rank[tokens].mean()),
            "mean_offset_of_all_tokens": float((tuned_means.logits - base_means.logits).mean()),
        }
        write_json(work / SUMMARY_FILE, summary)

    artifact = setting.store.artifact(
        "logit_transform",
        version=VERSION,
        config=control.id_config(),
        inputs={"base": base.id, "tuned": tuned.id},
    )
    return Step(artifact, build)


def _texts(setting: Setting) -> list[np.ndarray[tuple[int, ...], np.dtype[np.int32]]]:
    return [load_evaluation_texts(texts).tokens for texts in setting.texts.values()]


def _load_means(artifact: Artifact) -> LogitMeans:
    return LogitMeans(*(np.load(artifact.file(f"{n}.npy"), allow_pickle=False) for n in _MEANS))
