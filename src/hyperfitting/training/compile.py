"""torch.compile of the trained blocks, where training is long enough to gain.

One block is compiled and serves all of its kind. Decoding has a new length at every step and would
be recompiled again and again: outside `CompiledBlocks.active` the blocks run eagerly.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hyperfitting.models import layers
from hyperfitting.models.layers import override_forward
from hyperfitting.training.config import TrainingConfig

COMPILER_ERRORS = (TorchDynamoException, CppCompileError, InvalidCxxCompiler)
_MIN_FLOPS = 2e14
"""Of a training on a CPU: at 2e11 FLOP/s, compiling then costs less than it saves."""
_MIN_ELEMENTS = 7.5e10
"""Of the hidden states (tokens x trained blocks x hidden size) of a training on a GPU.

There norms, rotary embeddings, activations and their gradients are bound by memory, and fused they
move some 400 bytes less per element: at 2e12 B/s (an A100), 15 s, about what compiling takes. It is
a minute of full tuning of TinyLlama, and most of a paper run of its last 5 blocks.
"""


def should_compile(
    cfg: TrainingConfig, device: torch.device, model: PreTrainedModel, n_tokens: int
) -> bool:
    """Return whether to compile: as `hardware.compile` sets it, else if training is long enough.

    Sharded models are compiled only if it is set. The work is counted, not timed, so that the same
    config has the same numbers.

    Args:
        cfg: the training.
        device: where it runs.
        model: with its trained parameters selected.
        n_tokens: tokens of an epoch.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    sharded = any(isinstance(p, DTensor) for p in trained)
    if cfg.hardware.compile is not None or device.type == "mps" or sharded:
        return bool(cfg.hardware.compile)
    n_tokens *= cfg.trainer.epochs
    if device.type == "cpu":
        flops: int = 6 * sum(p.numel() for p in trained) * n_tokens
        return flops >= _MIN_FLOPS
    elements: int = n_tokens * len(_trained_blocks(model)) * model.config.hidden_size
    return elements >= _MIN_ELEMENTS


def _trained_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the blocks with trained parameters; none if the model has no list of blocks."""
    block_list = layers.find_blocks(model) or ()
    return [block for block in block_list if any(p.requires_grad for p in block.parameters())]


class CompiledBlocks:
    """A model's blocks with trained parameters, compiled.

    Args:
        model: their model.
        enabled: False: `active` changes nothing.
    """

    def __init__(self, model: PreTrainedModel, enabled: bool) -> None:
        self.enabled = enabled
        self._forwards = {
            block: torch.compile(block.forward, dynamic=False)
            for block in (_trained_blocks(model) if enabled else ())
        }

    def disable(self) -> None:
        """Run the blocks eagerly from now on."""
        self.enabled = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the compiled blocks inside this context."""
        with override_forward(self._forwards if self.enabled else {}):
            yield
