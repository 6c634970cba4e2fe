"""From the arrays of the measures to what the record holds: means with intervals, by layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperfitting.mechanism.geometry import TOKEN_MEANS, WITHOUT_OUTLIERS, Geometry
from hyperfitting.mechanism.hidden_states import EMBEDDING, FINAL_NORM, layer_names
from hyperfitting.mechanism.logit_lens import LensChoices, divergence_depth, prediction_depth
from hyperfitting.mechanism.loops import LoopSteps
from hyperfitting.mechanism.resampling import Floats, Resampling, curve_of, estimate
from hyperfitting.mechanism.weight_change import OUTPUT_LAYER, ParameterChange
from hyperfitting.metrics.estimate import Estimate
from hyperfitting.metrics.mechanism import LAYERS
from hyperfitting.record.mechanism import LayerCurve

Curves = dict[str, LayerCurve]
_MODELS = ("base", "tuned")


def geometry_curves(geometry: Geometry, resamples: int) -> Curves:
    """Return the layer geometry on some texts, by `LAYER_LABELS` of `metrics.mechanism`."""
    layers = geometry.layers.tolist()
    resampling = Resampling(geometry.trace.shape[-1], resamples)
    names = [*TOKEN_MEANS, *(name + WITHOUT_OUTLIERS for name in TOKEN_MEANS)]
    curves = {
        name: resampling.curve(layers, values)
        for name, values in zip(names, geometry.token_means, strict=True)
    }
    estimates = [_dimensions(geometry, layer, resampling) for layer in range(len(layers))]
    curves |= {
        name: curve_of(layers, [at_layer[name] for at_layer in estimates]) for name in estimates[0]
    }
    return curves


@np.errstate(invalid="ignore", divide="ignore")  # of fewer than four tokens nothing is defined
def _dimensions(
    geometry: Geometry, layer: int, resampling: Resampling
) -> dict[str, Estimate | None]:
    """Return participation ratios of both models with their difference, and CKA, at a layer."""
    n = geometry.trace.shape[-1]
    estimates: dict[str, Estimate | None] = {}
    for trim, suffix in enumerate(("", WITHOUT_OUTLIERS)):
        ratios, resampled, norms = [], [], []
        for model, name in enumerate(_MODELS):
            trace = geometry.trace[layer, model, trim].astype(np.float64)
            gram = geometry.gram[layer, model, trim].astype(np.float64)
            norms.append(resampling.squared_norms(gram))
            ratios.append(float(geometry.participation_ratio[layer, model, trim]))
            traces = resampling.counts @ trace / trace.sum()
            resampled.append(ratios[-1] * np.square(traces) / norms[-1])
            key = f"{name}_participation_ratio{suffix}"
            estimates[key] = estimate(ratios[-1], resampled[-1], n)
        estimates[f"participation_ratio_change{suffix}"] = estimate(
            ratios[1] - ratios[0], resampled[1] - resampled[0], n
        )
        cka = float(geometry.cka[layer, trim])
        cross = resampling.squared_norms(geometry.cross_gram[layer, trim].astype(np.float64))
        estimates[f"cka{suffix}"] = estimate(cka, cka * cross / np.sqrt(norms[0] * norms[1]), n)
    return estimates


def geometry_estimates(curves: Curves, n_texts: int) -> dict[str, Estimate]:
    """Return the geometry of the last layers as metrics, `mech/LAYER_NAME`."""
    estimates = {}
    for name in ("cosine", "l2", "cka", "participation_ratio_change"):
        curve = curves[name]
        for place, layer in zip(LAYERS, (-3, -2, -1), strict=True):
            mean = curve.mean[layer]
            if mean is not None:
                ci95 = curve.ci95[layer] if curve.ci95 else None
                estimates[f"mech/{place}_{name}"] = Estimate(mean, ci95, n_texts)
    return estimates


def weight_curves(changes: Sequence[ParameterChange]) -> Curves:
    """Return the relative change by layer, of all its parameters and of each of its matrices.

    `weights/frobenius`: of all parameters of a layer together. By block: `weights/spectral` and
    `weights/effective_rank`, means over its matrices; and of one matrix, such as
    `mlp.down_proj.weight`, `weights/PART` (Frobenius), `weights_spectral/PART` and
    `weights_effective_rank/PART`.
    """
    names = {change.layer for change in changes}
    blocks = sorted((n for n in names if n.startswith("block ")), key=lambda n: int(n.split()[1]))
    layers = [n for n in (EMBEDDING, *blocks, FINAL_NORM, OUTPUT_LAYER) if n in names]
    by_layer = {layer: [c for c in changes if c.layer == layer] for layer in layers}
    by_block = [by_layer[block] for block in blocks]
    curves = {"weights/frobenius": _curve(layers, [_relative(by_layer[at]) for at in layers])}
    for name in ("spectral", "effective_rank"):
        means = [_mean([getattr(c, name) for c in of_block]) for of_block in by_block]
        curves[f"weights/{name}"] = _curve(blocks, means)
    for part in dict.fromkeys(c.part for b in by_block for c in b if c.spectral is not None):
        of_part = [[c for c in of_block if c.part == part] for of_block in by_block]
        curves[f"weights/{part}"] = _curve(blocks, [_relative(c) for c in of_part])
        for name in ("spectral", "effective_rank"):
            values = [_mean([getattr(c, name) for c in at]) for at in of_part]
            curves[f"weights_{name}/{part}"] = _curve(blocks, values)
    return curves


def _curve(layers: Sequence[str], values: Sequence[float | None]) -> LayerCurve:
    return LayerCurve(layers=list(layers), mean=list(values), ci95=None)


def _relative(changes: Sequence[ParameterChange]) -> float | None:
    """Return the Frobenius norm of the difference of some parameters over that of the base's."""
    norm = sum(change.squared_norm for change in changes)
    return float(np.sqrt(sum(change.squared_change for change in changes) / norm)) if norm else None


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def weight_estimates(changes: Sequence[ParameterChange]) -> dict[str, Estimate]:
    """Return the relative change of all parameters, and the mean effective rank of the matrices."""
    values = {
        "mech/weight_change": _relative(changes),
        "mech/weight_effective_rank": _mean([change.effective_rank for change in changes]),
    }
    return {key: Estimate(value, None, 1) for key, value in values.items() if value is not None}


