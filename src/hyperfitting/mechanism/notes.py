"""Notes of the record on an intervention or control evaluated in place of the tuned model."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from hyperfitting.decoding.config import ControlConfig
from hyperfitting.mechanism.intervention_config import InterventionConfig
from hyperfitting.store.artifact import Step

SUMMARY_FILE = "summary.json"
"""Of the artifacts `intervention` and `logit_transform`: the numbers that notes give."""


def replacement_notes(
    intervention: InterventionConfig, control: ControlConfig, steps: Mapping[str, Step]
) -> Iterator[str]:
    """Yield the notes on the model that is evaluated in place of the tuned model.

    Args:
        intervention: how its weights were derived.
        control: how its logits were changed.
        steps: those of both, built.
    """
    if intervention.is_on:
        summary = _summary(steps["intervention"])
        share = summary["n_replaced"] / summary["n_parameters"]
        yield (
            f"the tuned model is an intervention ({intervention.method}): {share:.1%} of its "
            "parameters are in matrices and vectors that differ from the base model's; all weights "
            f"moved by {summary['relative_change']:.2%} of their norm"
        )
    if control.method == "entropy_matched":
        summary = _summary(steps["control"])
        other = "base" if control.model == "tuned" else "tuned"
        yield (
            f"in the tuned model's place: the {control.model} model at temperature "
            f"{summary['temperature']:.4f}, at which its mean entropy on the evaluation texts is "
            f"the {other} model's {summary['target_entropy']:.3f} nats; a temperature preserves "
            f"the token ranking, so its greedy continuations are the {control.model} model's"
        )
    if control.method == "static_bias":
        summary = _summary(steps["control"])
        yield (
            f"in the tuned model's place: the base model plus {control.strength:g} times the mean "
            f"logit offset of the {summary['n_tokens']} tokens that gain most {control.gain} "
            f"(mean rank {summary['mean_rank_base']:,.0f} -> {summary['mean_rank_tuned']:,.0f}; "
            f"offset {summary['mean_offset']:+.2f}, of all tokens "
            f"{summary['mean_offset_of_all_tokens']:+.2f})"
        )


def _summary(step: Step) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(step.artifact.file(SUMMARY_FILE).read_text("utf-8"))
    return summary
