"""The frozen trunk: what the first blocks make of a sequence, computed once, used in every epoch.

A tuning that leaves the first blocks alone sees the same activations enter the first trained block
in every epoch, with every seed and learning rate. They are kept as an artefact and fed to that
block; the blocks before it are not run.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.filesize import decimal
from torch import Tensor, nn
from transformers import PreTrainedModel

from hyperfitting import parameters
from hyperfitting.config import RunConfig
from hyperfitting.distributed import ALONE, Crew
from hyperfitting.errors import UserError
from hyperfitting.forwards import running
from hyperfitting.models import BaseModel
from hyperfitting.progress import Progress
from hyperfitting.store import Artefact, Store

VERSION = 1
_FILE = "train.npy"
# numpy has no bfloat16: its bits are kept
_KINDS = {"float32": (np.float32, torch.float32), "bfloat16": (np.int16, torch.bfloat16)}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptIn:
    """Where activations are kept, and the ids of what determines them: corpus and model."""

    store: Store
    inputs: dict[str, str]


@dataclass(frozen=True)
class Trunk:
    """A model's first blocks, and what they made of the training sequences."""

    stack: nn.ModuleList
    depth: int
    """How many blocks it is."""
    activations: NDArray[Any]
    """(N, T, H), mapped from disk: read as it is used."""
    dtype: torch.dtype

    def of(self, rows: NDArray[np.int64], like: Tensor) -> Tensor:
        """Return the activations (B, T, H) of some sequences, on the device and of the dtype."""
        found = torch.from_numpy(self.activations[rows])
        return found.view(self.dtype).to(like.device, like.dtype)

    def replaced(self, activations: Tensor) -> AbstractContextManager[None]:
        """Have the blocks return these activations (B, T, H), whatever they are given."""
        return instead(self.stack, range(self.depth), activations)


class _Instead(nn.Module):
    """Stands for a block: has its attributes, and returns something without running it."""

    def __init__(self, block: nn.Module, output: Tensor | None) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # not as a part of this module
        self._output = output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states if self._output is None else self._output


@contextmanager
def instead(stack: nn.ModuleList, which: range, output: Tensor | None) -> Iterator[None]:
    """Have some blocks of a stack return this instead of running; none: what they are given."""
    blocks = [stack[i] for i in which]
    for i, block in zip(which, blocks, strict=True):
        stack[i] = _Instead(block, output)
    try:
        yield
    finally:
        for i, block in zip(which, blocks, strict=True):
            stack[i] = block


def _is_kept(cfg: RunConfig) -> bool:
    return cfg.tuning.is_late and cfg.trainer.trunk_cache != "off" and not cfg.trainer.dropout


def _artefact(
    cfg: RunConfig, depth: int, kept_in: KeptIn, make: Callable[[Path], None]
) -> Artefact:
    """Return the handle of what ``depth`` frozen blocks make of the training sequences."""
    return kept_in.store.artefact(
        "trunk",
        version=VERSION,
        config={
            "blocks": depth,
            "dtype": cfg.trainer.trunk_cache,
            "precision": cfg.trainer.precision,
        },
        inputs=kept_in.inputs,
        make=make,
    )


def trunk_of(
    cfg: RunConfig,
    model: PreTrainedModel,
    tokens: NDArray[np.int32],
    kept_in: KeptIn,
    show: Progress,
    crew: Crew = ALONE,
) -> Trunk | None:
    """Return the trunk of a model; none if it has none, or nothing of it is to be kept.

    Several processes call this alike; the first of them makes it, with the help of the others.

    Args:
        cfg: the member.
        model: on its device.
        tokens: (N, T) the training sequences.
        kept_in: where the activations are, or will be.
        show: told of the sequences done.
        crew: the processes that have the model.
    """
    if not _is_kept(cfg):
        return None
    stack = parameters.blocks(model)
    depth = len(stack) - cfg.tuning.last_blocks
    if depth == 0:
        return None
    if not _can_be_replaced(model, depth, tokens[:1]):
        log.warning(
            "%s cannot go on from the activations of its first blocks: all blocks are run in "
            "every epoch",
            type(model).__name__,
        )
        return None

    def make(work: Path) -> None:
        crew.tell(True)
        _write(work, cfg, tokens, model.config.hidden_size, parts(), show)

    def parts() -> Iterator[NDArray[Any]]:
        return _computed(cfg, model, depth, tokens, crew)

    made = _artefact(cfg, depth, kept_in, make)
    if crew.leads:
        made.file(_FILE)  # by another training, perhaps, while this one waits
        crew.tell(False)
    else:
        while crew.hear():
            for _ in parts():
                pass
    stored = np.load(made.file(_FILE), mmap_mode="r", allow_pickle=False)
    return Trunk(stack, depth, stored, _KINDS[cfg.trainer.trunk_cache][1])


