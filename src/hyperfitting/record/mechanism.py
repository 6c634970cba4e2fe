"""The part of results.json that explains a tuned model: base and tuned compared (`mechanism`)."""

from pydantic import Field

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.runtime.strict_model import StrictModel


class LayerCurve(StrictModel):
    """Numbers by layer."""

    layers: list[str] = Field(
        description="`embedding`, `block 1`, …, `final norm`, as far as it has them"
    )
    mean: list[float | None] = Field(description="by layer; null: not defined")
    ci95: list[tuple[float, float]] | None = Field(
        description="95% intervals by resampling texts; null: a single text, or not of texts"
    )


class ClassShift(StrictModel):
    """A class of tokens among the choices along the tuned model's continuations."""

    changed: Estimate | None = Field(
        description="share of the tuned model's choices of this class that are not the base "
        "model's; null: it has none"
    )
    tuned: float = Field(description="share of the tuned model's choices that are of this class")
    base: float = Field(description="of the base model's, at the same positions")


class TokenChange(StrictModel):
    """A token that one of the models chooses more often."""

    text: str = Field(description="its text")
    id: int = Field(description="token id")
    tuned: int = Field(description="positions at which the tuned model chooses it")
    base: int = Field(description="positions at which the base model does")
    logit_change: float = Field(
        description="mean change of its log-probability over all positions, in nats"
    )
    rank_gain: float = Field(description="mean number of ranks it gains over all positions")


class RankShift(StrictModel):
    """How the base model ranks what the tuned model chooses, along its continuations."""

    edges: list[int] = Field(description="lowest rank of each bin; the last bin is open")
    counts: list[int] = Field(description="choices in each bin that are not the base model's")
    classes: dict[str, ClassShift] = Field(description="by class of token")
    gained: list[TokenChange] = Field(description="chosen more often by the tuned model")
    lost: list[TokenChange] = Field(description="chosen more often by the base model")


class Mechanism(StrictModel):
    """Comparisons of base and tuned model (`mechanism.measures`)."""

    estimates: dict[str, Estimate] = Field(description="by metric (`mech/`)")
    per_layer: dict[str, LayerCurve] = Field(
        description="by `TEXTS/NAME` (hidden states, on the `reference`, `tuned` and `base` "
        "texts), `weights/NAME`, `weights_spectral/MATRIX`, `weights_effective_rank/MATRIX`, "
        "`lens/NAME`, `loops/TEXTS/NAME`"
    )
    per_step: dict[str, list[float | None]] = Field(
        description="means over texts at each new token of `mech/changed`, "
        "`mech/loop_probability_…`, `mech/margin_…`; null: none has that many"
    )
    ranks: RankShift | None = Field(description="null: not measured")
