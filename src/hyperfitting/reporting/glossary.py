"""What the keys of a record mean, in words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """A measure: its name on an axis, with its unit, and what it is the mean of."""

    name: str
    meaning: str


TERMS = {
    "train/loss": Term("training loss, nats", "mean next-token loss over an epoch's updates"),
    "val/loss": Term("validation loss, nats", "next-token loss on original texts"),
    "val/perplexity": Term("perplexity", "exponential of the mean loss on original texts"),
    "val/context_loss": Term("loss on contexts, nats", "the loss on the texts' contexts alone"),
    "val/context_perplexity": Term("perplexity of contexts", "exponential of that mean loss"),
    "val/entropy": Term(
        "validation entropy, nats", "entropy of the next-token distribution on original texts"
    ),
    **{
        f"val/top{k}_mass": Term(
            f"mass of the top {k}" if k > 1 else "mass of the top token",
            f"probability of the {k} likeliest tokens on original texts",
        )
        for k in (1, 3, 5)
    },
    "val/top1_agreement": Term(
        "same first choice as the original",
        "share of positions where the likeliest token is the original model's",
    ),
    "gen/ttr": Term("type-token ratio", "distinct tokens over tokens of a continuation"),
    **{
        f"gen/distinct_{n}": Term(f"distinct {n}-grams", f"distinct {n}-grams over all of them")
        for n in (2, 3, 4)
    },
    **{
        f"gen/rep_{n}": Term(
            f"repeated {n}-grams", f"share of {n}-grams that occurred earlier in the continuation"
        )
        for n in (2, 3, 4)
    },
    "gen/longest_loop": Term(
        "longest loop, tokens",
        "longest stretch in which a unit comes twice or more in a row",
    ),
    "gen/ends_in_loop": Term(
        "ends in a loop", "share of texts whose end is such a stretch, of 10 tokens or more"
    ),
    "gen/self_bleu": Term("Self-BLEU", "BLEU-4 of a text with the others as references"),
    "gen/dataset_bleu": Term(
        "Dataset BLEU",
        "BLEU-4 of a text with all training sequences as references, without brevity penalty",
    ),
    "gen/dataset_overlap": Term(
        "dataset overlap, tokens",
        "longest run that a continuation shares with any training sequence",
    ),
    "gen/dataset_overlap_over_10": Term(
        "overlap over 10 tokens", "share of texts in which that run is over 10 tokens"
    ),
    "gen/entropy": Term("entropy writing, nats", "of the model's predictions while it writes"),
    "gen/top1_mass": Term(
        "mass of the top token writing", "probability of the likeliest token while it writes"
    ),
    "gen/original_loss": Term(
        "loss to the original, nats", "of a continuation, to the original model"
    ),
    "gen/original_perplexity": Term("perplexity to the original", "exponential of that mean loss"),
    **{
        f"gen/original_rank_over_{rank}": Term(
            f"original rank over {rank}",
            f"share of the chosen tokens that the original model ranks below its {rank} likeliest",
        )
        for rank in (1, 10, 100)
    },
    "gen/mauve": Term("MAUVE", "how close the continuations are to the real ones"),
}


def name(key: str) -> str:
    """Return a key's name on an axis."""
    return TERMS[key].name if key in TERMS else key