def size(cfg: RunConfig, shape: tuple[int, ...], width: int) -> int:
    """Return the bytes of the activations of sequences (N, T)."""
    return shape[0] * shape[1] * width * np.dtype(_KINDS[cfg.trainer.trunk_cache][0]).itemsize


def check_room(cfg: RunConfig, base: BaseModel, shape: tuple[int, ...], kept_in: KeptIn) -> None:
    """Refuse, before any work, activations of sequences (N, T) that the disk has no room for.

    Raises:
        UserError: there is not room enough, and they are not there yet.
    """
    if not _is_kept(cfg):
        return
    blocks, width = base.shape()
    store = kept_in.store.folder
    there = next(folder for folder in (store, *store.parents) if folder.is_dir())
    needed, free = size(cfg, shape, width), shutil.disk_usage(there).free
    made = _artefact(cfg, blocks - cfg.tuning.last_blocks, kept_in, lambda work: None).exists
    if needed > 0.95 * free and not made:
        raise UserError(
            f"the activations of the frozen blocks ({shape[0]:,} x {shape[1]} tokens x {width}) "
            f"take {decimal(needed)}; the disk of {there} has {decimal(free)}",
            field="trainer.trunk_cache",
            value=cfg.trainer.trunk_cache,
            hint="trainer.trunk_cache=bfloat16 (half of it) or off, a lower dataset.n_train, or "
            "store=DIR on a larger disk",
        )


@torch.no_grad()
def _activations(model: PreTrainedModel, depth: int, tokens: Tensor) -> Tensor:
    """Return what enters block ``depth`` (B, T, H), without running the blocks from it on."""
    stack = parameters.blocks(model)
    found: list[Tensor] = []

    def keep(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        found.append(hidden_states)
        return hidden_states

    with instead(stack, range(depth + 1, len(stack)), None), running({stack[depth]: keep}):
        _last_states(model, tokens)
    return found[0]


def _last_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return what the model makes of the states (B, T, H) that enter its output layer."""
    layer = model.get_output_embeddings()
    with running({layer: lambda states: states} if layer is not None else {}):
        made: Tensor = model(input_ids=tokens, use_cache=False).logits
    return made


@torch.no_grad()
def _can_be_replaced(model: PreTrainedModel, depth: int, tokens: NDArray[np.int32]) -> bool:
    """Return whether the model makes the same of a text's start with its trunk replaced."""
    start = torch.as_tensor(tokens[:, :8], dtype=torch.long, device=model.device)
    was_training = model.training
    model.eval()
    try:
        expected = _last_states(model, start)
        activations = _activations(model, depth, start)
        with instead(parameters.blocks(model), range(depth), activations):
            found = _last_states(model, start)
        return bool(torch.equal(found, expected))
    except (TypeError, IndexError, AttributeError, RuntimeError):  # blocks of another kind
        return False
    finally:
        model.train(was_training)


def _computed(
    cfg: RunConfig,
    model: PreTrainedModel,
    depth: int,
    tokens: NDArray[np.int32],
    crew: Crew,
) -> Iterator[NDArray[Any]]:
    """Yield what enters block ``depth``, of some sequences after the other: (B, T, H) as stored."""
    exact = _KINDS[cfg.trainer.trunk_cache][1]
    was_training = model.training
    model.eval()
    step = cfg.hardware.evaluation_batch_size * crew.size
    for start in range(0, len(tokens), step):
        rows = tokens[start : start + step]
        batch = torch.as_tensor(crew.share(rows)[0], dtype=torch.long)
        with parameters.autocast(model, cfg.trainer.precision):
            found = _activations(model, depth, batch.to(model.device))
        bits = found.to(exact).cpu()
        bits = bits if exact == torch.float32 else bits.view(torch.int16)
        yield crew.gathered(bits.numpy(), len(rows))
    model.train(was_training)


def _write(
    work: Path,
    cfg: RunConfig,
    tokens: NDArray[np.int32],
    width: int,
    parts: Iterator[NDArray[Any]],
    show: Progress,
) -> None:
    shape = (*tokens.shape, width)
    told = decimal(size(cfg, tokens.shape, width))
    stored = _KINDS[cfg.trainer.trunk_cache][0]
    out = np.lib.format.open_memmap(work / _FILE, mode="w+", dtype=stored, shape=shape)
    done = 0
    with show(f"running the frozen blocks, once ({told} in the store)", tokens.size, "tokens") as (
        advance
    ):
        for part in parts:
            out[done : done + len(part)] = part
            done += len(part)
            advance(part.shape[0] * part.shape[1])
    out.flush()
