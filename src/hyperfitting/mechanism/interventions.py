"""Models derived from the base and the tuned weights: stitched, interpolated, shifted, truncated.

The derived weights are an artifact of their own, in the form of a tuned model's: an overlay on the
base model. So every metric, decoding, table and sweep works with them, and nothing is trained:

    base, tuned (, other tuned) -> intervention   weights.safetensors, summary.json

The file holds the parameters that differ from the base model's, so its size is that of the parts
exchanged. Whatever is taken over unchanged is copied, not computed: stitching all parts and weight
1 give the tuned model bit for bit, stitching nothing and weight 0 the base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from hyperfitting.errors import UserError
from hyperfitting.formatting import listed
from hyperfitting.mechanism.intervention_config import InterventionConfig
from hyperfitting.mechanism.notes import SUMMARY_FILE
from hyperfitting.mechanism.parts import part_parameters
from hyperfitting.models.base import BaseModel
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.loading import ModelState
from hyperfitting.progress import ProgressReporter
from hyperfitting.runtime.files import write_json
from hyperfitting.store.artifact import Step, Store

VERSION = 1
WEIGHTS_FILE = "weights.safetensors"
if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CPU = torch.device("cpu")
Parameters = Mapping[str, Tensor]


def intervention_step(
    cfg: InterventionConfig,
    tuned: ModelState,
    other: ModelState | None,
    store: Store,
    progress: ProgressReporter,
) -> Step:
    """Return the step that derives the weights which are evaluated in the tuned model's place.

    Args:
        cfg: what to derive.
        tuned: the tuned model.
        other: another tuning of the same base model, for `task_vector`.
        store: where the artifact lies.
        progress: displays the matrices done.
    """

    def build(work: Path) -> None:
        base_model = ModelState(tuned.base).load(_CPU)
        base = _detached(base_model)
        stitched: set[str] = set()
        if cfg.method == "stitch":
            stitched = part_parameters(base_model, cfg.parts, cfg.last_blocks)
        tuned_weights = _detached(tuned.load(_CPU))
        other_weights = _detached(other.load(_CPU)) if other is not None else {}
        with progress(f"deriving weights ({cfg.method})", len(base), "matrices") as advance:
            derived: dict[str, Tensor] = {}
            for name, tensor in derive(cfg, base, tuned_weights, other_weights, stitched):
                if not _same_bits(tensor, base[name]):
                    derived[name] = tensor.contiguous()
                advance(1)
        save_file(derived, work / WEIGHTS_FILE)
        write_json(work / SUMMARY_FILE, _summary(base, derived))

    inputs = {"model": tuned.base.id, "tuned": tuned.id}
    if other is not None:
        inputs["other"] = other.id
    artifact = store.artifact(
        "intervention", version=VERSION, config=cfg.id_config(), inputs=inputs
    )
    return Step(artifact, build)


def intervention_state(base: BaseModel, step: Step) -> ModelState:
    """Return the model with the derived weights."""
    return ModelState(base, TuningConfig("full"), step.artifact, WEIGHTS_FILE)


@torch.no_grad()
def derive(
    cfg: InterventionConfig,
    base: Parameters,
    tuned: Parameters,
    other: Parameters,
    stitched: set[str],
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of every parameter of the derived model, in the base's dtype.

    Args:
        cfg: what to derive.
        base: parameters of the base model, by name.
        tuned: of the tuned model, LoRA adapters merged.
        other: of the other tuned model; empty unless the method is `task_vector`.
        stitched: names of the parameters in `intervention.parts`.

    Raises:
        UserError: the models have other parameters, or parameters of other shapes.
    """
    check_same_shapes(base, tuned)
    if cfg.method == "task_vector":
        check_same_shapes(base, other)
    for name, base_weight in base.items():
        yield name, _derive_one(cfg, base_weight, tuned[name], other.get(name), name in stitched)


def _derive_one(
    cfg: InterventionConfig, base: Tensor, tuned: Tensor, other: Tensor | None, stitched: bool
) -> Tensor:
    if cfg.method == "stitch":
        return tuned if stitched != cfg.reverse else base
    if cfg.method == "interpolate":
        return interpolate(base, tuned, cfg.weight)
    if other is not None:
        return add_difference(tuned, base, other, cfg.scale)
    return truncate(base, tuned, cfg.rank)


def interpolate(base: Tensor, tuned: Tensor, weight: float) -> Tensor:
    """Return base + weight * (tuned - base), exactly the one or the other for 0 and 1."""
    if weight in (0, 1):
        return tuned if weight else base
    return (base.float() + weight * (tuned.float() - base.float())).to(base.dtype)


def add_difference(tuned: Tensor, base: Tensor, other: Tensor, scale: float) -> Tensor:
    """Return tuned + scale * (other - base); exactly tuned where that adds nothing."""
    if scale == 0 or torch.equal(other, base):
        return tuned
    return (tuned.float() + scale * (other.float() - base.float())).to(tuned.dtype)


def truncate(base: Tensor, tuned: Tensor, rank: int) -> Tensor:
    """Return base plus the best approximation of rank ``rank`` to the difference of a matrix.

    By singular value decomposition, in the Frobenius norm (Eckart and Young, 1936). Vectors, and
    matrices of which no singular value is left out, are exactly the tuned model's; a tensor of more
    than two dimensions is a batch of matrices.

    Args:
        base: (..., M, N) or (N,).
        tuned: of the same shape.
        rank: singular values kept.
    """
    if tuned.dim() < 2 or rank >= min(tuned.shape[-2:]) or torch.equal(base, tuned):
        return tuned
    u, s, v = torch.linalg.svd(tuned.float() - base.float(), full_matrices=False)
    kept: Tensor = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    return (base.float() + kept).to(base.dtype)


def check_same_shapes(base: Parameters, tuned: Parameters) -> None:
    """Refuse weights that are not a tuning of this base model.

    Raises:
        UserError: they hold LoRA adapters, other parameters, or some of other shapes.
    """
    if adapters := [name for name in tuned if ".lora_" in name]:
        raise UserError(
            f"the tuned model holds LoRA adapters that are not merged: {listed(adapters)}",
            field="intervention",
            value="LoRA",
            valid="a model whose adapters are merged into its weights, as ModelState.load does",
        )
    problems = [
        f"{name} ({list(tuned[name].shape)} instead of {list(weight.shape)})"
        if name in tuned
        else f"{name} (missing)"
        for name, weight in base.items()
        if name not in tuned or tuned[name].shape != weight.shape
    ]
    problems += [f"{name} (not in the base model)" for name in tuned if name not in base]
    if problems:
        raise UserError(
            f"the tuned model has other parameters than the base model: {listed(problems)}",
            field="intervention",
            value=f"{len(problems)} parameters differ",
            valid="two models of one architecture and size",
        )


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors of a dtype are equal bit for bit, the sign of 0 included."""
    return torch.equal(first.flatten().view(torch.uint8), second.flatten().view(torch.uint8))


def _detached(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a model's parameters by name, tied ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _summary(base: Parameters, derived: Parameters) -> dict[str, float]:
    """Return how many of the base's numbers lie in tensors that differ, and how far it moved."""
    squared = sum(float((derived[n].double() - base[n].double()).square().sum()) for n in derived)
    norm = sum(float(weight.double().square().sum()) for weight in base.values())
    return {
        "n_parameters": sum(weight.numel() for weight in base.values()),
        "n_replaced": sum(weight.numel() for weight in derived.values()),
        "relative_change": (squared / norm) ** 0.5,
    }
