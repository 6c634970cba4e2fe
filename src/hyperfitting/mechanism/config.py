"""The config group `mechanism`: what is measured to explain a tuned model."""

from dataclasses import dataclass

from hyperfitting.fields import RECORD, at_least, one_of, refuse_fields_of, setting

MEASURES = ("geometry", "ranks", "weights", "lens", "loops")


@dataclass
class MechanismConfig:
    """Comparisons of the tuned with the base model (Li et al., ICML 2026); by default none."""

    measures: list[str] = setting(factory=list, enters=RECORD)
    """`geometry`: hidden states layer by layer. `ranks`: which tokens the tuned model chooses, by
    their rank under the base model. `weights`: which matrices changed. `lens`: logit lens by block.
    `loops`: probability of, and attention to, the token that would close a loop. All of them:
    `mechanism=all`. They hold both models in memory."""
    skip_tokens: int = setting(1, enters="layer_geometry")
    """`geometry`: tokens at the start of each text that are left out. The first one is an attention
    sink whose massive activations (Sun et al., 2024) would decide every covariance."""
    outlier_dims: int = setting(3, enters="layer_geometry")
    """`geometry`: dimensions of largest root mean square in the base model's states of the first
    text, layer by layer, without which everything is computed once more."""
    lens_texts: int = setting(4, enters="logit_lens")
    """`lens`: texts of each dataset; each block costs a product with the output layer."""
    loop_ngram: int = setting(2, enters="loop_steps")
    """`loops`: a loop would be closed by the token that followed the last occurrence of the current
    n-gram of this length."""
    loop_texts: int = setting(4, enters="loop_steps")
    """`loops`: texts of each dataset; attention weights are computed without a fused kernel."""

    def __post_init__(self) -> None:
        for measure in self.measures:
            one_of("mechanism.measures", measure, MEASURES)
        self.measures = [measure for measure in MEASURES if measure in self.measures]
        at_least("mechanism.skip_tokens", self.skip_tokens, 0)
        at_least("mechanism.outlier_dims", self.outlier_dims, 0)
        at_least("mechanism.lens_texts", self.lens_texts, 1)
        at_least("mechanism.loop_ngram", self.loop_ngram, 1)
        at_least("mechanism.loop_texts", self.loop_texts, 1)
        kinds = {"geometry": "layer_geometry", "lens": "logit_lens", "loops": "loop_steps"}
        for measure in sorted(kinds.keys() - set(self.measures)):
            needed, hint = f"the measure {measure}", f"mechanism.measures=[{measure}]"
            refuse_fields_of(self, "mechanism", kinds[measure], needed, hint)
