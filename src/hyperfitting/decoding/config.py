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
_ID = "continuations"
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