def lens_curves(choices: LensChoices, resamples: int) -> tuple[Curves, dict[str, Estimate]]:
    """Return shares of positions by block, and the mean prediction and divergence depth.

    `base_final_choice`, `tuned_final_choice`: positions at which the lens shows the model's final
    choice at this and all later blocks. `same_choice`: at which both lenses show the same token.
    `diverged`: of the positions at which the final choices differ, those at which the lenses differ
    at this and all later blocks.
    """
    n_layers, n_texts, _ = choices.base.shape
    layers = layer_names(n_layers - 1)[:-1]
    resampling = Resampling(n_texts, resamples)
    present = choices.base[-1] >= 0  # (N, T)
    predicted = {model: prediction_depth(getattr(choices, model)) for model in _MODELS}
    divergence = divergence_depth(choices.base, choices.tuned)
    differ = divergence < n_layers
    depth = np.arange(n_layers)[:, None, None]
    shares = {
        f"{model}_final_choice": ((depth >= first) & present, present)
        for model, first in predicted.items()
    }
    shares["same_choice"] = ((choices.base == choices.tuned) & present, present)
    shares["diverged"] = ((depth >= divergence) & differ, differ)
    curves = {
        name: curve_of(layers, [resampling.ratio(h.sum(1), of.sum(1)) for h in holds])
        for name, (holds, of) in shares.items()
    }
    sums = {
        f"mech/prediction_depth_{model}": (first * present, present)
        for model, first in predicted.items()
    } | {"mech/divergence_depth": (divergence * differ, differ)}
    estimates = {key: resampling.ratio(v.sum(1), of.sum(1)) for key, (v, of) in sums.items()}
    return curves, {key: value for key, value in estimates.items() if value is not None}


def loop_curves(steps: LoopSteps, model: str, resamples: int) -> Curves:
    """Return the attention of a model to the token that would close a loop, by block."""
    resampling = Resampling(len(steps.margin), resamples)
    layers = layer_names(len(steps.attention_mean))[1:-1]
    return {
        f"{model}_{name}": curve_of(layers, [resampling.ratio(*_sums(b)) for b in blocks])
        for name, blocks in (
            ("attention_mean", steps.attention_mean),
            ("attention_max", steps.attention_max),
        )
        if len(blocks)
    }


def step_mean(rows: NDArray[Any], resamples: int) -> Estimate | None:
    """Return the mean of all numbers of some texts (N, T); NaN: there is none."""
    return Resampling(len(rows), resamples).ratio(*_sums(rows))


def _sums(rows: NDArray[Any]) -> tuple[Floats, Floats]:
    """Return the sum of each row's numbers, and how many it has."""
    present = ~np.isnan(rows)
    return np.where(present, rows, 0).sum(1, dtype=np.float64), present.sum(1).astype(np.float64)


def step_means(rows: NDArray[Any]) -> list[float | None]:
    """Return the mean of each column's numbers (N, T); none for a column without any."""
    totals, counts = _sums(rows.T)
    return [float(t / n) if n else None for t, n in zip(totals, counts, strict=True)]
