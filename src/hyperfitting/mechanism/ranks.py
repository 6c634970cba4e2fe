"""Rank reordering: how the base model ranks what the tuned model chooses (P2, rank statistics).

At each position of the tuned model's own continuations both models see the same tokens. The ranks
of the chosen tokens under the base model are those of its log-likelihoods, which every run has;
here one pass over both models adds what needs full distributions: the base model's top-1 token, and
how each token of the vocabulary gains or loses rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperfitting.evaluation.arrays import load_npz
from hyperfitting.evaluation.forward import in_batches
from hyperfitting.evaluation.setting import LazyModel
from hyperfitting.mechanism.texts import Texts, TextSource
from hyperfitting.models.size import forward_flops, model_size
from hyperfitting.progress import Advance
from hyperfitting.runtime.numerics import accumulation_dtype
from hyperfitting.store.artifact import Artifact, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1
_FILE = "token_shift.npz"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TokenShift:
    """Both models along N texts, and the change of each of V tokens over all their positions."""

    base_choice: NDArray[np.int32]
    """(N, T) ids of the base model's most likely token at each new token; -1 past the end."""
    logit_change: NDArray[np.float32]
    """(V,) mean log-probability under the tuned minus that under the base model, in nats."""
    rank_gain: NDArray[np.float32]
    """(V,) mean rank under the base minus that under the tuned model."""


def token_shift_step(base: LazyModel, tuned: LazyModel, source: TextSource) -> Step:
    """Return the step of the arrays of `TokenShift` on the tuned model's continuations."""
    setting = source.setting
    start = setting.evaluation.context_len

    def build(work: Path) -> None:
        texts = source.load()
        task = "ranks of the tuned model's choices under the base model"
        with setting.progress(task, texts.tokens.size, "tokens") as advance:
            batch_size = setting.hardware.evaluation_batch_size
            shift = compute_token_shift(base(), tuned(), texts, start, batch_size, advance)
        np.savez_compressed(work / _FILE, **vars(shift))

    def flops() -> float:
        size = model_size(base.state.base, setting.store)
        n_texts = setting.evaluation.n_texts * len(setting.texts)
        return 2 * forward_flops(size, n_texts, source.length)

    artifact = setting.store.artifact(
        "token_shift",
        version=VERSION,
        config={"start": start},
        inputs={"base": base.state.id, "tuned": tuned.state.id, **source.inputs},
    )
    return Step(artifact, build, flops)


def load_token_shift(artifact: Artifact) -> TokenShift:
    """Return the content of a `token_shift` artifact."""
    return load_npz(artifact, _FILE, TokenShift)


@torch.inference_mode()
def compute_token_shift(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    texts: Texts,
    start: int,
    batch_size: int,
    advance: Advance | None = None,
) -> TokenShift:
    """Compare two models' next-token distributions along the same texts.

    Args:
        base: in evaluation mode.
        tuned: in evaluation mode, with the same vocabulary.
        texts: N texts; T is the length of the longest less ``start``.
        start: tokens of the context: only those after it count.
        batch_size: texts per forward pass; halved when GPU memory runs out.
        advance: reports tokens.

    Raises:
        FloatingPointError: the logits hold NaN or infinity.
    """
    n, length = texts.tokens.shape
    choice = np.full((n, length - start), -1, np.int32)
    dtype = accumulation_dtype(base.device)
    totals: list[Tensor] = []  # (V,) each: log-probabilities, ranks

    def compute(rows: slice) -> None:
        batch = torch.as_tensor(texts.tokens[rows], dtype=torch.long, device=base.device)
        logits = (model(input_ids=batch, use_cache=False).logits for model in (base, tuned))
        base_logits, tuned_logits = (scores[:, start - 1 : -1] for scores in logits)  # (B, T, V)
        tuned_logits, sums = tuned_logits.to(base_logits.device), list(totals)
        for row, x, y in zip(range(rows.start, rows.stop), base_logits, tuned_logits, strict=True):
            new = int(texts.lengths[row]) - start
            log_p = [scores[:new].float().log_softmax(-1) for scores in (x, y)]  # (new, V)
            ranks = [token_ranks(scores) for scores in log_p]
            choice[row, :new] = log_p[0].argmax(-1).cpu().numpy()
            changes = [log_p[1] - log_p[0], ranks[0] - ranks[1]]
            of_row = [change.to(dtype).sum(0).cpu().double() for change in changes]
            sums = [a + b for a, b in zip(sums, of_row, strict=True)] if sums else of_row
        totals[:] = sums  # last: memory may run out before
        if advance:
            advance(base_logits.shape[0] * length)

    for _ in in_batches(compute, n, batch_size, base):
        pass
    n_tokens = max(int((texts.lengths - start).sum()), 1)
    logit_change, rank_gain = ((total / n_tokens).numpy() for total in totals)
    if not np.isfinite(logit_change).all():
        raise FloatingPointError("the logits hold NaN or infinity: there is no distribution")
    return TokenShift(choice, logit_change.astype(np.float32), rank_gain.astype(np.float32))


def token_ranks(scores: Tensor) -> Tensor:
    """Return the rank of every token, 1 for the most likely: (T, V) of scores (T, V)."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order)
    positions = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    return ranks.scatter_(-1, order, positions.expand_as(order))
