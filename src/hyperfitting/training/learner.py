"""A model that learns: its trained parameters, their optimizer, and one update of them.

A batch passes in parts, from the frozen trunk where there is one, and is shared out where several
processes have the model.
"""

import importlib.util
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hyperfitting import costs, models, parameters, products
from hyperfitting.config import RunConfig, TrainerConfig
from hyperfitting.distributed import ALONE, Crew, gather_anew, local
from hyperfitting.errors import UserError
from hyperfitting.forwards import running
from hyperfitting.models import BaseModel
from hyperfitting.training.compiled import COMPILER_ERRORS, Compiled, pays
from hyperfitting.training.loss import NextTokenLoss
from hyperfitting.training.trunk import Trunk

Rows = NDArray[np.int64]
log = logging.getLogger(__name__)


@dataclass
class Learner:
    """A model with the optimizer of its trained parameters."""

    model: PreTrainedModel
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    trainer: TrainerConfig
    micro_batch_size: int
    compiled: Compiled
    loss: NextTokenLoss
    crew: Crew
    linear: Mapping[nn.Module, Callable[[Tensor], Tensor]]
    trunk: Trunk | None = None

    @classmethod
    def new(cls, cfg: RunConfig, base: BaseModel, crew: Crew = ALONE) -> "Learner":
        """Return the original model, ready to be tuned. Its trunk, if any, is not replaced yet.

        Of several processes each has its shards of it.

        Raises:
            UserError: the model, the tuning or the optimizer cannot be had as asked.
        """
        device = models.device(cfg.hardware)
        model = models.load(base, crew)
        trained = parameters.select_trainable(model, cfg.tuning, cfg.trainer.seed)
        if not cfg.trainer.dropout:
            parameters.no_dropout(model)
        if crew.size == 1:
            model.to(device)
        if cfg.hardware.activation_checkpointing:
            model.activation_checkpointing_enable()
        stepped = _stepped(cfg.optimizer, list(trained.values()))
        return cls(
            model,
            trained,
            build_optimizer(cfg.optimizer, stepped),
            torch.amp.GradScaler(device.type, enabled=cfg.trainer.precision == "float16"),
            cfg.trainer,
            costs.rows_in_a_pass(cfg, device.type),
            Compiled(model, on=pays(cfg, device, trained.values())),
            NextTokenLoss(model),
            crew,
            products.of(model, cfg.trainer.precision),
        )

    def update(self, tokens: Tensor, rows: Rows) -> float:
        """Take one step and return its mean next-token loss in nats.

        Args:
            tokens: (B, T) sequences.
            rows: (B,) where they stand among the training sequences.
        """
        tokens = tokens.to(self.model.device)
        while True:
            try:
                with running(self.linear), self.compiled.used():
                    return self._update(tokens, rows)
            except torch.OutOfMemoryError:
                if self.micro_batch_size == 1 or self.crew.size > 1:  # the others are further on
                    raise
                self.micro_batch_size = math.ceil(min(self.micro_batch_size, len(tokens)) / 2)
                log.warning(
                    "out of GPU memory: going on with hardware.micro_batch_size=%d",
                    self.micro_batch_size,
                )
            except COMPILER_ERRORS as error:
                if not self.compiled.on:
                    raise
                self.compiled.on = False
                log.warning("torch cannot compile this model here (%s): it runs as it is", error)

    def _update(self, tokens: Tensor, rows: Rows) -> float:
        for parameter in self.trained.values():
            parameter.grad = None
        predicted = tokens[:, 1:].numel()
        total = torch.zeros((), device=tokens.device)
        mine, counted = self.crew.share(np.arange(len(tokens)))
        for start in range(0, len(mine), self.micro_batch_size):
            part = mine[start : start + self.micro_batch_size]  # (b,)
            with self._trunk_of(rows[part]):
                with parameters.autocast(self.model, self.trainer.precision):
                    loss = self.loss(tokens[part], max(0, counted - start)) / predicted
                # FSDP takes the mean over processes; what is wanted is the sum
                self.scaler.scale(loss * self.crew.size).backward()
            total += loss.detach()
        if self.crew.size > 1:
            self._sum_gradients()
        if self.trainer.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(list(self.trained.values()), self.trainer.clip_norm)
        for parameter, stepped in zip(self.trained.values(), self._stepped(), strict=True):
            if stepped is not parameter and parameter.grad is not None:
                stepped.data, stepped.grad = local(parameter.detach()), local(parameter.grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(self.crew.total(total))

    def _stepped(self) -> list[nn.Parameter]:
        """Return what the optimizer has, in the order of what is trained."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _sum_gradients(self) -> None:
        """Do for parameters that every process has, as adapters are, what FSDP does for others."""
        for parameter in self.trained.values():
            if parameter.grad is not None and not isinstance(parameter, DTensor):
                parameter.grad = self.crew.total(parameter.grad) / self.crew.size

    def _trunk_of(self, rows: Rows) -> AbstractContextManager[None]:
        if self.trunk is None:
            return nullcontext()
        return self.trunk.replaced(self.trunk.of(rows, next(self.model.parameters())))

    def parameters(self) -> dict[str, Tensor]:
        """Return the trained parameters as they are now."""
        return {name: p.detach() for name, p in self.trained.items()}

    def state(self) -> dict[str, Any]:
        """Return all that a resumed training needs of this one."""
        return {
            "parameters": self.parameters(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": self._random(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Become what `state` was taken from."""
        gather_anew(self.model)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                local(parameter).copy_(state["parameters"][name])
        stepped = self._stepped()
        moments = {
            number: {key: _lies_as(stepped[number], value) for key, value in found.items()}
            for number, found in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"])

    def _random(self) -> dict[str, Tensor]:
        """Return where the random numbers are that dropout draws."""
        found = {"cpu": torch.get_rng_state()}
        if self.model.device.type == "cuda":
            found["cuda"] = torch.cuda.get_rng_state()
        return found


def _stepped(config: dict[str, Any], trained: list[nn.Parameter]) -> list[nn.Parameter]:
    """Return what an optimizer is given: of torchao's, a process's own rows as plain tensors.

    They treat each number, or row of 256, by itself, and their 8-bit state cannot lie in shards
    (pytorch/ao, pull request 4216).
    """
    if not str(config.get("_target_")).startswith("torchao."):
        return trained
    return [nn.Parameter(local(p).detach()) if isinstance(p, DTensor) else p for p in trained]


def _lies_as(parameter: Tensor, value: Any) -> Any:
    """Return a process's part of an optimizer's state so that it lies as its parameter does."""
    of_rows = isinstance(value, Tensor) and value.shape == local(parameter).shape
    if not (isinstance(parameter, DTensor) and of_rows):
        return value
    return DTensor.from_local(
        value.to(local(parameter).device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def build_optimizer(
    config: dict[str, Any], parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return the optimizer that a config names.

    Raises:
        UserError: there is no such class, or it refuses its arguments.
    """
    package = str(config.get("_target_")).partition(".")[0]
    if package == "torchao" and importlib.util.find_spec(package) is None:
        raise UserError(
            "needs the package torchao, which is not installed",
            field="optimizer",
            value=config["_target_"],
            hint="pip install 'hyperfitting[low-memory]'",
        )
    try:
        optimizer: torch.optim.Optimizer = instantiate(config, parameters, _convert_="all")
    except (InstantiationException, TypeError, ValueError) as error:
        cause = error.__cause__ or error
        raise UserError(
            f"cannot be built: {cause}",
            field="optimizer",
            value=config.get("_target_"),
            hint="see conf/optimizer/adam.yaml for a class and its arguments",
        ) from error
    return optimizer
