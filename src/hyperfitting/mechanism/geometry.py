"""Layer geometry: the hidden states of base and tuned model on the same tokens (P2, section 4).

At every layer, over the tokens of the texts but the first `mechanism.skip_tokens` of each:

- cosine similarity and L2 distance of a token's two states, and the L2 norms, averaged over the
  tokens of a text, then over texts (states as they are, not centered);
- participation ratio of the covariance of all tokens, of each model (centered at the mean);
- debiased linear CKA of all tokens.

Each is computed of all dimensions, and once more without the `mechanism.outlier_dims`.

Both models are in memory; one pass streams batches through them and keeps only sums.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperfitting.evaluation.arrays import load_npz
from hyperfitting.evaluation.forward import in_batches
from hyperfitting.evaluation.setting import LazyModel
from hyperfitting.fields import id_config
from hyperfitting.mechanism.config import MechanismConfig
from hyperfitting.mechanism.hidden_states import layer_names, layer_states
from hyperfitting.mechanism.moments import (
    N_SKETCHES,
    SKETCH_SIZE,
    Floats,
    LayerMoments,
    PairMoments,
    split_outliers,
    squared_norms,
)
from hyperfitting.mechanism.texts import Texts, TextSource
from hyperfitting.models.size import ModelSize, forward_flops, model_size
from hyperfitting.progress import Advance
from hyperfitting.runtime.numerics import float64_device
from hyperfitting.store.artifact import Artifact, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 2
_FILE = "geometry.npz"
WITHOUT_OUTLIERS = "_without_outliers"
TOKEN_MEANS = ("cosine", "l2", "base_norm", "tuned_norm")
"""Means over a text's tokens, each also with the suffix `WITHOUT_OUTLIERS`."""


@dataclass(frozen=True)
class Geometry:
    """What was measured at each of P layers, on N texts."""

    layers: NDArray[np.str_]
    """(P,) their names."""
    token_means: Floats
    """(8, P, N): `TOKEN_MEANS`, then the same without outlier dimensions; NaN for a text without
    tokens."""
    participation_ratio: Floats
    """(P, 2, 2): base and tuned; all dimensions and without the outlier ones."""
    cka: Floats
    """(P, 2): all dimensions and without outliers."""
    trace: Floats
    """(P, 2, 2, N), as `LayerMoments` has it."""
    gram: Floats
    """(P, 2, 2, N, N)"""
    cross_gram: Floats
    """(P, 2, N, N)"""
    outlier_dims: NDArray[np.int64]
    """(P, k) the dimensions of largest root mean square in the base model."""


def geometry_step(
    cfg: MechanismConfig, base: LazyModel, tuned: LazyModel, source: TextSource
) -> Step:
    """Return the step of the layer geometry on some texts: the arrays of `Geometry`."""
    setting = source.setting

    def build(work: Path) -> None:
        texts = source.load()
        task = f"hidden states of both models ({source.side} texts)"
        with setting.progress(task, texts.tokens.size, "tokens") as advance:
            geometry = compute_geometry(
                base(), tuned(), texts, cfg, setting.hardware.evaluation_batch_size, advance
            )
        arrays: dict[str, Any] = {
            name: values.astype(np.float32) if values.ndim > 3 else values
            for name, values in vars(geometry).items()
        }
        np.savez_compressed(work / _FILE, **arrays)

    def flops() -> float:
        size = model_size(base.state.base, setting.store)
        n_texts = setting.evaluation.n_texts * len(setting.texts)
        return geometry_flops(size, n_texts, source.length)

    artifact = setting.store.artifact(
        "layer_geometry",
        version=VERSION,
        config=id_config(cfg, "layer_geometry"),
        inputs={"base": base.state.id, "tuned": tuned.state.id, **source.inputs},
    )
    return Step(artifact, build, flops)


def load_geometry(artifact: Artifact) -> Geometry:
    """Return the content of a `layer_geometry` artifact."""
    return load_npz(artifact, _FILE, Geometry)


def geometry_flops(size: ModelSize, n_texts: int, length: int) -> float:
    """Return the FLOPs of a pass over both models and of three d x d products per layer."""
    products = 3 * 2 * size.hidden_size**2 * (size.n_blocks + 2)
    return 2 * forward_flops(size, n_texts, length) + n_texts * length * products


def geometry_bytes(size: ModelSize, n_texts: int) -> float:
    """Return the memory of the sums of `PairMoments` at all layers, whatever the texts' length."""
    d = size.hidden_size
    scatter, sums = 3 * d**2, 2 * n_texts * d
    return (size.n_blocks + 2) * (8 * (scatter + sums) + 4 * N_SKETCHES * n_texts * SKETCH_SIZE**2)


