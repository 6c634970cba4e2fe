"""All metrics: how each is computed, called, explained and written.

Scoring, the terminal, reports, W&B and docs/metrics.md read `METRICS`. A new metric is one pure
function, one entry below, and one test against an independent oracle. (The entries make the file
long.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hyperfitting.metrics import images, mechanism, per_text
from hyperfitting.metrics.diversity import (
    LOOP_TOKENS,
    ROLLING_WINDOW,
    distinct_n,
    ends_in_loop,
    longest_loop,
    rep_n,
    ttr,
)
from hyperfitting.metrics.inputs import ScoringInputs
from hyperfitting.metrics.mauve import MIN_TEXTS, mauve
from hyperfitting.metrics.per_text import LONG_OVERLAP, PerText

Direction = Literal["higher", "lower", ""]
Modality = Literal["text", "image"]


@dataclass(frozen=True)
class Metric:
    """A metric. Its prefix says of what: `gen/` of continuations, `val/` of reference texts,
    `patch/` of activation patching, `mech/` of both models compared, `down/` of downstream
    tasks.

    At most one of ``per_text``, ``exp_of`` and ``per_set`` is given; a metric with none of them is
    measured elsewhere (the training loss; `mech/`).
    """

    key: str
    label: str
    """Short name, for axes and table rows."""
    description: str = ""
    """What is averaged over the texts, in one clause."""
    unit: str = ""
    """Empty for shares and ratios."""
    direction: Direction = ""
    """Which is better; empty: neither by itself."""
    format: str = "{:.3f}"
    """How one of its numbers is written."""
    per_text: PerText | None = None
    """Returns (N,) values, NaN for a text that has none."""
    is_binary: bool = False
    """Whether the value of each text is 0 or 1; then it is a share, too."""
    among_texts: bool = False
    """Whether a text's value depends on the other texts, so that each slice has its own."""
    exp_of: str = ""
    """Key of the metric of whose mean this is the exponential."""
    per_set: Callable[[ScoringInputs], float] | None = None
    """Returns one value for all texts, NaN if there is none; it has no interval."""
    is_share: bool = False
    """Whether it lies between 0 and 1, to which intervals over seeds are clipped."""
    modality: Modality | None = None
    """Of what it is; none: of texts and images."""
    in_summary: bool = False
    """Whether the terminal shows it."""
    in_history: bool = False
    """Whether it is measured after each epoch, on the validation sequences."""

    @property
    def axis_label(self) -> str:
        """Its label with its unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def is_measured(self, inputs: ScoringInputs) -> bool:
        """Return whether a run measures it: what fits its modality, and was computed."""
        if self.modality not in (None, "text" if inputs.images is None else "image"):
            return False
        if self.key.startswith("patch/"):
            return bool(inputs.patching)
        if self.key.startswith("gen/base_"):
            return bool(inputs.base_loglikelihoods)
        if self.key in images.OF_CLASSIFIER:
            return inputs.images is not None and bool(inputs.images.recognition)
        return True

    @property
    def of_continuations(self) -> bool:
        """Whether it is of continuations (`gen/`), and so differs by their length."""
        return self.key.startswith("gen/")


def _mauve(inputs: ScoringInputs) -> float:
    return mauve(*inputs.mauve_features) if inputs.mauve_features else float("nan")


_ALL = (
    Metric(
        "gen/ttr",
        "type-token ratio",
        "distinct tokens over tokens of a continuation",
        direction="higher",
        per_text=per_text.of_continuations(ttr),
        in_summary=True,
        in_history=True,
        is_share=True,
    ),
    *(
        Metric(
            f"gen/distinct_{n}",
            f"distinct {n}-grams",
            f"distinct {n}-grams over all {n}-grams of a continuation",
            direction="higher",
            per_text=per_text.of_continuations(distinct_n, n),
            is_share=True,
        )
        for n in (2, 3, 4)
    ),
    *(
        Metric(
            f"gen/rep_{n}",
            f"repeated {n}-grams",
            f"share of {n}-grams that occurred earlier in the continuation: 1 - distinct-{n}",
            direction="lower",
            per_text=per_text.of_continuations(rep_n, n),
            in_summary=n < 4,
            in_history=n == 2,
            is_share=True,
        )
        for n in (2, 3, 4)
    ),
    Metric(
        "gen/n_tokens",
        "length of an answer",
        "tokens until the model ends its answer, at most evaluation.chat_max_new_tokens; only of "
        "answers to questions (with evaluation.chat)",
        unit="tokens",
        format="{:.0f}",
        in_summary=True,
    ),
    Metric(
        f"gen/ttr_last_{ROLLING_WINDOW}",
        f"type-token ratio of the last {ROLLING_WINDOW} tokens",
        f"distinct tokens over tokens of the last {ROLLING_WINDOW} tokens, at each step of a "
        "continuation; only in `per_step`",
        direction="higher",
        is_share=True,
    ),
    Metric(
        "gen/longest_loop",
        "longest loop",
        "longest span in which a unit occurs twice or more in a row; an unfinished last repetition "
        "counts",
        unit="tokens",
        direction="lower",
        format="{:.1f}",
        per_text=per_text.of_continuations(longest_loop),
    ),
    Metric(
        "gen/ends_in_loop",
        "ends in a loop",
        f"share of continuations that end in such a span, of {LOOP_TOKENS} tokens or more",
        direction="lower",
        format="{:.2f}",
        per_text=per_text.of_continuations(ends_in_loop),
        is_binary=True,
        in_summary=True,
        is_share=True,
    ),
    Metric(
        "gen/self_bleu",
        "Self-BLEU",
        "BLEU of a continuation with the others of its slice as references, with brevity penalty "
        "(n-grams up to evaluation.bleu_n)",
        direction="lower",
        per_text=per_text.self_bleu,
        modality="text",
        among_texts=True,
        in_summary=True,
        is_share=True,
    ),
    Metric(
        "gen/dataset_bleu",
        "Dataset BLEU",
        "BLEU of a continuation with all training sequences as references, without brevity "
        "penalty (n-grams up to evaluation.bleu_n)",
        direction="lower",
        per_text=per_text.dataset_bleu,
        modality="text",
        is_share=True,
    ),
    Metric(
        "gen/dataset_overlap",
        "dataset overlap",
        "longest run that a continuation shares with any training sequence",
        unit="tokens",
        direction="lower",
        format="{:.1f}",
        per_text=per_text.overlap,
        in_summary=True,
    ),
    Metric(
        f"gen/dataset_overlap_over_{LONG_OVERLAP}",
        f"dataset overlap > {LONG_OVERLAP}",
        f"share of continuations in which that run is over {LONG_OVERLAP} tokens",
        direction="lower",
        per_text=per_text.overlap_is_long,
        is_binary=True,
        is_share=True,
    ),
    Metric(
        "gen/entropy",
        "generation entropy",
        "entropy of the model's own next-token distribution while it generates, before any "
        "truncation",
        unit="nats",
        format="{:.2f}",
        per_text=per_text.while_generating("entropy"),
        in_summary=True,
    ),
    Metric(
        "gen/top1_mass",
        "generation top-1 mass",
        "probability of the most likely token while it generates, before any truncation",
        per_text=per_text.while_generating("top1_mass"),
        is_share=True,
    ),
    Metric(
        "gen/base_loss",
        "loss under the base model",
        "loss of a continuation under the base model",
        unit="nats",
        format="{:.2f}",
        per_text=per_text.base_loss,
    ),
    Metric(
        "gen/base_perplexity",
        "perplexity under the base model",
        "exponential of the mean loss under the base model",
        format="{:.1f}",
        exp_of="gen/base_loss",
        in_summary=True,
    ),
    *(
        Metric(
            f"gen/base_rank_over_{k}",
            f"rank > {k} under the base model",
            (
                f"share of the chosen tokens that are not among the base model's {k} most likely"
                if k > 1
                else "share of the chosen tokens that are not the base model's most likely"
            )
            + "; EOS counts in the ranking, and is masked unless decode.stop_at_eos is on",
            per_text=per_text.base_rank_over(k),
            in_summary=k == 1,
            is_share=True,
        )
        for k in (1, 10, 100)
    ),
    Metric(
        "gen/mauve",
        "MAUVE",
        "how close the distribution of the continuations is to that of the references "
        f"(with evaluation.mauve; {MIN_TEXTS} texts or more)",
        direction="higher",
        per_set=_mauve,
        modality="text",
        in_summary=True,
        is_share=True,
    ),
    Metric(
        "val/loss",
        "validation loss",
        "next-token loss on the reference texts",
        unit="nats",
        direction="lower",
        format="{:.2f}",
        per_text=per_text.on_references("loss"),
        in_history=True,
    ),
    Metric(
        "val/perplexity",
        "validation perplexity",
        "exponential of the mean validation loss",
        direction="lower",
        format="{:.1f}",
        exp_of="val/loss",
        in_summary=True,
    ),
    Metric(
        "val/context_loss",
        "loss on contexts",
        "next-token loss on the contexts of the reference texts alone",
        unit="nats",
        direction="lower",
        format="{:.2f}",
        per_text=per_text.context_loss,
    ),
    Metric(
        "val/context_perplexity",
        "perplexity on contexts",
        "exponential of the mean loss on contexts",
        direction="lower",
        format="{:.1f}",
        exp_of="val/context_loss",
    ),
    Metric(
        "val/entropy",
        "validation entropy",
        "entropy of the next-token distribution on the reference texts",
        unit="nats",
        format="{:.2f}",
        per_text=per_text.on_references("entropy"),
        in_summary=True,
        in_history=True,
    ),
    *(
        Metric(
            f"val/top{k}_mass",
            f"top-{k} mass",
            f"probability of the {k} most likely tokens on the reference texts"
            if k > 1
            else "probability of the most likely token on the reference texts",
            per_text=per_text.on_references(f"top{k}_mass"),
            in_summary=True,
            is_share=True,
        )
        for k in (1, 3, 5)
    ),
    Metric(
        "val/top1_agreement",
        "same top-1 token as the base",
        "share of positions of the reference texts where the most likely token is the base model's",
        per_text=per_text.top1_agreement,
        in_summary=True,
        is_share=True,
    ),
    Metric(
        "train/loss",
        "training loss",
        "next-token loss on the training sequences, averaged over an epoch's optimizer steps",
        unit="nats",
        direction="lower",
        in_history=True,
    ),
    Metric(
        "train/accuracy",
        "training token accuracy",
        "share of the training tokens that are the most likely one (with trainer.target_accuracy)",
        direction="higher",
        in_history=True,
        is_share=True,
    ),
    *(Metric(key, modality="image", **entry) for key, entry in images.METRICS.items()),
    *(Metric(key, **texts) for key, texts in mechanism.METRICS.items()),
    Metric(
        "down/likelihood",
        "accuracy by likelihood",
        "share of the questions of all downstream tasks whose right answer is the most likely one",
        direction="higher",
        is_share=True,
    ),
    Metric(
        "down/generation",
        "accuracy by generation",
        "share of the questions of all downstream tasks to which the model writes the right answer",
        direction="higher",
        is_share=True,
    ),
    *(
        Metric(
            f"down/{form}_gain",
            f"gain of accuracy by {form}",
            f"accuracy by {form} minus the base model's on the same questions",
            direction="higher",
            format="{:+.3f}",
        )
        for form in ("likelihood", "generation")
    ),
    Metric(
        "down/brier",
        "Brier score",
        "squared distance of the choices' probabilities from the right answer, in multiple-choice "
        "tasks by likelihood",
        direction="lower",
    ),
)
METRICS: dict[str, Metric] = {entry.key: entry for entry in _ALL}
"""By key, in the order in which they are shown."""


def metric(key: str) -> Metric:
    """Return the metric of a key; of an unknown key (of another tool), one labelled by the key."""
    return METRICS.get(key) or Metric(key, label=key)
