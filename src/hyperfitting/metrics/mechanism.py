"""Labels, units and formats of the numbers that compare base and tuned model.

They are computed in the package `mechanism`; reports and docs read their names here: `METRICS` by
key for the registry, `LAYER_LABELS` for what is drawn by layer.
"""

from typing import Any

from hyperfitting.metrics.per_text import of_patching

TOKEN_CLASSES = {
    "function": "function words",
    "punctuation": "punctuation",
    "name": "names",
    "digits": "digits",
    "subword": "subword continuations",
    "space": "white space",
    "other": "other words",
}
"""Classes of tokens, with their labels."""
LAYERS = {
    "previous_block": "after the block before the last",
    "last_block": "after the last block, before the final norm",
    "final_norm": "after the final norm",
}
"""Layers whose geometry is a metric of its own."""
_GEOMETRY = {
    "cosine": ("cosine similarity", "cosine similarity of base and tuned state of a token"),
    "l2": ("L2 distance", "L2 distance of base and tuned state of a token"),
    "cka": ("CKA", "debiased linear CKA of base and tuned states of all tokens"),
    "participation_ratio_change": (
        "change of dimension",
        "participation ratio of the covariance of the tuned states minus that of the base states",
    ),
}
LAYER_LABELS = {
    **{name: label for name, (label, _) in _GEOMETRY.items()},
    "base_norm": "L2 norm, base",
    "tuned_norm": "L2 norm, tuned",
    "base_participation_ratio": "participation ratio, base",
    "tuned_participation_ratio": "participation ratio, tuned",
    "frobenius": "relative change (Frobenius)",
    "spectral": "relative change (spectral)",
    "effective_rank": "effective rank of the change",
    "tuned_final_choice": "tuned: final choice",
    "base_final_choice": "base: final choice",
    "same_choice": "same choice of both",
    "diverged": "diverged, where the final choices differ",
    "base_attention_mean": "base, mean of heads",
    "tuned_attention_mean": "tuned, mean of heads",
    "base_attention_max": "base, strongest head",
    "tuned_attention_max": "tuned, strongest head",
}
"""By last part of a key of `Mechanism.per_layer`."""


def layer_label(name: str) -> str:
    """Return the label of a quantity of `Mechanism.per_layer`, such as `cosine`."""
    stem = name.removesuffix("_without_outliers")
    label = LAYER_LABELS.get(stem, stem.removesuffix(".weight"))
    return label if stem == name else f"{label}, without outlier dimensions"


def _entry(label: str, description: str, unit: str = "", form: str = "{:.3f}") -> dict[str, Any]:
    return {"label": label, "description": description, "unit": unit, "format": form}


def _share(label: str, description: str) -> dict[str, Any]:
    return _entry(label, description) | {"is_share": True}


_ALONG = (
    (
        "loop_probability",
        "loop probability",
        "probability by the {model} model of the token that followed the last occurrence of the "
        "current n-gram (`mechanism.loop_ngram`)",
        "",
    ),
    (
        "margin",
        "margin",
        "log-probability by the {model} model of its most likely token minus that of the second",
        "nats",
    ),
)
_PATCHING = {
    "changed": (
        "next token changed by patching",
        "whether the next token is another one, if the output of evaluation.patch_block is the "
        "tuned model's where the base model begins to repeat itself",
    ),
    "broken": (
        "loop broken by patching",
        "whether no repeat begins in the next tokens that the base model then generates",
    ),
    "random_changed": (
        "next token changed by a random patch",
        "as `patch/changed`, with a norm-matched random patch: the control",
    ),
    "random_broken": (
        "loop broken by a random patch",
        "as `patch/broken`, with a norm-matched random patch: the control",
    ),
}
METRICS: dict[str, dict[str, Any]] = {
    **{
        f"patch/{name}": _share(label, description)
        | {"per_text": of_patching(name), "is_binary": True}
        for name, (label, description) in _PATCHING.items()
    },
    **{
        f"mech/{layer}_{name}": _entry(
            f"{label} {where}",
            f"{description}, {where}, on the reference texts",
            form="{:.1f}" if name in ("l2", "participation_ratio_change") else "{:.3f}",
        )
        for layer, where in LAYERS.items()
        for name, (label, description) in _GEOMETRY.items()
    },
    "mech/changed": _share(
        "choices that are not the base's",
        "share of the tuned model's choices that are not the base model's most likely token, at "
        "each step of a continuation; only in `per_step` (over all steps: `gen/base_rank_over_1`)",
    ),
    **{
        f"mech/changed_over_{k}": _share(
            f"changed choices of rank > {k}",
            "of the tuned model's choices that are not the base model's, the share that the base "
            f"model does not rank among its first {k}",
        )
        for k in (10, 100)
    },
    "mech/changed_max_rank": _entry(
        "highest rank of a choice",
        "highest rank under the base model of any of the tuned model's choices",
        form="{:.0f}",
    ),
    **{
        f"mech/changed_{name}": _share(
            f"changed choices, {label}",
            f"share of the tuned model's choices of {label} that are not the base model's",
        )
        for name, label in TOKEN_CLASSES.items()
    },
    "mech/weight_change": _entry(
        "relative weight change",
        "Frobenius norm of the difference of all parameters over that of the base parameters",
        form="{:.4f}",
    ),
    "mech/weight_effective_rank": _entry(
        "effective rank of the weight change",
        "mean over matrices of the effective rank of their difference",
        form="{:.1f}",
    ),
    **{
        f"mech/prediction_depth_{model}": _entry(
            f"prediction depth, {model}",
            f"first block from which on the logit lens shows the {model} model's final choice",
            "blocks",
            "{:.1f}",
        )
        for model in ("tuned", "base")
    },
    "mech/divergence_depth": _entry(
        "divergence depth",
        "first block from which on the logit lenses of base and tuned model show different tokens, "
        "where their final choices differ",
        "blocks",
        "{:.1f}",
    ),
    **{
        f"mech/{name}_{texts}_{model}": _entry(
            f"{label}, {model} on {texts} texts",
            f"{description.format(model=model)}, along the {texts} model's continuations",
            unit,
        )
        | {"is_share": name == "loop_probability"}
        for name, label, description, unit in _ALONG
        for texts in ("tuned", "base")
        for model in ("tuned", "base")
    },
}
"""Arguments of `registry.Metric`, by key."""
