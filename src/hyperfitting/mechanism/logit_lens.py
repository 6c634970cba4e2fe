"""Logit lens: the most likely token by block, if the output of that block were the last one's.

nostalgebraist (2020): the states after a block go through the model's own final norm and output
layer. After the last block these are the model's logits themselves. Along the tuned model's
continuations this shows the block from which its top-1 token is final, and the block from which
the base model's, on the same tokens, is another.
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
from hyperfitting.fields import id_config
from hyperfitting.mechanism.config import MechanismConfig
from hyperfitting.mechanism.hidden_states import layer_states
from hyperfitting.mechanism.texts import Texts, TextSource
from hyperfitting.models import layers
from hyperfitting.models.size import forward_flops, model_size
from hyperfitting.progress import Advance
from hyperfitting.store.artifact import Artifact, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1
_FILE = "logit_lens.npz"
Ids = NDArray[np.int32]


@dataclass(frozen=True)
class LensChoices:
    """The most likely token after the embedding and after each block, at each new token."""

    base: Ids
    """(L + 1, N, T) token ids; -1 past the end of a text."""
    tuned: Ids
    """(L + 1, N, T)"""


def logit_lens_step(
    cfg: MechanismConfig, base: LazyModel, tuned: LazyModel, source: TextSource
) -> Step:
    """Return the step of the arrays of `LensChoices` on the tuned model's continuations."""
    setting = source.setting
    start = setting.evaluation.context_len

    def build(work: Path) -> None:
        texts = source.load().first(cfg.lens_texts)
        total = 2 * texts.tokens.size
        with setting.progress("logit lens of both models", total, "tokens") as advance:
            choices = LensChoices(
                *(
                    lens_choices(
                        model(), texts, start, setting.hardware.evaluation_batch_size, advance
                    )
                    for model in (base, tuned)
                )
            )
        np.savez_compressed(work / _FILE, **vars(choices))

    def flops() -> float:
        size = model_size(base.state.base, setting.store)
        n_texts = min(cfg.lens_texts, setting.evaluation.n_texts) * len(setting.texts)
        lens = 2 * size.n_head_params * (size.n_blocks + 1) * n_texts * (source.length - start)
        return 2 * (forward_flops(size, n_texts, source.length) + lens)

    artifact = setting.store.artifact(
        "logit_lens",
        version=VERSION,
        config={"start": start, **id_config(cfg, "logit_lens")},
        inputs={"base": base.state.id, "tuned": tuned.state.id, **source.inputs},
    )
    return Step(artifact, build, flops)


def load_lens_choices(artifact: Artifact) -> LensChoices:
    """Return the content of a `logit_lens` artifact."""
    return load_npz(artifact, _FILE, LensChoices)


@torch.inference_mode()
def lens_choices(
    model: PreTrainedModel,
    texts: Texts,
    start: int,
    batch_size: int,
    advance: Advance | None = None,
) -> Ids:
    """Return the most likely token after each block, at each new token of N texts: (L + 1, N, T).

    Args:
        model: in evaluation mode.
        texts: N texts; T is the length of the longest less ``start``.
        start: tokens of the context.
        batch_size: texts per forward pass; halved when GPU memory runs out.
        advance: reports tokens.
    """
    n, length = texts.tokens.shape

    def compute(rows: slice) -> Ids:
        batch = torch.as_tensor(texts.tokens[rows], dtype=torch.long, device=model.device)
        at = slice(start - 1, -1)  # what predicts the new tokens
        choices = [
            lens_logits(model, batch[:, at], states[:, at]).argmax(-1)
            for states in layer_states(model, batch)[:-1]
        ]
        if advance:
            advance(batch.numel())
        return torch.stack(choices).int().cpu().numpy()

    parts = list(in_batches(compute, n, batch_size, model))
    choices = np.concatenate(parts, axis=1)
    past_end = np.arange(start, length) >= texts.lengths[:, None]
    return np.where(past_end, np.int32(-1), choices)


def lens_logits(model: PreTrainedModel, input_ids: Tensor, states: Tensor) -> Tensor:
    """Return the logits (B, T, V) of a model whose last block puts out these states.

    Args:
        model: a decoder.
        input_ids: (B, T), of which nothing but the shape matters.
        states: (B, T, H).
    """
    block_list = layers.blocks(model)
    with layers.replace_blocks(block_list, range(len(block_list)), states):
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits


def prediction_depth(choices: Ids) -> NDArray[np.int64]:
    """Return from which layer on the choice is that of the last one.

    Args:
        choices: (L + 1, N, T), the embedding first.

    Returns:
        (N, T): 0 for the embedding, L for the last block.
    """
    return _constant_from(choices == choices[-1])


def divergence_depth(base: Ids, tuned: Ids) -> NDArray[np.int64]:
    """Return from which layer on two models' choices differ.

    Args:
        base: (L + 1, N, T).
        tuned: (L + 1, N, T) on the same tokens.

    Returns:
        (N, T): 0 for the embedding, L for the last block; L + 1 where they end with the same.
    """
    return _constant_from(base != tuned)


def _constant_from(holds: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the first layer from which on something holds at all layers; their number for none."""
    until_end: NDArray[np.int64] = np.cumprod(holds[::-1], axis=0).sum(0)
    return len(holds) - until_end
