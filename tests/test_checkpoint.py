"""Checkpoint files: complete ones only, and read by any number of ranks."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from hyperfitting.errors import UserError
from hyperfitting.training import checkpoint
from hyperfitting.training.checkpoint import Checkpoint, TrainProgress


def test_a_state_that_cannot_be_resharded_is_refused() -> None:
    """Files of two ranks, whose optimizer's state is of a subclass that cannot be cut."""

    class Packed(torch.Tensor):
        pass

    shard = torch.ones(2, 3)
    shards = [(0, 2, 4, shard.as_subclass(Packed)), (2, 2, 4, shard.as_subclass(Packed))]
    with pytest.raises(UserError, match=r"Packed.*\n.*as many as before"):
        checkpoint._select_rows(shards, 0, 4)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_checkpoint_of_any_number_of_ranks_is_read_by_one(tmp_path: Path, n: int) -> None:
    """Rows are split as FSDP splits them, so that some ranks may have none."""
    weight, moment = torch.randn(4, 3), torch.randn(4, 3)
    rows_per_rank = -(-4 // n)
    for rank in range(n):
        start = min(rank * rows_per_rank, 4)
        stop = min(start + rows_per_rank, 4)
        torch.save(
            {
                "progress": asdict(TrainProgress(epoch=3, step=3, n_rows=6)),
                "rows": {"w": (start, stop - start, 4)},
                "parameters": {"w": weight[start:stop].clone()},
                "optimizer": {
                    "state": {
                        0: {"exp_avg": moment[start:stop].clone(), "step": torch.tensor(7.0)}
                    },
                    "param_groups": [{"lr": 0.1, "params": [0]}],
                },
                "scaler": {},
            },
            tmp_path / f"checkpoint-3.{rank}-of-{n}.pt",
        )
    (tmp_path / f"checkpoint-4.0-of-{n + 1}.pt").write_bytes(b"one of several, then a kill")
    loaded = Checkpoint(tmp_path).load({"w": torch.zeros(4, 3)})
    assert loaded is not None
    progress, state = loaded
    assert progress == TrainProgress(epoch=3, step=3, n_rows=6)
    torch.testing.assert_close(state["parameters"]["w"], weight)
    optimizer_state = state["optimizer"]["state"][0]
    torch.testing.assert_close(optimizer_state["exp_avg"], moment)
    assert optimizer_state["step"] == 7
    assert sorted(path.name[:12] for path in tmp_path.iterdir()) == ["checkpoint-3"] * n


def test_a_checkpoint_is_kept_when_memory_runs_out_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate …")

    monkeypatch.setattr(torch, "load", load)
    path = tmp_path / "checkpoint-3.0-of-1.pt"
    path.write_bytes(b"any")
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        Checkpoint(tmp_path).load({})
    assert path.exists()