@torch.inference_mode()
def compute_geometry(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    texts: Texts,
    cfg: MechanismConfig,
    batch_size: int,
    advance: Advance | None = None,
) -> Geometry:
    """Compare the hidden states of two models of one architecture on the same tokens.

    Args:
        base: in evaluation mode.
        tuned: in evaluation mode, with as many blocks and dimensions.
        texts: N texts.
        cfg: which tokens are left out, and how many outlier dimensions.
        batch_size: texts per forward pass; halved when GPU memory runs out.
        advance: reports tokens.

    Raises:
        FloatingPointError: a state is NaN or infinite.
    """
    device = float64_device(base.device)  # of the sums
    n, length = texts.tokens.shape
    position = torch.arange(length, device=device)
    ends = torch.as_tensor(texts.lengths, device=device)[:, None]
    mask = (position >= cfg.skip_tokens) & (position < ends)  # (N, T)

    def states_of(model: PreTrainedModel, rows: slice) -> list[Tensor]:
        batch = torch.as_tensor(texts.tokens[rows], dtype=torch.long, device=model.device)
        return layer_states(model, batch)

    def layer_pairs(rows: slice) -> list[tuple[Tensor, Tensor]]:
        return list(zip(states_of(base, rows), states_of(tuned, rows), strict=True))

    probe = int(np.argmax(texts.lengths > cfg.skip_tokens))  # the first text with tokens
    sums = []
    for layer_pair in layer_pairs(slice(probe, probe + 1)):
        x, y = (states[0].to(device).float()[mask[probe]] for states in layer_pair)  # (n, d)
        keep = _inliers(x, cfg.outlier_dims)
        sums.append(PairMoments(n, torch.stack([x.mean(0), y.mean(0)]), keep, device))
    token_means = torch.empty(2 * len(TOKEN_MEANS), len(sums), n, device=device)
    done = [0] * len(sums)  # texts in the sums of each layer: memory may run out in between

    def compute(rows: slice) -> None:
        for layer, layer_pair in enumerate(layer_pairs(rows)):
            moments, new = sums[layer], slice(max(rows.start, done[layer]), rows.stop)
            if new.start < new.stop:
                x, y = (s[new.start - rows.start :].to(device).float() for s in layer_pair)
                token_means[:, layer, new] = _token_means(x, y, mask[new], moments.keep)
                moments.update(new, x, y, mask[new])
                done[layer] = new.stop
        if advance:
            advance(mask[rows].numel())

    for _ in in_batches(compute, n, batch_size, base):
        pass
    results = [moments.finish() for moments in sums]
    outliers = [torch.nonzero(~moments.keep)[:, 0].cpu().numpy() for moments in sums]
    geometry = Geometry(
        layers=np.array(layer_names(len(sums) - 2)),
        token_means=token_means.double().cpu().numpy(),
        outlier_dims=np.stack(outliers),
        **{
            field.name: np.stack([getattr(result, field.name) for result in results])
            for field in fields(LayerMoments)
        },
    )
    if not np.isfinite(geometry.trace).all():
        raise FloatingPointError("the hidden states hold NaN or infinity")
    return geometry


def _inliers(states: Tensor, n_outliers: int) -> Tensor:
    """Return (d,) True but for the dimensions of largest root mean square of states (n, d)."""
    keep = torch.ones(states.shape[-1], dtype=torch.bool, device=states.device)
    keep[states.square().mean(0).topk(min(n_outliers, len(keep) - 1)).indices] = False
    return keep


def _token_means(x: Tensor, y: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
    """Return `TOKEN_MEANS` of all dimensions, then without outliers: (8, B).

    Args:
        x: (B, T, d) base states.
        y: (B, T, d) tuned states.
        mask: (B, T) tokens that count.
        keep: (d,) dimensions that are no outliers.
    """
    inner, outer = zip(split_outliers(x, keep), split_outliers(y, keep), strict=True)
    trimmed = _products(*inner)
    values = []
    for dot, distance, *norms in (trimmed + _products(*outer), trimmed):
        lengths = [squared.sqrt() for squared in norms]
        cosine = dot / (lengths[0] * lengths[1]).clamp_min(torch.finfo(x.dtype).tiny)
        values += [cosine, distance.sqrt(), *lengths]
    return (torch.stack(values) * mask).sum(-1) / mask.sum(-1)  # NaN without tokens


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Return (4, B, T): inner product, squared distance and squared norms of states (B, T, d)."""
    squares = [squared_norms(states) for states in (y - x, x, y)]
    return torch.stack([(x * y).sum(-1).double(), *squares])
