"""Activation patching: does one block's output of the tuned model break the base model's loop?

The base model's greedy continuation of a context begins to repeat a span of `LOOP_TOKENS` tokens at
some position. There, once, the output of block k is replaced by the tuned model's, given the same
preceding tokens; everything before and after is the base model's own. Each block separately.

Two controls: an unpatched row in the same batch, which everything is compared with; and a
norm-matched random patch, which is as far from the base model's output as the tuned model's is, in
a random direction: an effect that it has too is not specific to the tuned model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperfitting.decoding.backends.plain import PlainBackend
from hyperfitting.decoding.constraints import Constraints
from hyperfitting.mechanism.hidden_states import hidden_states_of, recorded_states
from hyperfitting.metrics.diversity import LOOP_TOKENS
from hyperfitting.models.layers import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

N_NEW = 32
"""Tokens that are decoded from the patched position on."""


def repeat_prefix(tokens: NDArray[np.int64], start: int) -> NDArray[np.int64] | None:
    """Return a text up to and including the token with which it begins to repeat itself.

    Args:
        tokens: (T,) context and continuation.
        start: length of the context.

    Returns:
        (t + 1,), where t is the first position of the continuation at which a span of
        `LOOP_TOKENS` tokens begins that has begun before; None if there is none.
    """
    seen: set[tuple[int, ...]] = set()
    for t in range(len(tokens) - LOOP_TOKENS + 1):
        span = tuple(tokens[t : t + LOOP_TOKENS].tolist())
        if t >= start and span in seen:
            return tokens[: t + 1]
        seen.add(span)
    return None


def patch_effect(
    prefix: NDArray[np.int64], tokens: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return whether each block's patch changed the next token and broke the loop.

    Args:
        prefix: (t,) tokens before the patched position's prediction.
        tokens: (1 + L, N_NEW) of `patched_continuations`; the first row is not patched.

    Returns:
        ``changed`` and ``broken`` (L,) of `PATCHING`; NaN where the unpatched row does not repeat.
    """
    unpatched, patched = tokens[0], tokens[1:]
    if not _repeats(prefix, unpatched):
        return np.full(len(patched), np.nan), np.full(len(patched), np.nan)
    broken = np.array([not _repeats(prefix, new) for new in patched], dtype=np.float64)
    return (patched[:, 0] != unpatched[0]).astype(np.float64), broken


def _repeats(prefix: NDArray[np.int64], new_tokens: NDArray[np.int64]) -> bool:
    return repeat_prefix(np.concatenate([prefix, new_tokens]), len(prefix)) is not None


@torch.inference_mode()
def block_outputs(model: PreTrainedModel, prefix: NDArray[np.int64]) -> Tensor:
    """Return the output (L, H) of each block at the position that predicts a prefix's last token.

    Args:
        model: in evaluation mode.
        prefix: (t + 1,) tokens; the last one is what is predicted.
    """
    with recorded_states(blocks(model)) as states:
        model(input_ids=_ids(model, prefix[None, :-1]), use_cache=False)
    return torch.stack([state[0, -1].float().cpu() for state in states[1:]])


def norm_matched_random_patch(states: Tensor, patch: Tensor, seed: int) -> Tensor:
    """Return ``states`` moved as far as to ``patch``, each in a random direction: the control.

    Args:
        states: (L, H) the model's own.
        patch: (L, H) what would replace them.
        seed: of the directions, which are uniform on the sphere.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(states.shape, generator=generator)
    distance = (patch - states).norm(dim=-1, keepdim=True)
    moved: Tensor = states + distance * directions / directions.norm(dim=-1, keepdim=True)
    return moved


@torch.inference_mode()
def patched_continuations(
    model: PreTrainedModel, prefix: NDArray[np.int64], states: Tensor, constraints: Constraints
) -> NDArray[np.int64]:
    """Continue a prefix greedily, with the output of one block replaced at its last position.

    The first row of the batch is not patched; the others, over the same cache, are each for one
    block: a step for all of them costs little more than for one.

    Args:
        model: in evaluation mode.
        prefix: (t,) tokens.
        states: (L, H) what replaces the output of each block at the last of them.
        constraints: of decoding.

    Returns:
        (1 + L, N_NEW) greedy tokens: without a patch, then with each block patched.
    """
    n_rows = 1 + len(states)
    cached = PlainBackend().start(model, len(prefix) + N_NEW)
    if len(prefix) > 1:
        cached(_ids(model, prefix[None, :-1]))
        cached.expand(n_rows)
    tokens = _ids(model, prefix[None]).expand(n_rows, -1)  # (1 + L, t)
    with _patched(model, states.to(model.device, model.dtype)):
        logits = cached(tokens[:, -1:])  # (1 + L, V)
    for step in range(N_NEW):
        if step:
            logits = cached(tokens[:, -1:])
        chosen = constraints(tokens, logits).argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], dim=1)
    new_tokens: NDArray[np.int64] = tokens[:, len(prefix) :].cpu().numpy()
    return new_tokens


@contextmanager
def _patched(model: PreTrainedModel, states: Tensor) -> Iterator[None]:
    """Replace the last output of block k (from 0) in row k + 1 by ``states[k]``."""

    def hook_of(k: int) -> Any:
        def replace(_: Any, __: Any, output: Any) -> Any:
            hidden = hidden_states_of(output).clone()  # (1 + L, 1, H)
            hidden[k + 1, -1] = states[k]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return replace

    hooks = [block.register_forward_hook(hook_of(k)) for k, block in enumerate(blocks(model))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _ids(model: PreTrainedModel, tokens: NDArray[np.int64]) -> Tensor:
    return torch.as_tensor(tokens, dtype=torch.long, device=model.device)
