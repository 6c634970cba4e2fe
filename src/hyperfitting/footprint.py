"""What a training holds in memory at its peak: counted before it begins, not tried.

Weights, gradients and the optimizer's state follow from the number of parameters and from one step
of the optimizer on a small one. What autograd keeps of a pass is counted on one and on two blocks
of the model, run on tensors that have a shape and no content; the other blocks are alike.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from hyperfitting import costs
from hyperfitting.config import RunConfig, TuningConfig, conf_dir
from hyperfitting.models import BaseModel
from hyperfitting.store import Artefact, Store, write_json

VERSION = 1
PROGRAM = {"cpu": 0.5e9, "cuda": 0.8e9, "mps": 0.8e9}
"""Bytes of Python, torch and its libraries in a process; on a GPU, of CUDA and its libraries."""
_CHUNKS = 3
"""Chunks of logits at once: they, their logarithms, and those of the chunk before."""
_MOST_RANKS = 64
_UNMASKED = "hyperfitting_unmasked"


@dataclass(frozen=True)
class Kept:
    """What a tuning trains, and what autograd keeps of one pass, in bytes."""

    in_block: int
    """Of a trained block."""
    outside: int
    trained_in_block: int
    """Parameters."""
    trained_outside: int


@dataclass(frozen=True)
class Footprint:
    """The bytes that one process holds at the peak of a training."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """What autograd keeps of the passes, and the logits that are there at once."""
    gathered: float
    """What several processes have brought together of their shards."""
    program: float

    @property
    def peak(self) -> float:
        """All of it."""
        return float(sum(vars(self).values()))


def kept_by(cfg: RunConfig, base: BaseModel, rows: int, store: Store) -> Artefact:
    """Return the artefact of what autograd keeps of ``rows`` sequences: `kept.json`."""

    def make(work: Path) -> None:
        one, two = (_kept(cfg, base, rows, blocks) for blocks in (1, 2))
        block = [b - a for a, b in zip(one, two, strict=True)]
        outside = [a - each for a, each in zip(one, block, strict=True)]
        write_json(work / "kept.json", asdict(Kept(block[0], outside[0], block[1], outside[1])))

    tuning = cfg.tuning.determining()
    tuning.pop("last_blocks", None)
    return store.artefact(
        "footprint",
        version=VERSION,
        config={
            "tuning": tuning,
            "shape": [rows, cfg.dataset.seq_len],
            "precision": cfg.trainer.precision,
            "dropout": cfg.trainer.dropout,
            "activation_checkpointing": cfg.hardware.activation_checkpointing,
        },
        inputs={"model": base.id},
        make=make,
    )


def _kept(cfg: RunConfig, base: BaseModel, rows: int, blocks: int) -> tuple[int, int]:
    """Return the bytes that autograd keeps of a pass through ``blocks`` blocks, all of them tuned,
    and the number of parameters that are trained."""
    import torch
    import transformers
    from torch._subclasses import FakeTensorMode
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from hyperfitting import parameters
    from hyperfitting.forwards import running

    config = copy.deepcopy(base.architecture())
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    kept: dict[int, Any] = {}
    with torch.device("meta"):
        # of tensors without content transformers cannot see that they need no mask
        transformers.AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
        transformers.AttentionMaskInterface.register(_UNMASKED, lambda *_, **__: None)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, base.dtype), attn_implementation=_UNMASKED
        )
        tuning = replace(cfg.tuning, last_blocks=blocks) if cfg.tuning.is_late else cfg.tuning
        trained = parameters.select_trainable(model, tuning)
    with FakeTensorMode():
        _without_content(model)
        if not cfg.trainer.dropout:
            parameters.no_dropout(model)
        if cfg.hardware.activation_checkpointing:
            model.activation_checkpointing_enable()
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return tensor

        head = model.get_output_embeddings()
        model.train()
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            parameters.autocast(model, cfg.trainer.precision),
            running({head: lambda states: states} if head is not None else {}),
        ):
            model(
                input_ids=torch.zeros(rows, cfg.dataset.seq_len, dtype=torch.long), use_cache=False
            )
    return sum(s.nbytes() for s in kept.values()), sum(p.numel() for p in trained.values())


def _without_content(model: Any) -> None:
    """Put tensors on the CPU in the place of a model's own, which are nowhere. (In fake mode.)"""
    import torch

    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in made:  # one may have several places
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, torch.nn.Parameter):
                        empty = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    made[tensor] = empty
                if tensor is not None:
                    tensors[name] = made[tensor]


def state_of(optimizer: dict[str, Any], dtype: str, store: Store) -> Artefact:
    """Return the artefact of what an optimizer keeps for each parameter: `state.json`, in bytes."""

    def make(work: Path) -> None:
        import torch

        from hyperfitting.training.learner import build_optimizer

        weight = torch.nn.Parameter(torch.zeros(64, 512, dtype=getattr(torch, dtype)))
        weight.grad = torch.ones_like(weight)
        made = build_optimizer(optimizer, [weight])
        made.step()
        parts = [part for state in made.state[weight].values() for part in _inner(state)]
        found = sum(part.numel() * part.itemsize for part in parts if part.numel() > 1)
        write_json(work / "state.json", found / weight.numel())

    named = {k: v for k, v in optimizer.items() if k != "lr"}
    return store.artefact(
        "footprint",
        version=VERSION,
        config={"optimizer": named, "dtype": dtype},
        inputs={},
        make=make,
    )


def _inner(state: Any) -> list[Any]:
    """Return the plain tensors that a tensor of several is made of."""
    import torch

    if not isinstance(state, torch.Tensor):
        return []
    if type(state) is torch.Tensor:
        return [state]
    names, _ = cast(Any, state).__tensor_flatten__()
    return [getattr(state, name) for name in names]


