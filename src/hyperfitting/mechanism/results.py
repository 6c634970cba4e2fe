"""From the artifacts of the measures to the record's `mechanism`."""

from __future__ import annotations

from hyperfitting.evaluation.scoring import Comparison
from hyperfitting.mechanism.artifacts import MechanismArtifacts
from hyperfitting.mechanism.choices import Choices, TokenText
from hyperfitting.mechanism.geometry import load_geometry
from hyperfitting.mechanism.logit_lens import load_lens_choices
from hyperfitting.mechanism.loops import load_loop_steps
from hyperfitting.mechanism.ranks import load_token_shift
from hyperfitting.mechanism.summaries import (
    Curves,
    geometry_curves,
    geometry_estimates,
    lens_curves,
    loop_curves,
    step_mean,
    step_means,
    weight_curves,
    weight_estimates,
)
from hyperfitting.mechanism.weight_change import load_weight_changes
from hyperfitting.metrics.estimate import Estimate
from hyperfitting.record.mechanism import Mechanism


def build_mechanism(
    artifacts: MechanismArtifacts, comparison: Comparison, token_text: TokenText, resamples: int
) -> Mechanism:
    """Return what the record holds of the measures.

    Args:
        artifacts: of the measures; built.
        comparison: the scores, whose texts are those of the measures.
        token_text: the text of a token id inside a text.
        resamples: bootstrap resamples of the texts.
    """
    estimates: dict[str, Estimate | None] = {}
    curves: Curves = {}
    per_step: dict[str, list[float | None]] = {}
    ranks = None
    for texts, step in artifacts.geometry.items():
        geometry = load_geometry(step.artifact)
        of_texts = geometry_curves(geometry, resamples)
        curves |= {f"{texts}/{name}": curve for name, curve in of_texts.items()}
        if texts == "reference":
            estimates |= geometry_estimates(of_texts, geometry.trace.shape[-1])
    for step in artifacts.ranks.values():
        choices = Choices(comparison, load_token_shift(step.artifact), token_text)
        ranks = choices.ranks(resamples)
        estimates |= choices.estimates(resamples)
        per_step["mech/changed"] = choices.changed_by_step()
    for step in artifacts.weights.values():
        changes = load_weight_changes(step.artifact)
        curves |= weight_curves(changes)
        estimates |= weight_estimates(changes)
    for step in artifacts.lens.values():
        of_lens, means = lens_curves(load_lens_choices(step.artifact), resamples)
        curves |= {f"lens/{name}": curve for name, curve in of_lens.items()}
        estimates |= means
    for name, step in artifacts.loops.items():
        texts, model = name.split("/")
        steps = load_loop_steps(step.artifact)
        attention = loop_curves(steps, model, resamples)
        curves |= {f"loops/{texts}/{key}": curve for key, curve in attention.items()}
        for quantity, rows in (("loop_probability", steps.probability), ("margin", steps.margin)):
            key = f"mech/{quantity}_{texts}_{model}"
            estimates[key] = step_mean(rows, resamples)
            per_step[key] = step_means(rows)
    return Mechanism(
        estimates={key: value for key, value in estimates.items() if value is not None},
        per_layer=curves,
        per_step=per_step,
        ranks=ranks,
    )
