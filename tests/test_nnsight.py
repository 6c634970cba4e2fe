"""Hidden states and activation patching against nnsight, which reads and edits them in a trace.

An oracle only: nnsight is a dependency of the tests.
"""

from typing import Any

import nnsight
import numpy as np
import torch
from torch import Tensor, nn

from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.constraints import Constraints
from hyperfitting.mechanism.hidden_states import layer_states
from hyperfitting.mechanism.patching import block_outputs, patched_continuations
from hyperfitting.models.base import BaseModel
from hyperfitting.models.layers import blocks
from tests.mechanism import model_pair

PREFIX = np.random.default_rng(0).integers(32, 127, 9)
N_STEPS = 4
"""New tokens that are compared: all but the first are decoded with a cache by us, never here."""


class Traced:
    """A model in nnsight, with its blocks and output layer."""

    def __init__(self, model: Any) -> None:
        names = {module: name for name, module in model.named_modules()}
        self.model = nnsight.NNsight(model)
        self.blocks = [self._layer(block, names) for block in blocks(model)]
        self.output_layer = self._layer(model.get_output_embeddings(), names)

    def _layer(self, module: nn.Module, names: dict[nn.Module, str]) -> Any:
        return self.model.get(names[module])

    def states(self, ids: Tensor) -> list[Tensor]:
        """What enters the first block, leaves each block, and enters the output layer."""
        with torch.no_grad(), self.model.trace(input_ids=ids, use_cache=False):
            states = nnsight.save([self.blocks[0].input])
            states += [_hidden(block.output) for block in self.blocks]
            states.append(self.output_layer.input)
        return list(states)

    def patched_continuation(self, block: int, state: Tensor) -> list[int]:
        """Greedy tokens, with a block's output replaced at the last token of the prefix."""
        tokens = PREFIX.tolist()
        for _ in range(N_STEPS):
            with torch.no_grad(), self.model.trace(
                input_ids=torch.tensor([tokens]), use_cache=False
            ):  # fmt: skip
                _hidden(self.blocks[block].output)[:, len(PREFIX) - 1] = state
                logits = self.output_layer.output.save()
            tokens.append(int(logits[0, -1].argmax()))
        return tokens[len(PREFIX) :]


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def test_hidden_states_are_those_that_nnsight_reads(any_base: BaseModel) -> None:
    ids = torch.as_tensor(np.stack([PREFIX, PREFIX[::-1]]))
    for model in model_pair(any_base):
        ours, theirs = layer_states(model, ids), Traced(model).states(ids)
        assert len(ours) == len(theirs) == len(blocks(model)) + 2
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


def test_patched_texts_are_those_of_nnsight(any_base: BaseModel) -> None:
    model, tuned = model_pair(any_base, 0.2)
    constraints = Constraints(DecodeConfig("greedy", stop_at_eos=True, seed=0), [], 4)
    states = block_outputs(tuned, np.append(PREFIX, 0))
    ours = patched_continuations(model, PREFIX, states, constraints)[1:, :N_STEPS]
    base, patch = Traced(model), Traced(tuned).states(torch.as_tensor(PREFIX[None]))
    theirs = [
        base.patched_continuation(block, patch[block + 1][0, -1]) for block in range(len(states))
    ]
    assert ours.tolist() == theirs
    assert len({tuple(row) for row in theirs}) > 1  # which block is patched matters