def footprint(cfg: RunConfig, base: BaseModel, store: Store, device: str) -> Footprint:
    """Return what each process of a training holds at its peak, uncompiled.

    Args:
        cfg: the member; `hardware.ranks` says how many processes.
        base: its model.
        store: keeps what was counted.
        device: kind of device, `cpu` or `cuda`.
    """
    size, ranks, item = base.size(store), cfg.hardware.ranks or 1, costs.itemsize(cfg)
    share = math.ceil(cfg.trainer.batch_size / ranks)
    rows = min(share, costs.rows_in_a_pass(cfg, device))
    kept = _read(kept_by(cfg, base, rows, store))
    blocks = min(cfg.tuning.last_blocks, size.blocks) if cfg.tuning.is_late else size.blocks
    trained = kept.trained_outside + blocks * kept.trained_in_block
    shards = 1 if cfg.tuning.is_lora else ranks  # every process has all adapters
    logits = 4 * rows * cfg.dataset.seq_len * size.head / size.width
    activations: float = kept.outside + blocks * kept.in_block
    activations += _CHUNKS * min(costs.CHUNK_BYTES[device], logits)
    activations += size.head * item * (cfg.tuning.method == "full")
    if cfg.hardware.activation_checkpointing:  # one block is run again for its gradients
        plain = replace(cfg.hardware, activation_checkpointing=False)
        activations += _read(kept_by(replace(cfg, hardware=plain), base, rows, store)).in_block
    gradients: float = trained * item / shards
    # in one pass the gradients come as the activations go
    at_loss = activations if rows >= share else activations + gradients
    gathered = _gathered(size, item, cfg.tuning, device) if ranks > 1 else (0.0, 0.0, 0.0)
    # when a pass begins, at its loss, at its end
    held, brought = max(zip((0.0, at_loss, gradients), gathered, strict=True), key=sum)
    state = json.loads(
        state_of(cfg.optimizer, cfg.model.dtype, store).file("state.json").read_text("utf-8")
    )
    return Footprint(
        weights=size.parameters * item / ranks,
        gradients=min(gradients, held),
        optimizer=trained * state / shards,
        activations=max(held - gradients, 0.0),
        gathered=brought,
        program=PROGRAM[device],
    )


def _gathered(
    size: costs.Size, item: int, tuning: TuningConfig, device: str
) -> tuple[float, float, float]:
    """Return the bytes that processes have together when a pass begins, at its loss, at its end.

    These are copies of one block and of the output layer (or the embedding, which is as large) that
    FSDP2 and transformers have at once, as the allocator counts them (docs/scale.md).
    """
    block, layer = size.in_blocks / size.blocks * item, size.head * item
    # gloo puts together apart from where it is wanted; tied weights are in two groups of FSDP's
    apart, tied = device == "cpu", size.parameters - size.in_blocks < 1.5 * size.head
    # weights, and those on their way; and of a trained block the gradients, and they on their way
    blocks = block * (2 + 2 * (not tuning.is_lora) + apart)
    full = tuning.method == "full"
    return layer * (2 + tied + apart), blocks + 2 * layer, full * layer * (3 + tied + apart)


def _read(kept: Artefact) -> Kept:
    return Kept(**json.loads(kept.file("kept.json").read_text("utf-8")))


Step = Callable[[RunConfig], Iterator[tuple[str, RunConfig]]]


def _checkpointing(cfg: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    if not cfg.hardware.activation_checkpointing:
        hardware = replace(cfg.hardware, activation_checkpointing=True)
        yield "hardware.activation_checkpointing=true", replace(cfg, hardware=hardware)


def _single_rows(cfg: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    share = math.ceil(cfg.trainer.batch_size / (cfg.hardware.ranks or 1))
    if min(share, cfg.hardware.micro_batch_size or share) > 1:
        hardware = replace(cfg.hardware, micro_batch_size=1)
        yield "hardware.micro_batch_size=1", replace(cfg, hardware=hardware)


def _spread(cfg: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    if not cfg.hardware.spread and (cfg.hardware.ranks or 1) > 1:
        hardware = replace(cfg.hardware, spread=True)
        yield "hardware.spread=true", replace(cfg, hardware=hardware)


def _low_memory(cfg: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    if cfg.model.dtype == "float32":
        model = replace(cfg.model, dtype="bfloat16")
        for name in ("adam_bf16", "adam_8bit"):
            loaded = OmegaConf.load(conf_dir() / "optimizer" / f"{name}.yaml")
            optimizer: dict[str, Any] = dict(cast(Any, OmegaConf.to_container(loaded)))
            optimizer["lr"] = cfg.optimizer["lr"]
            trainer = replace(cfg.trainer, precision="float32")  # that of the weights
            yield (
                f"model.dtype=bfloat16 trainer.precision=float32 optimizer={name}",
                replace(cfg, model=model, optimizer=optimizer, trainer=trainer),
            )


def _more_ranks(cfg: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    ranks = (cfg.hardware.ranks or 1) * 2
    while ranks <= _MOST_RANKS:
        hardware = replace(cfg.hardware, ranks=ranks)
        yield f"hardware.ranks={ranks}", replace(cfg, hardware=hardware)
        ranks *= 2


def _late_stage(cfg: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    if cfg.tuning.method == "full":
        tuning = replace(cfg.tuning, method="late_stage")
        yield "tuning=late_stage", replace(cfg, tuning=tuning)


STEPS: tuple[Step, ...] = (
    _checkpointing, _single_rows, _spread, _low_memory, _more_ranks, _late_stage,
)  # fmt: skip
"""Each yields overrides that take less memory, with the config: those that cost least first."""
