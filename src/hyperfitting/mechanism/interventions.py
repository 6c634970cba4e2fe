"""Models derived from the base and the tuned weights: stitched, interpolated, shifted, truncated.

The derived weights are an artifact of their own, in the form of a tuned model's: an overlay on the
base model. So every metric, decoding, table and sweep works with them, and nothing is trained:

    base, tuned (, other tuned) -> intervention   weights.safetensors, summary.json

The file holds the parameters that differ from the base model's, so its size is that of the parts
exchanged. Whatever is taken over unchanged is copied, not computed: stitching all parts and weight
1 give the tuned model bit for bit, stitching nothing and weight 0 the base model.

What is computed is float32, and so is the model that is evaluated then: in bfloat16, base and tuned
weights are often neighbors, with nothing between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

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
from hyperfitting.models.size import ModelSize
from hyperfitting.progress import ProgressReporter
from hyperfitting.runtime.files import write_json
from hyperfitting.store.artifact import Step, Store
from hyperfitting.training.flops import dtype_bytes

VERSION = 1
WEIGHTS_FILE = "weights.safetensors"
_CPU = torch.device("cpu")
Parameters = Mapping[str, Tensor]


def intervention_step(
    cfg: InterventionConfig,
    tuned: ModelState,
    other: ModelState | None,
    store: Store,
    progress: ProgressReporter,
    device: torch.device = _CPU,
) -> Step:
    """Return the step that derives the weights which are evaluated in the tuned model's place.

    Args:
        cfg: what to derive.
        tuned: the tuned model.
        other: another tuning of the same base model, for `task_vector`.
        store: the store to write to.
        progress: displays the matrices done.
        device: computes the singular value decompositions of `truncate`.
    """
    dtype = cfg.derived_dtype(tuned.base.dtype)

    def build(work: Path) -> None:
        base_model = ModelState(tuned.base).load(_CPU)
        base = {name: parameter.detach() for name, parameter in base_model.named_parameters()}
        stitched: set[str] = set()
        if cfg.method == "stitch":
            stitched = part_parameters(base_model, cfg.parts, cfg.last_blocks)
        tuned_weights = tuned.parameters(base)
        other_weights = other.parameters(base) if other is not None else {}
        with progress(f"deriving weights ({cfg.method})", len(base), "matrices") as advance:
            derived: dict[str, Tensor] = {}
            for name, tensor in derive(cfg, base, tuned_weights, other_weights, stitched, device):
                # of another dtype, all are stored: the base's files may hold others than its dtype
                if tensor.dtype != base[name].dtype or not _same_bits(tensor, base[name]):
                    derived[name] = tensor.contiguous()
                advance(1)
        save_file(derived, work / WEIGHTS_FILE)
        write_json(work / SUMMARY_FILE, _summary(base, derived))

    inputs = {"model": tuned.base.id, "tuned": tuned.id}
    if other is not None:
        inputs["other"] = other.id
    of_dtype = {} if dtype == tuned.base.dtype else {"dtype": dtype}
    artifact = store.artifact(
        "intervention", version=VERSION, config=cfg.id_config() | of_dtype, inputs=inputs
    )
    return Step(artifact, build)


def derivation_bytes(
    cfg: InterventionConfig, tuning: TuningConfig, size: ModelSize, dtype: str
) -> float:
    """Return the host memory of deriving weights, at most.

    The base model, other models whose adapters are merged, and the derived weights.

    Args:
        cfg: what is derived.
        tuning: how the tuned model was trained, and the other one.
        size: of the base model.
        dtype: of its weights.
    """
    n_merged = (2 if cfg.method == "task_vector" else 1) if tuning.is_lora else 0
    derived = dtype_bytes(cfg.derived_dtype(dtype))
    return size.n_params * ((1 + n_merged) * dtype_bytes(dtype) + derived)


def intervention_state(cfg: InterventionConfig, base: BaseModel, step: Step) -> ModelState:
    """Return the model with the derived weights."""
    base = replace(base, dtype=cfg.derived_dtype(base.dtype))
    return ModelState(base, TuningConfig("full"), step.artifact, WEIGHTS_FILE)


@torch.no_grad()
def derive(
    cfg: InterventionConfig,
    base: Parameters,
    tuned: Parameters,
    other: Parameters,
    stitched: set[str],
    device: torch.device = _CPU,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of every parameter of the derived model, on the CPU.

    They are float32, or with `stitch` as they are.

    Args:
        cfg: what to derive.
        base: parameters of the base model, by name.
        tuned: of the tuned model, LoRA adapters merged.
        other: of the other tuned model; empty unless the method is `task_vector`.
        stitched: names of the parameters in `intervention.parts`.
        device: computes singular value decompositions.

    Raises:
        UserError: the models have other parameters, or parameters of other shapes.
    """
    check_same_shapes(base, tuned)
    if cfg.method == "task_vector":
        check_same_shapes(base, other)
    for name in base:
        if cfg.method == "stitch":
            yield name, (tuned if (name in stitched) != cfg.reverse else base)[name]
            continue
        b, t = base[name].float(), tuned[name].float()
        if cfg.method == "interpolate":
            yield name, interpolate(b, t, cfg.weight)
        elif cfg.method == "task_vector":
            yield name, add_difference(t, b, other[name].float(), cfg.scale)
        else:
            yield name, truncate(b.to(device), t.to(device), cfg.rank).cpu()


def interpolate(base: Tensor, tuned: Tensor, weight: float) -> Tensor:
    """Return base + weight * (tuned - base), exactly the one or the other for 0 and 1."""
    if weight in (0, 1):
        return tuned if weight else base
    return base + weight * (tuned - base)


def add_difference(tuned: Tensor, base: Tensor, other: Tensor, scale: float) -> Tensor:
    """Return tuned + scale * (other - base); exactly tuned where that adds nothing."""
    if scale == 0 or torch.equal(other, base):
        return tuned
    return tuned + scale * (other - base)


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
    u, s, v = torch.linalg.svd(tuned - base, full_matrices=False)
    kept: Tensor = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    return base + kept


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


def _summary(base: Parameters, derived: Parameters) -> dict[str, float]:
    """Return how many of the base's numbers lie in tensors that differ, and how far it moved."""
    squared = sum(float((derived[n].double() - base[n].double()).square().sum()) for n in derived)
    norm = sum(float(weight.double().square().sum()) for weight in base.values())
    replaced = (w for n, w in derived.items() if not _same_bits(w, base[n].to(w.dtype)))
    return {
        "n_parameters": sum(weight.numel() for weight in base.values()),
        "n_replaced": sum(weight.numel() for weight in replaced),
        "relative_change": (squared / norm) ** 0.5,
    }
