"""Several processes that train one model: the numbers of one, whoever dies."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from hyperfitting import models
from hyperfitting.config import DecodeConfig, HardwareConfig, RunConfig
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.decoding.likelihood import measure
from hyperfitting.distributed import ALONE, Crew, in_one_place, ranks
from hyperfitting.errors import UserError
from hyperfitting.models import BaseModel, ModelState
from hyperfitting.pipeline import Pipeline
from hyperfitting.store import Store
from hyperfitting.training.checkpoint import Checkpoint, Progress
from tests.conftest import Compose, below, command, environment, hyperfit

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512}
TUNINGS = {
    "full": ["tuning=full"],
    "late_stage": ["tuning=late_stage", "tuning.last_blocks=2"],
    "lora": ["tuning=lora", "tuning.lora_rank=4"],
    "late_stage_lora": ["tuning=late_stage_lora", "tuning.last_blocks=2", "tuning.lora_rank=4"],
}
SHAPE = [
    "preset=debug", "dataset.n_train=7", "dataset.n_val=5", "trainer.epochs=2",
    "trainer.epoch_contexts=3", "hardware.device=cpu", "hardware.threads=1",
]  # fmt: skip
"""Batches of 4 and of 3, and looks at 5 texts and 3 contexts: no number of processes divides all"""
SGD = {"_target_": "torch.optim.SGD", "lr": 0.3, "momentum": 0.9}
"""Adam makes whole steps of gradients that are only rounding."""


def trained(cfg: RunConfig, store: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Train a member; return its history and what was trained."""
    cfg.store = str(store)
    line = Pipeline.of(cfg, torch.device("cpu"))
    assert line.tuned is not None
    history = json.loads(line.tuned.file("history.json").read_text("utf-8"))
    return history, load_file(line.tuned.file("last.safetensors"))


def assert_same(found: Any, expected: Any) -> None:
    (rows, weights), (expected_rows, expected_weights) = found, expected
    assert [set(row) for row in rows] == [set(row) for row in expected_rows]
    for row, one in zip(rows, expected_rows, strict=True):
        for name, value in one.items():
            assert row[name] == pytest.approx(value, rel=1e-5), (name, row)
    assert set(weights) == set(expected_weights)
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)


def many(*cases: tuple[str, str, int]) -> Any:
    """Mark all cases but the first: they take minutes together."""
    return [
        pytest.param(*case, marks=[pytest.mark.distributed] if number else [])
        for number, case in enumerate(cases)
    ]


@pytest.mark.parametrize(
    ("architecture", "tuning", "n"),
    many(
        ("llama", "late_stage", 2), ("llama", "full", 2), ("llama", "lora", 2),
        ("llama", "late_stage_lora", 2), ("gpt2", "full", 2), ("gpt2", "late_stage", 2),
        ("gpt2", "lora", 2), ("llama", "full", 4), ("llama", "late_stage", 4),
        ("llama", "lora", 4), ("gpt2", "full", 4), ("gpt2", "late_stage", 4), ("gpt2", "lora", 4),
    ),
)  # fmt: skip
def test_several_processes_train_to_the_numbers_of_one(
    compose: Compose, tmp_path: Path, architecture: str, tuning: str, n: int
) -> None:
    cfg = compose(*SHAPE, *TUNINGS[tuning], "trainer.clip_norm=1.0")
    cfg.optimizer = SGD
    if architecture == "gpt2":
        cfg.model.architecture = GPT2
    expected = trained(cfg, tmp_path / "one")
    assert len({row["train/loss"] for row in expected[0]}) == len(expected[0])  # it does train
    cfg.hardware.ranks = n
    found = trained(cfg, tmp_path / "many")
    assert_same(found, expected)
    assert (tmp_path / "many" / "trunk").is_dir() == tuning.startswith("late")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "more", ["hardware.activation_checkpointing=true", "trainer.precision=bfloat16"]
)
def test_they_do_with_what_a_large_model_needs(compose: Compose, tmp_path: Path, more: str) -> None:
    expected, _ = trained(compose(*SHAPE, more), tmp_path / "one")
    found, _ = trained(compose(*SHAPE, more, "hardware.ranks=2"), tmp_path / "many")
    for row, one in zip(found, expected, strict=True):
        assert row["train/loss"] == pytest.approx(one["train/loss"], rel=1e-2)


