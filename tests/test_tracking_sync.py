"""`hyperfit-dashboard sync` and `wandb`, as far as they need no server (`test_wandb_server.py`)."""

from pathlib import Path

import pytest

from hyperfitting.sweep.state import RunFolder
from hyperfitting.tracking import dashboard
from hyperfitting.tracking.sync import running, unsynced
from tests.cli import below, start
from tests.test_tracking import no_login

__all__ = ["no_login"]


def test_an_offline_run_is_uploaded_when_it_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweeps" / "x" / "seed=0" / "wandb" / "offline-run-1-a"
    folder.mkdir(parents=True)
    with RunFolder(folder.parents[1]).lock():
        assert (unsynced(tmp_path), running(tmp_path)) == ([], [folder])
        with pytest.raises(SystemExit) as end:
            dashboard.main(["--outputs", str(tmp_path), "sync"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "nothing to upload" in printed and "left out   1 that are running" in printed
    assert (unsynced(tmp_path), running(tmp_path)) == ([folder], [])


def test_a_single_run_that_is_running_is_known_to_be(tmp_path: Path) -> None:
    process = start(
        tmp_path, "preset=debug", "trainer.epochs=100000", "tracking=offline", "hydra.run.dir=r"
    )
    process.wait_until(lambda: below(tmp_path, "wandb/offline-run-*"))
    assert len(running(tmp_path)) == 1
    process.kill_group()
    assert len(unsynced(tmp_path)) == 1


def test_nothing_is_sent_to_wandb_if_its_urls_cannot_be_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    (tmp_path / "outputs").touch()
    with pytest.raises(SystemExit) as end:
        dashboard.main(["--outputs", str(tmp_path / "outputs"), "wandb"])
    assert end.value.code == 1
    assert "is not a folder" in capsys.readouterr().err  # not that W&B refuses it
