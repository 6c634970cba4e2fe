"""torch.compile of the trained blocks, where training is long enough to gain.

One block is compiled and serves all of its kind. Decoding has a new length at every step and would
be recompiled again and again: outside `CompiledBlocks.active` the blocks run eagerly.
"""

from collections.abc import Iterable, Iterator
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


def should_compile(
    cfg: TrainingConfig,
    device: torch.device,
    trainable: Iterable[nn.Parameter],
    n_tokens: int,
) -> bool:
    """Return whether to compile: as `hardware.compile` sets it, else if training is long enough.

    Sharded models are compiled only if it is set. FLOPs are counted, not timed, so that the same
    config has the same numbers.

    Args:
        cfg: the training.
        device: where it runs.
        trainable: the trained parameters.
        n_tokens: tokens of an epoch.
    """
    trainable = list(trainable)
    sharded = any(isinstance(p, DTensor) for p in trainable)
    if cfg.hardware.compile is not None or device.type == "mps" or sharded:
        return bool(cfg.hardware.compile)
    flops = 6 * sum(p.numel() for p in trainable) * n_tokens * cfg.trainer.epochs
    return flops >= (_MIN_FLOPS if device.type == "cpu" else 100 * _MIN_FLOPS)


class CompiledBlocks:
    """A model's blocks with trained parameters, compiled.

    Args:
        model: their model.
        enabled: False: `active` changes nothing.
    """

    def __init__(self, model: PreTrainedModel, enabled: bool) -> None:
        self.enabled = enabled
        blocks = layers.find_blocks(model) if enabled else None
        self._forwards = {
            block: torch.compile(block.forward, dynamic=False)
            for block in blocks or ()
            if any(p.requires_grad for p in block.parameters())
        }

    def disable(self) -> None:
        """Run the blocks eagerly from now on."""
        self.enabled = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the compiled blocks inside this context."""
        with override_forward(self._forwards if self.enabled else {}):
            yield