LONG = [
    *(o for o in SHAPE if not o.startswith("trainer.epochs")), "trainer.epochs=12",
    "hydra.run.dir=run",
]  # fmt: skip


def begun(folder: Path, n: int, *more: str) -> subprocess.Popen[str]:
    """Begin to train in ``n`` processes; return when they have a checkpoint."""
    process = subprocess.Popen(
        command(*LONG, *more, f"hardware.ranks={n}"), cwd=folder, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while len(below(folder, f"tuned/*.partial/checkpoint-*-of-{n}.pt")) < n:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def helpers_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Return the processes that help another, by rank."""
    found = psutil.Process(process.pid).children()
    return {
        int(p.environ()["RANK"]): p for p in found if "hyperfitting.training.helper" in p.cmdline()
    }


@pytest.mark.distributed
def test_after_any_death_the_training_goes_on_in_any_number_of_processes(tmp_path: Path) -> None:
    """Four, of which one is killed; then two, whose first is; then one."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    assert hyperfit(whole, *LONG).returncode == 0

    process = begun(cut, 4)
    helpers = helpers_of(process)
    assert sorted(helpers) == [1, 2, 3]
    helpers[2].send_signal(signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 2 of 4 was killed (SIGKILL)" in told and "Traceback" not in told
    psutil.wait_procs(list(helpers.values()), timeout=10)
    assert not [p for p in helpers.values() if p.is_running()]

    process = begun(cut, 2)
    helpers = helpers_of(process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    psutil.wait_procs(list(helpers.values()), timeout=10)
    assert not [p for p in helpers.values() if p.is_running()]

    ended = hyperfit(cut, *LONG)
    assert ended.returncode == 0, ended.stderr
    history, expected = (
        json.loads(below(folder, "tuned/*/history.json")[0].read_text()) for folder in (cut, whole)
    )
    np.testing.assert_allclose(
        [row["train/loss"] for row in history], [row["train/loss"] for row in expected], rtol=1e-3
    )


@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", ["adam_bf16", "adam_8bit"])
def test_models_in_bfloat16_learn_as_in_one_process(
    compose: Compose, tmp_path: Path, optimizer: str
) -> None:
    """To the noise of rounding stochastically, which is some 0.001 from one seed to another."""
    low = ["model.dtype=bfloat16", f"optimizer={optimizer}", "optimizer.lr=3e-3"]
    overrides = [*SHAPE, *low, "model.architecture.hidden_size=128", "trainer.epochs=4"]
    expected, _ = trained(compose(*overrides), tmp_path / "one")
    found, _ = trained(compose(*overrides, "hardware.ranks=2"), tmp_path / "many")
    assert expected[-1]["train/loss"] < expected[0]["train/loss"] - 1
    for row, one in zip(found, expected, strict=True):
        assert row["train/loss"] == pytest.approx(one["train/loss"], abs=0.01)


@pytest.mark.distributed
def test_in_as_many_processes_a_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """With a state of 8 bits, whose tensors are of a kind of their own."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    low = ["model.dtype=bfloat16", "optimizer=adam_8bit", "model.architecture.hidden_size=128"]
    assert hyperfit(whole, *LONG, *low, "hardware.ranks=2").returncode == 0
    process = begun(cut, 2, *low)
    process.send_signal(signal.SIGTERM)  # in the middle of an epoch, most likely
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "told to end" in told and "Traceback" not in told
    assert hyperfit(cut, *LONG, *low, "hardware.ranks=2").returncode == 0
    for name in ("history.json", "last.safetensors", "best_val.safetensors"):
        found, expected = (below(folder, f"tuned/*/{name}")[0] for folder in (cut, whole))
        assert found.read_bytes() == expected.read_bytes()


@pytest.mark.distributed
def test_torchrun_starts_the_same(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*torchrun, "-m", "hyperfitting.run", *SHAPE, "hydra.run.dir=two", "store=two-store"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("record ") == 1
    one = hyperfit(tmp_path, *SHAPE, "hydra.run.dir=one", "store=one-store")
    assert one.returncode == 0
    one_loss, two_loss = (
        json.loads(below(tmp_path / store, "history.json")[0].read_text())[-1]["train/loss"]
        for store in ("one-store", "two-store")
    )
    assert two_loss == pytest.approx(one_loss, rel=1e-3)


def test_torchrun_is_for_one_member(tmp_path: Path) -> None:
    ended = hyperfit(tmp_path, "-m", "preset=debug", "seed=0,1", WORLD_SIZE="2", RANK="0")
    assert ended.returncode == 1
    assert "torchrun starts processes for one member" in ended.stderr


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_model_spread_over_devices_is_the_same(
    compose: Compose, store: Store, tuning: str
) -> None:
    """Here there is one device, so that accelerate has nowhere else to place it."""
    cfg = compose(*SHAPE, *TUNINGS[tuning])
    cfg.store = str(store.folder)
    line = Pipeline.of(cfg, torch.device("cpu"))
    state = ModelState(line.base, line.tuned)
    tokens = torch.arange(20).view(2, 10)
    spread = state.load(torch.device("cpu"), spread=True)
    with torch.inference_mode():
        expected = state.load(torch.device("cpu"))(input_ids=tokens).logits
        assert torch.equal(spread(input_ids=tokens).logits, expected)


def test_texts_are_read_and_continued_where_blocks_lie_in_other_places(
    base: BaseModel, tmp_path: Path
) -> None:
    """The other place is the disk here, where accelerate fetches a block's weights from."""
    texts = np.random.default_rng(0).integers(0, 256, (5, 12), dtype=np.int32)
    greedy = DecodeConfig(name="greedy", seed=0)

    def done(model: PreTrainedModel) -> tuple[Any, Any]:
        return measure(model, texts, 2), continue_texts(model, texts, 30, greedy).tokens

    expected, expected_tokens = done(models.load(base).eval())
    model = models.load(base).eval()
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys([*names, "model.layers.0", "model.layers.2"], "cpu")
    places["model.layers.1"] = "disk"
    spread = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert not in_one_place(spread)
    found, tokens = done(spread)
    assert tokens == expected_tokens
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5)


def test_shares_are_all_rows_and_of_one_length() -> None:
    rows = np.arange(7 * 2).reshape(7, 2)
    assert ALONE.share(rows)[1] == 7
    for size in range(1, 9):
        shares = [Crew(rank, size).share(rows) for rank in range(size)]
        assert len({share.shape for share, _ in shares}) == 1
        counted = np.concatenate([share[:n] for share, n in shares])
        np.testing.assert_array_equal(counted, rows)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks(HardwareConfig(ranks=None)) == 2
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        ranks(HardwareConfig(ranks=2, device="cpu"))
    with pytest.raises(UserError, match=r"hardware\.ranks=3.*\n.*at most 2"):
        ranks(HardwareConfig(ranks=3))


def test_a_state_that_cannot_be_shared_out_anew_is_said(tmp_path: Path) -> None:
    """Files of two processes, whose optimizer's state is of a kind that has no rows to cut."""

    class Packed(torch.Tensor):
        pass

    from hyperfitting.training import checkpoint

    part = torch.ones(2, 3)
    pieces = [(0, 2, 4, part.as_subclass(Packed)), (2, 2, 4, part.as_subclass(Packed))]
    with pytest.raises(UserError, match=r"Packed.*\n.*as many as before"):
        checkpoint._cut(pieces, 0, 4)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_checkpoint_of_any_number_of_processes_is_read_by_one(tmp_path: Path, n: int) -> None:
    """Rows are cut as FSDP cuts them, so that some processes may have none."""
    weight, moment = torch.randn(4, 3), torch.randn(4, 3)
    each = -(-4 // n)
    for rank in range(n):
        start = min(rank * each, 4)
        stop = min(start + each, 4)
        torch.save(
            {
                "progress": vars(Progress(3, [{"step": 1}], 0.5)),
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
    found = Checkpoint(tmp_path).load({"w": torch.zeros(4, 3)})
    assert found is not None
    assert found["progress"].epoch == 3
    torch.testing.assert_close(found["parameters"]["w"], weight)
    state = found["optimizer"]["state"][0]
    torch.testing.assert_close(state["exp_avg"], moment)
    assert state["step"] == 7
