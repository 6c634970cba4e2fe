"""The config group `decode`: how the next token is chosen.

Field names are those of transformers' `GenerationConfig` where it has the same setting.
"""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from hyperfitting.fields import (
    RECORD,
    above_zero,
    at_least,
    id_config,
    in_range,
    one_of,
    refuse_unused,
    required,
    setting,
)

STRATEGIES = ("greedy", "sample", "beam", "contrastive")
CONTROLS = ("none", "entropy_matched", "static_bias")
RANK_GAINS = ("rank", "log_rank", "reciprocal_rank")
_ID = "continuations"
_CONTROL = "logit_transform"
_SAMPLE = ("sample",)


@dataclass
class CitationBlockerConfig:
    """Forbid quoting the training data (Carlsson et al., section 5)."""

    enabled: bool = setting(False, enters=_ID)
    """Whether it is on. The base model has no training data: for it nothing is forbidden."""
    n: int = setting(5, enters=_ID)
    """N-gram length: if the last n generated tokens occur in a training sequence, the token that
    follows them there is forbidden."""
    whole_words: bool = setting(True, enters=_ID)
    """A word that has begun may be completed (the paper's rule); off: the very next token is
    forbidden, and no continuation shares n + 1 consecutive tokens with the training data."""
    count_context: bool = setting(False, enters=_ID)
    """The last n tokens may start in the context; off: all of them are generated."""

    def __post_init__(self) -> None:
        at_least("decode.citation_blocker.n", self.n, 1)


@dataclass
class ControlConfig:
    """Replace the tuned model by one of which only the logits are changed (Li et al., ICML 2026).

    Does a change that every position shares do what tuning does? The change is part of the model:
    its predictions on the evaluation texts follow it too.
    """

    method: str = setting("none", enters=RECORD)
    """`none`: the tuned model itself. `entropy_matched`: `model` at the temperature at which its
    mean entropy on the evaluation texts is the other model's. `static_bias`: the base model with
    `strength` times the mean logit offset (tuned minus base, on the evaluation texts) of the
    `n_tokens` tokens that gain most rank."""
    model: str = setting("base", enters=_CONTROL, read_by=("entropy_matched",))
    """Whose temperature is changed: `base` (cooled to the tuned model's entropy) or `tuned` (heated
    to the base model's)."""
    strength: float | None = setting(None, enters=_CONTROL, read_by=("static_bias",))
    """Factor of the offset."""
    n_tokens: int = setting(500, enters=_CONTROL, read_by=("static_bias",))
    """Tokens with an offset; all others keep their logits."""
    gain: str = setting("rank", enters=_CONTROL, read_by=("static_bias",))
    """How a token's gain is measured: mean over positions of its `rank` (as in the paper; decided
    by rare tokens), `log_rank` or `reciprocal_rank` (decided by the most likely tokens)."""
    center: bool = setting(False, enters=_CONTROL, read_by=("static_bias",))
    """Subtract the mean offset of the whole vocabulary: logits are defined up to a constant, and
    tuning may change that constant too. Off: as in the paper's formula."""

    def __post_init__(self) -> None:
        one_of("decode.control.method", self.method, CONTROLS)
        one_of("decode.control.model", self.model, ("base", "tuned"))
        at_least("decode.control.n_tokens", self.n_tokens, 1)
        one_of("decode.control.gain", self.gain, RANK_GAINS)
        refuse_unused(self, "decode.control", "method")
        if self.method == "static_bias":
            hint = "decode.control.strength=0.1"
            required("decode.control.strength", self.strength, "the offset's factor", hint)
            in_range("decode.control.strength", float(self.strength or 0), -100, 100)

    @property
    def is_on(self) -> bool:
        """Whether the tuned model is replaced."""
        return self.method != "none"

    def id_config(self) -> dict[str, Any]:
        """Return the method and the fields that it reads."""
        return {"method": self.method} | id_config(self, _CONTROL, "method")


