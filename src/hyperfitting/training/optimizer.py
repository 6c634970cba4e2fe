"""Optimizers from config (any torch-style class), and their state under FSDP."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hyperfitting.errors import UserError
from hyperfitting.runtime.distributed import local_tensor


def build_optimizer(
    config: dict[str, Any], parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return the optimizer that a config names, over `optimizer_params` of the parameters.

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
    params = optimizer_params(config, parameters)
    try:
        optimizer: torch.optim.Optimizer = instantiate(config, params, _convert_="all")
    except (InstantiationException, TypeError, ValueError) as error:
        cause = error.__cause__ or error
        raise UserError(
            f"cannot be built: {cause}",
            field="optimizer",
            value=config.get("_target_"),
            hint="see conf/optimizer/adam.yaml for a class and its arguments",
        ) from error
    return optimizer


def optimizer_params(
    config: dict[str, Any], parameters: Sequence[nn.Parameter]
) -> list[nn.Parameter]:
    """Return the parameters that an optimizer is built over.

    torchao's get each rank's shards as plain tensors: they treat each element, or block of 256, by
    itself, and their 8-bit state does not support DTensor (pytorch/ao, pull request 4216).
    """
    if not str(config.get("_target_")).startswith("torchao."):
        return list(parameters)
    return [
        nn.Parameter(local_tensor(p).detach()) if isinstance(p, DTensor) else p for p in parameters
    ]


def match_placement(parameter: Tensor, value: Any) -> Any:
    """Return this rank's shard of an optimizer's state, placed as its parameter is."""
    local = local_tensor(parameter)
    is_shard = isinstance(value, Tensor) and value.shape == local.shape
    if not (isinstance(parameter, DTensor) and is_shard):
        return value
    return DTensor.from_local(
        value.to(local.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
