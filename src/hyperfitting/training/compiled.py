"""Have torch compile the blocks of a model for training, where it pays, and not for anything else.

One block is compiled and serves all of its kind. Decoding meets a new length at every step, and
would be compiled again and again: outside `Compiled.used` the blocks run as they are.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hyperfitting import parameters
from hyperfitting.config import RunConfig
from hyperfitting.forwards import running

COMPILER_ERRORS = (TorchDynamoException, CppCompileError, InvalidCxxCompiler)
_ENOUGH_WORK = 2e14
"""Floating-point operations: at 200 billion a second, compiling costs less than it saves."""


def pays(cfg: RunConfig, device: torch.device, trained: Iterable[nn.Parameter]) -> bool:
    """Return whether training is to be compiled: as asked for, or if the work is large enough.

    Of a model in shards only as asked for.

    The work is counted, not timed, so that the same config has the same numbers.
    """
    trained = list(trained)
    sharded = any(isinstance(p, DTensor) for p in trained)
    if cfg.hardware.compile is not None or device.type == "mps" or sharded:
        return bool(cfg.hardware.compile)
    tokens = cfg.dataset.n_train * cfg.dataset.seq_len * cfg.trainer.epochs
    work = 6 * sum(p.numel() for p in trained) * tokens
    return work >= (_ENOUGH_WORK if device.type == "cpu" else 100 * _ENOUGH_WORK)


class Compiled:
    """The blocks of a model with trained parameters, compiled if ``on``."""

    def __init__(self, model: PreTrainedModel, on: bool) -> None:
        self.on = on
        blocks = parameters.find_blocks(model) if on else None
        self._blocks = {
            block: torch.compile(block.forward, dynamic=False)
            for block in blocks or ()
            if any(p.requires_grad for p in block.parameters())
        }

    @contextmanager
    def used(self) -> Iterator[None]:
        """Run the compiled blocks in this context."""
        with running(self._blocks if self.on else {}):
            yield
