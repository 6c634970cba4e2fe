"""Where the weights changed: each parameter's difference of tuned and base, relative to the base.

Parameter by parameter, in float64: of a matrix (m, n) the squared singular values are the
eigenvalues of its smaller Gram matrix, so that an embedding costs no decomposition of its rows.
LoRA adapters are merged first.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyperfitting.evaluation.setting import LazyModel, Setting
from hyperfitting.mechanism.hidden_states import EMBEDDING, FINAL_NORM
from hyperfitting.models import layers
from hyperfitting.models.size import model_size
from hyperfitting.progress import Advance
from hyperfitting.runtime.files import write_json
from hyperfitting.runtime.numerics import float64_device
from hyperfitting.store.artifact import Artifact, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1
_FILE = "weight_change.json"
OUTPUT_LAYER = "output layer"


@dataclass(frozen=True)
class ParameterChange:
    """How one parameter changed."""

    name: str
    """As in the model's state dict."""
    layer: str
    """`embedding`, `block 1`, …, `final norm` (vectors of no block), or `output layer`."""
    part: str
    """Its name within the block, such as `mlp.down_proj.weight`; of no block: its whole name."""
    squared_change: float
    """Squared Frobenius norm of the difference."""
    squared_norm: float
    """Squared Frobenius norm of the base parameter."""
    spectral: float | None
    """Largest singular value of the difference over that of the base; none: no matrix."""
    effective_rank: float | None
    """Of the difference: exponential of the entropy of its singular values, normalized to sum to 1
    (Roy and Vetterli, 2007); none: no matrix, or unchanged."""

    @property
    def frobenius(self) -> float:
        """Frobenius norm of the difference over that of the base; NaN for a parameter of zeros."""
        return math.sqrt(self.squared_change / self.squared_norm) if self.squared_norm else math.nan


def weight_change_step(setting: Setting, base: LazyModel, tuned: LazyModel) -> Step:
    """Return the step of how each parameter changed: `weight_change.json`."""

    def build(work: Path) -> None:
        models = base(), tuned()
        total = sum(parameter.numel() for parameter in models[0].parameters())
        with setting.progress("weights of both models", total, "weights") as advance:
            changes = weight_changes(*models, advance)
        write_json(work / _FILE, [asdict(change) for change in changes])

    def flops() -> float:
        size = model_size(base.state.base, setting.store)
        return 4 * size.n_params * size.hidden_size  # two Gram matrices

    artifact = setting.store.artifact(
        "weight_change",
        version=VERSION,
        config={},
        inputs={"base": base.state.id, "tuned": tuned.state.id},
    )
    return Step(artifact, build, flops)


def load_weight_changes(artifact: Artifact) -> list[ParameterChange]:
    """Return the content of a `weight_change` artifact."""
    return [ParameterChange(**values) for values in json.loads(artifact.file(_FILE).read_text())]


@torch.inference_mode()
def weight_changes(
    base: PreTrainedModel, tuned: PreTrainedModel, advance: Advance | None = None
) -> list[ParameterChange]:
    """Return how each parameter of a model changed, tied ones once.

    Args:
        base: the base model.
        tuned: with parameters of the same names and shapes.
        advance: reports weights.
    """
    block_list = layers.blocks(base)
    prefix = next(name for name, module in base.named_modules() if module is block_list)
    in_block = re.compile(re.escape(prefix) + r"\.(\d+)\.(.+)")
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings()
    tuned_parameters = dict(tuned.named_parameters())
    changes = []
    for name, parameter in base.named_parameters():
        match = in_block.fullmatch(name)
        is_head = head is not None and parameter is head.weight and parameter is not embedding
        outside = OUTPUT_LAYER if is_head else EMBEDDING if parameter.dim() > 1 else FINAL_NORM
        layer, part = (f"block {int(match[1]) + 1}", match[2]) if match else (outside, name)
        tuned_parameter = tuned_parameters[name].to(parameter.device)
        changes.append(_change(name, layer, part, parameter, tuned_parameter))
        if advance:
            advance(parameter.numel())
    return changes


def _change(name: str, layer: str, part: str, base: Tensor, tuned: Tensor) -> ParameterChange:
    device = float64_device(base.device)
    w, difference = base.to(device, torch.float32), (tuned.float() - base.float()).to(device)
    spectral = effective_rank = None
    if w.dim() > 1:
        of_w, of_difference = (singular_values(m.flatten(1)) for m in (w, difference))
        largest = float(of_w.max())
        spectral = float(of_difference.max()) / largest if largest else None
        if bool(of_difference.any()):
            share = of_difference / of_difference.sum()
            effective_rank = float(torch.special.entr(share).sum().exp())
    return ParameterChange(
        name,
        layer,
        part,
        squared_change=float(difference.double().square().sum()),
        squared_norm=float(w.double().square().sum()),
        spectral=spectral,
        effective_rank=effective_rank,
    )


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values of a matrix (m, n), in float64; those below 1e-8 of the largest
    are rounding."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in tall.split(8192):  # bounds the float64 copy of an embedding
        gram += rows.double().mT @ rows.double()
    values: Tensor = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return values
