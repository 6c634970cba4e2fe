"""Following a training that runs in other processes."""

import json
from pathlib import Path

from hyperfitting.training.history import TrainingHistory
from hyperfitting.training.launch import HistoryFollower


def test_rows_are_followed_from_the_start_of_a_training(tmp_path: Path) -> None:
    follower = HistoryFollower(tmp_path)
    assert not follower.has_started and follower.read() == []
    history = TrainingHistory(tmp_path)
    assert follower.has_started and follower.read() == []
    history.append({"step": 1, "train/loss": 2.5})
    assert follower.read() == [{"step": 1, "train/loss": 2.5}]
    history.add_validation(1, {"val/loss": 3.0})
    history.append({"epoch": 1, "step": 1, "train/loss": 2.5})
    assert follower.read() == [{"epoch": 1, "step": 1, "train/loss": 2.5, "val/loss": 3.0}]
    assert follower.read() == []


def test_rows_that_a_resume_drops_are_never_read(tmp_path: Path) -> None:
    history = TrainingHistory(tmp_path)
    for step in (1, 2, 3):
        history.append({"step": step, "train/loss": 1.0})
    follower = HistoryFollower(tmp_path)
    assert follower.read() == []
    resumed = TrainingHistory(tmp_path, n_rows=2)
    resumed.append({"step": 3, "train/loss": 0.5})
    assert [row["train/loss"] for row in follower.read()] == [1.0, 1.0, 0.5]


def test_a_line_is_read_when_it_is_complete(tmp_path: Path) -> None:
    follower = HistoryFollower(tmp_path)
    TrainingHistory(tmp_path)
    line = json.dumps({"step": 1, "train/loss": 2.5}) + "\n"
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write(line[:9])
        file.flush()
        assert follower.read() == []
        file.write(line[9:])
        file.flush()
        assert follower.read() == [json.loads(line)]