@dataclass
class DecodeConfig:
    """How the next token is chosen."""

    name: str = setting(MISSING, enters=RECORD)
    """Short name for tables and W&B."""
    strategy: str = setting("greedy", enters=_ID)
    """`greedy`: the most likely token. `sample`: a draw after temperature, top-k, top-p, min-p and
    typical-p, in this order. `beam`: beam search with `num_beams`. `contrastive`: among the `top_k`
    most likely tokens, the best trade-off of probability against similarity to the preceding
    tokens (Su et al., 2022)."""
    temperature: float = setting(1.0, enters=_ID, read_by=_SAMPLE)
    """Logits are divided by this."""
    top_k: int | None = setting(None, enters=_ID, read_by=("sample", "contrastive"))
    """`sample`: keep the k most likely tokens. `contrastive`: number of candidates."""
    top_p: float = setting(1.0, enters=_ID, read_by=_SAMPLE)
    """Nucleus sampling: the smallest set of most likely tokens with at least this mass."""
    min_p: float = setting(0.0, enters=_ID, read_by=_SAMPLE)
    """Keep tokens with at least this fraction of the top probability (Nguyen et al., 2024)."""
    typical_p: float = setting(1.0, enters=_ID, read_by=_SAMPLE)
    """Locally typical sampling: tokens with information content closest to the entropy, up to this
    mass (Meister et al., 2023)."""
    num_beams: int = setting(1, enters=_ID, read_by=("beam",))
    """Beam width."""
    penalty_alpha: float = setting(0.0, enters=_ID, read_by=("contrastive",))
    """Weight of the similarity penalty, from 0 (greedy) to 1."""
    repetition_penalty: float = setting(1.0, enters=_ID)
    """Any strategy: logits of tokens already in context or continuation are divided by this where
    positive, multiplied where negative (Keskar et al., 2019)."""
    no_repeat_ngram_size: int | None = setting(None, enters=_ID)
    """Any strategy: no n-gram of this length occurs twice in context and continuation."""
    citation_blocker: CitationBlockerConfig = setting(factory=CitationBlockerConfig, enters=RECORD)
    """Any strategy: forbid quoting the training data. Enters the ids of the tuned model's
    continuations only."""
    control: ControlConfig = setting(factory=ControlConfig, enters=RECORD)
    """Any strategy: controls in the tuned model's place."""
    stop_at_eos: bool = setting(False, enters=_ID)
    """Let a continuation end at the end-of-text token. Off: that token is forbidden, so that all
    continuations have full length and their type-token ratios are comparable."""
    seed: int = setting(MISSING, enters=_ID, read_by=_SAMPLE)
    """Random draws; each context has its own stream, whatever the batch."""

    def __post_init__(self) -> None:
        one_of("decode.strategy", self.strategy, STRATEGIES)
        above_zero("decode.temperature", self.temperature)
        at_least("decode.top_k", self.top_k, 2 if self.strategy == "contrastive" else 1)
        in_range("decode.top_p", self.top_p, 0, 1, low_included=False)
        in_range("decode.min_p", self.min_p, 0, 1)
        in_range("decode.typical_p", self.typical_p, 0, 1, low_included=False)
        at_least("decode.num_beams", self.num_beams, 2 if self.strategy == "beam" else 1)
        in_range("decode.penalty_alpha", self.penalty_alpha, 0, 1)
        above_zero("decode.repetition_penalty", self.repetition_penalty)
        at_least("decode.no_repeat_ngram_size", self.no_repeat_ngram_size, 1)
        at_least("decode.seed", self.seed, 0)
        if self.strategy == "contrastive":
            required("decode.top_k", self.top_k, "the candidates", "decode=contrastive")
        refuse_unused(self, "decode", "strategy", allowed=("seed",))

    @property
    def num_candidates(self) -> int:
        """Rows that decoding one text takes: beams or contrastive candidates."""
        return {"beam": self.num_beams, "contrastive": int(self.top_k or 1)}.get(self.strategy, 1)

    def id_config(self, blocked: bool) -> dict[str, Any]:
        """Return the settings that determine the tokens; ``blocked``: the blocker is active."""
        settings = id_config(self, _ID, "strategy")
        if blocked:
            settings["citation_blocker"] = id_config(self.citation_blocker, _ID)
        return settings
