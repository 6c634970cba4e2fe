"""Trainings of tiny models on random tokens, for the tests of the training loop."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hyperfitting.data.sequences import Sequences
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load
from hyperfitting.progress import MetricsRow
from hyperfitting.store.artifact import Store
from hyperfitting.training import history
from hyperfitting.training import train as train_module
from hyperfitting.training.activation_cache import CacheLocation
from hyperfitting.training.config import TrainingConfig
from hyperfitting.training.step import train_step
from hyperfitting.training.train import train
from tests.conftest import Compose


@pytest.fixture
def cfg(compose: Compose) -> TrainingConfig:
    return compose(
        "preset=debug", "optimizer.lr=1e-3", "trainer.epochs=3", "trainer.batch_size=3",
        "trainer.val_prompt_len=6", "trainer.val_max_new_tokens=8", "hardware.device=cpu",
    ).training  # fmt: skip


DATA = Sequences(
    np.random.default_rng(0).integers(0, 256, (7, 16), dtype=np.int32),
    np.random.default_rng(1).integers(0, 256, (3, 16), dtype=np.int32),
)


def cache_location(work: Path, base: BaseModel) -> CacheLocation:
    return CacheLocation(Store(work.parent / "store"), {"model": base.id})


def run_training(
    cfg: TrainingConfig, base: BaseModel, work: Path
) -> tuple[list[MetricsRow], dict[str, torch.Tensor]]:
    """Train on `DATA`; return the rows and the trained parameters."""
    work.mkdir(parents=True, exist_ok=True)
    rows = list(train(cfg, DATA, base, work, cache_location(work, base)))
    assert list(history.read(work)) == rows
    return rows, load_file(work / "last.safetensors")


def step_losses(rows: list[MetricsRow]) -> list[float]:
    return [row["train/loss"] for row in rows if "epoch" not in row]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make the ``number``-th train step from now on raise KeyboardInterrupt."""
    taken = 0

    def interrupted(*arguments: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == number:
            raise KeyboardInterrupt
        return train_step(*arguments)

    monkeypatch.setattr(train_module, "train_step", interrupted)


def plain_loop(cfg: TrainingConfig, base: BaseModel) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Hyperfitting as anyone would write it: transformers' own loss, one batch at a time."""
    model = load(base).eval()  # no dropout
    kwargs = {k: v for k, v in cfg.optimizer.items() if k != "_target_"}
    kinds = {"torch.optim.Adam": torch.optim.Adam, "torch.optim.SGD": torch.optim.SGD}
    optimizer = kinds[cfg.optimizer["_target_"]](model.parameters(), **kwargs)
    losses = []
    for epoch in range(cfg.trainer.epochs):
        order = np.random.default_rng([cfg.trainer.seed, epoch]).permutation(len(DATA.train))
        for start in range(0, len(order), cfg.trainer.batch_size):
            ids = torch.as_tensor(DATA.train[order[start : start + cfg.trainer.batch_size]]).long()
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}
