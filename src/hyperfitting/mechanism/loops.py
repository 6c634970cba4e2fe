"""Repetition loops: probability of, and attention to, the token that would continue one.

At each step the current n-gram (the last `mechanism.loop_ngram` tokens) may have occurred before;
the token that followed its last occurrence there would continue the repetition. Measured of both
models, on the texts of both:

- its probability, and the margin between the two most likely tokens;
- by block, the attention weight on it at the current position, as of an induction head (Olsson et
  al., 2022): the mean and the maximum over the block's heads.

Attention weights need transformers' eager attention, one text at a time. Models with layers that
have none (state-space models) give probabilities only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperfitting.evaluation.arrays import load_npz
from hyperfitting.evaluation.setting import LazyModel
from hyperfitting.fields import id_config
from hyperfitting.mechanism.config import MechanismConfig
from hyperfitting.mechanism.texts import Texts, TextSource
from hyperfitting.models import layers
from hyperfitting.models.size import forward_flops, model_size
from hyperfitting.progress import Advance
from hyperfitting.store.artifact import Artifact, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1
_FILE = "loop_steps.npz"
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LoopSteps:
    """One model along N texts, by new token; NaN past the end of a text."""

    probability: Floats
    """(N, T) of the token that would close a loop; NaN where the n-gram is new."""
    margin: Floats
    """(N, T) log-probability of the most likely token minus that of the second, in nats."""
    attention_mean: Floats
    """(L, N, T) attention to the token that would close a loop, mean over the heads of each of L
    blocks; L is 0 where the model has no attention weights."""
    attention_max: Floats
    """(L, N, T) the maximum over the heads."""


def loop_steps_step(
    cfg: MechanismConfig, model: LazyModel, base: LazyModel, source: TextSource
) -> Step:
    """Return the step of the arrays of `LoopSteps` of a model on some continuations."""
    setting = source.setting
    start = setting.evaluation.context_len

    def build(work: Path) -> None:
        texts = source.load().first(cfg.loop_texts)
        task = f"loops of {source.side} texts in {model.label}"
        with setting.progress(task, int(texts.lengths.sum()), "tokens") as advance:
            steps = compute_loop_steps(model(), texts, start, cfg.loop_ngram, advance)
        np.savez_compressed(work / _FILE, **vars(steps))

    def flops() -> float:
        size = model_size(base.state.base, setting.store)
        n_texts = min(cfg.loop_texts, setting.evaluation.n_texts) * len(setting.texts)
        return forward_flops(size, n_texts, source.length)

    artifact = setting.store.artifact(
        "loop_steps",
        version=VERSION,
        config={"start": start, **id_config(cfg, "loop_steps")},
        inputs={"model": model.state.id, **source.inputs},
    )
    return Step(artifact, build, flops)


def load_loop_steps(artifact: Artifact) -> LoopSteps:
    """Return the content of a `loop_steps` artifact."""
    return load_npz(artifact, _FILE, LoopSteps)


@torch.inference_mode()
def compute_loop_steps(
    model: PreTrainedModel,
    texts: Texts,
    start: int,
    n: int,
    advance: Advance | None = None,
) -> LoopSteps:
    """Measure how a model sees the token that would close a loop, at each new token of the texts.

    Args:
        model: in evaluation mode.
        texts: N texts; T is the length of the longest less ``start``.
        start: tokens of the context.
        n: length of the n-grams.
        advance: reports tokens.
    """
    shape = len(texts.lengths), texts.tokens.shape[1] - start
    has_weights = has_attention_weights(model)
    n_blocks = len(layers.blocks(model)) if has_weights else 0
    probability, margin = (np.full(shape, np.nan, np.float32) for _ in range(2))
    attention = np.full((2, n_blocks, *shape), np.nan, np.float32)
    with eager_attention(model) if has_weights else torch.no_grad():
        for row, (tokens, length) in enumerate(zip(texts.tokens, texts.lengths, strict=True)):
            text = tokens[:length]
            ids = torch.as_tensor(text[None], dtype=torch.long, device=model.device)
            options = {"output_attentions": True} if has_weights else {}
            output = model(input_ids=ids, use_cache=False, **options)
            log_p = output.logits[0, start - 1 : -1].float().log_softmax(-1)  # (new, V)
            top = log_p.topk(2).values
            margin[row, : len(top)] = (top[:, 0] - top[:, 1]).cpu().numpy()
            last = last_occurrences(text.tolist(), n)[start:]  # of the token to close the loop
            steps = np.flatnonzero(last >= 0)
            closing = torch.as_tensor(text[last[steps]], dtype=torch.long, device=log_p.device)
            at = torch.as_tensor(steps, device=log_p.device)
            probability[row, steps] = log_p[at, closing].exp().cpu().numpy()
            if has_weights:
                attention[:, :, row, steps] = _attention_to_keys(
                    output.attentions, steps + start - 1, last[steps]
                )
            if advance:
                advance(int(length))
    return LoopSteps(probability, margin, *attention)


def _attention_to_keys(
    weights: Sequence[Tensor], queries: NDArray[np.int64], keys: NDArray[np.int64]
) -> Floats:
    """Return the mean and the largest weight over heads, by block: (2, L, S).

    Args:
        weights: of each of L blocks (1, heads, T, T).
        queries: (S,) positions.
        keys: (S,) for each query the position of one key.
    """
    by_head = [block[0][:, queries, keys].float() for block in weights]  # (heads, S) each
    result: Floats = torch.stack(
        [torch.stack([heads.mean(0), heads.amax(0)]).cpu() for heads in by_head], dim=1
    ).numpy()
    return result


def last_occurrences(tokens: Sequence[int], n: int) -> NDArray[np.int64]:
    """Return where the token lies that followed the last occurrence of the current n-gram.

    Args:
        tokens: (T,) token ids.
        n: length of the n-grams.

    Returns:
        (T,): for each position t the largest j < t with ``tokens[j - n : j] == tokens[t - n : t]``;
        -1 where the n-gram before t is new.
    """
    last = np.full(len(tokens), -1, np.int64)
    seen: dict[tuple[int, ...], int] = {}
    for t in range(n, len(tokens)):
        ngram = tuple(tokens[t - n : t])
        last[t] = seen.get(ngram, -1)
        seen[ngram] = t
    return last


def has_attention_weights(model: PreTrainedModel) -> bool:
    """Return whether every block of a model returns attention weights.

    A short forward pass decides: a state-space model has none, a hybrid one not in every block.
    """
    if layers.cache_argument(model) == "cache_params":
        return False
    ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    with torch.inference_mode(), eager_attention(model):
        output = model(input_ids=ids, use_cache=False, output_attentions=True)
    weights = getattr(output, "attentions", None) or ()
    return len(weights) == len(layers.blocks(model)) and all(w is not None for w in weights)


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Compute attention without a fused kernel, so that its weights exist, inside this context."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
