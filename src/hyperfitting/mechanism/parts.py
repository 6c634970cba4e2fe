"""The parts of a decoder that an intervention exchanges, for any architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from hyperfitting.errors import UserError
from hyperfitting.models.layers import blocks, final_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def part_parameters(
    model: PreTrainedModel, parts: Sequence[str], last_blocks: int | None = None
) -> set[str]:
    """Return the names of the parameters in some parts of a model.

    `embedding`, `blocks` (all of them), `final_norm` and `output` are disjoint, and together they
    are the whole model. Tied weights belong to `output`.

    Args:
        model: a decoder; a parameter that is shared has its first name.
        parts: of `intervention_config.PARTS`.
        last_blocks: number of trailing blocks that are meant; none: all.

    Raises:
        UserError: there are fewer blocks, or no attention or MLP can be told apart in them.
    """
    check_last_blocks(len(blocks(model)), last_blocks)
    chosen = {id(p) for part in parts for p in _parameters(model, part, last_blocks)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def check_last_blocks(n_blocks: int, last_blocks: int | None) -> None:
    """Refuse more trailing blocks than a model has."""
    if last_blocks is not None and last_blocks > n_blocks:
        raise UserError(
            "the model has fewer blocks",
            field="intervention.last_blocks",
            value=last_blocks,
            valid=f"1 to {n_blocks}",
        )


def _parameters(
    model: PreTrainedModel, part: str, last_blocks: int | None
) -> Iterator[nn.Parameter]:
    all_blocks = list(blocks(model))
    chosen_blocks = all_blocks[-last_blocks:] if last_blocks is not None else all_blocks
    if part == "blocks":
        for block in chosen_blocks:
            yield from block.parameters()
    elif part in ("attention", "mlp"):
        for block in chosen_blocks:
            yield from _sublayer(block, part)
    elif part == "final_norm":
        yield from final_norm(model)
    elif part == "output":
        yield from _output_layer(model)
    else:
        others = [p for block in all_blocks for p in block.parameters()]
        others += [*final_norm(model), *_output_layer(model)]
        taken = {id(parameter) for parameter in others}
        yield from (p for p in model.parameters() if id(p) not in taken)


def _output_layer(model: PreTrainedModel) -> list[nn.Parameter]:
    layer = model.get_output_embeddings()
    return list(layer.parameters()) if layer is not None else []


def _sublayer(block: nn.Module, part: str) -> Iterator[nn.Parameter]:
    """Yield the parameters of a block's attention, or of its MLP.

    In transformers' decoders attention is a child of the block with `attn` or `attention` in its
    name; the MLP is every other child that has matrices (one module, or OPT's `fc1` and `fc2`).
    Norms have only vectors.
    """
    with_matrices = {
        name: child
        for name, child in block.named_children()
        if any(parameter.dim() > 1 for parameter in child.parameters())
    }
    attention = {name for name in with_matrices if "attn" in name or "attention" in name}
    if not attention or len(attention) == len(with_matrices):
        raise UserError(
            f"{type(block).__name__} has no attention and MLP of its own",
            field="intervention.parts",
            value=part,
            valid="blocks, final_norm, output, embedding",
        )
    for name, child in with_matrices.items():
        if (name in attention) == (part == "attention"):
            yield from child.parameters()
