"""Several processes that train one model: the numbers of one, whichever rank dies."""

import functools
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest
import torch
import transformers.distributed
from accelerate import dispatch_model
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import fsdp

from hyperfitting.config import RunConfig
from hyperfitting.data.sequences import sequences_step
from hyperfitting.data.sources import documents_step
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.errors import UserError
from hyperfitting.evaluation.forward import compute_token_stats
from hyperfitting.models import loading
from hyperfitting.models.base import BaseModel, base_model
from hyperfitting.models.loading import ModelState, load
from hyperfitting.progress import MetricsRow
from hyperfitting.runtime import preemption, processes
from hyperfitting.runtime.config import HardwareConfig
from hyperfitting.runtime.distributed import (
    SINGLE_PROCESS,
    DistContext,
    is_on_one_device,
    num_processes,
)
from hyperfitting.store.artifact import Store
from hyperfitting.training.activation_cache import CacheLocation
from hyperfitting.training.artifact import TrainingJob, training_job
from hyperfitting.training.history import read_rows
from hyperfitting.training.step import build_train_state
from tests.cli import below, environment, hyperfit, start_in_fork
from tests.conftest import Compose

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512}
TUNINGS = {
    "full": ["tuning=full"],
    "late_stage": ["tuning=late_stage", "tuning.last_blocks=2"],
    "lora": ["tuning=lora", "tuning.lora_rank=4"],
    "late_stage_lora": ["tuning=late_stage_lora", "tuning.last_blocks=2", "tuning.lora_rank=4"],
}
SHAPE = [
    "preset=debug", "dataset.n_train=7", "dataset.n_val=5", "trainer.epochs=2",
    "trainer.val_prompts=3", "hardware.device=cpu", "hardware.threads=1",
]  # fmt: skip
"""Batches of 4 and 3, validation on 5 texts and 3 prompts: no number of processes divides all."""
SGD = {"_target_": "torch.optim.SGD", "lr": 0.3, "momentum": 0.9}
"""Adam would turn rounding noise into full-size updates."""


def job_of(cfg: RunConfig, folder: Path) -> TrainingJob:
    """Return the training of a run, with its inputs built."""
    store = Store(folder)
    base = base_model(cfg.model, store)
    base.ensure()
    documents = documents_step(cfg.dataset, store).ensure()
    sequences = sequences_step(cfg.dataset, documents, base, store).ensure()
    return training_job(cfg.training, sequences, base, store)


def train(cfg: RunConfig, folder: Path) -> tuple[list[MetricsRow], dict[str, torch.Tensor]]:
    """Train a run; return its rows and the trained parameters."""
    job = job_of(cfg, folder)
    rows = list(job.run())
    assert rows == job.history()
    return rows, load_file(job.tuned.file("last.safetensors"))


def assert_same(actual: Any, expected: Any) -> None:
    (rows, weights), (expected_rows, expected_weights) = actual, expected
    assert [set(row) for row in rows] == [set(row) for row in expected_rows]
    for row, expected_row in zip(rows, expected_rows, strict=True):
        for name, value in expected_row.items():
            assert row[name] == pytest.approx(value, rel=1e-5), (name, row)
    assert set(weights) == set(expected_weights)
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)


class ForkedPopen:
    """`Popen` of `python -m MODULE JOB` for torch's launcher: a fork with all imports.

    Of the fork server of `tests.cli`, which has one thread. A fork of this process would inherit
    the locks that its other threads hold at that moment, such as one of libc, and wait for them.
    """

    def __init__(self, args: list[str], env: dict[str, str], stdout: TextIO, **_: Any) -> None:
        self._process = start_in_fork(_run_module, args[1:], env, stdout.name)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit status; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process.

        Raises:
            TimeoutExpired: it took longer.
        """
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
        return status


def _run_module(arguments: list[str], env: dict[str, str], stdout: str) -> None:
    os.setsid()
    os.dup2(os.open(stdout, os.O_WRONLY | os.O_APPEND), 1)
    os.environ.clear()
    os.environ.update(env)
    for signum in (signal.SIGINT, *preemption.SIGNALS):
        signal.signal(signum, signal.SIG_DFL)
    # the parent is the server, which ends with the process of the tests
    end_with_server = functools.partial(processes.exit_with_parent, None)
    processes.exit_with_parent = lambda _: end_with_server()
    option, module, *sys.argv[1:] = arguments
    assert option == "-m"
    with torch.compiler.set_stance(
        "force_eager"
    ):  # compiling an optimizer takes longer than it all
        runpy.run_module(module, run_name="__main__", alter_sys=True)


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that start at once: importing torch and transformers takes longer than they train."""
    monkeypatch.setattr(subprocess_handler, "Popen", ForkedPopen)


def many(*cases: tuple[str, str, int]) -> Any:
    """Mark all cases: they take minutes together."""
    return [pytest.param(*case, marks=pytest.mark.distributed) for case in cases]


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(
    ("architecture", "tuning", "n"),
    many(
        ("llama", "late_stage", 2), ("llama", "full", 2), ("llama", "lora", 2),
        ("llama", "late_stage_lora", 2), ("gpt2", "full", 2), ("gpt2", "late_stage", 2),
        ("gpt2", "lora", 2), ("llama", "late_stage", 4), ("llama", "lora", 4), ("gpt2", "full", 4),
    ),
)  # fmt: skip
def test_several_processes_train_to_the_numbers_of_one(
    compose: Compose, tmp_path: Path, architecture: str, tuning: str, n: int
) -> None:
    cfg = compose(*SHAPE, *TUNINGS[tuning], "trainer.clip_norm=1.0")
    cfg.optimizer = SGD
    if architecture == "gpt2":
        cfg.model.architecture = GPT2
    expected = train(cfg, tmp_path / "one")
    assert len({row["train/loss"] for row in expected[0]}) == len(expected[0])  # it does train
    cfg.hardware.num_processes = n
    assert_same(train(cfg, tmp_path / "many"), expected)
    assert (tmp_path / "many" / "activation_cache").is_dir() == tuning.startswith("late")


@pytest.mark.distributed
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(
    "more",
    [
        ["hardware.activation_checkpointing=true"], ["trainer.precision=bfloat16"],
        ["hardware.activation_checkpointing=true", "trainer.precision=bfloat16"],
        ["tuning=lora", "model.dtype=bfloat16"],
    ],
)  # fmt: skip
def test_they_do_with_the_settings_of_large_models(
    compose: Compose, tmp_path: Path, more: list[str]
) -> None:
    expected, _ = train(compose(*SHAPE, *more), tmp_path / "one")
    rows, _ = train(compose(*SHAPE, *more, "hardware.num_processes=2"), tmp_path / "many")
    for row, expected_row in zip(rows, expected, strict=True):
        for name in {"train/loss", "val/loss"} & set(row):
            assert row[name] == pytest.approx(expected_row[name], rel=1e-2)


@pytest.mark.parametrize(
    ("precision", "dtype", "policy"),
    [
        ("bfloat16", "float32", MixedPrecisionPolicy(torch.bfloat16, torch.float32)),
        ("float32", "float32", None),
        ("bfloat16", "bfloat16", None),
    ],
)
def test_weights_are_all_gathered_in_the_precision_of_training(
    compose: Compose, store: Store, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: str,
    policy: MixedPrecisionPolicy | None,
) -> None:  # fmt: skip
    """Without a process group: what transformers passes to `fully_shard`."""
    overrides = [f"trainer.precision={precision}", f"model.dtype={dtype}"]
    cfg = compose(*SHAPE, *overrides, "trainer.allow_lost_updates=true")
    job = job_of(cfg, store.folder)
    configs: list[Any] = []

    def from_pretrained(*_: Any, distributed_config: Any, **__: Any) -> None:
        configs.append(distributed_config)
        raise ValueError("loads nothing")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    tokens, location = np.zeros((2, 4), np.int32), CacheLocation(store, {})
    with pytest.raises(UserError, match="loads nothing"):
        build_train_state(job.cfg, job.base, tokens, location, DistContext(0, 2))
    kwargs = fsdp._get_fsdp_policy_kwargs(configs[0])
    assert kwargs.get("mp_policy") == policy
    assert configs[0].fsdp_plan == {"model.layers.*": "free_full_weight"}


def test_transformers_without_a_plan_in_its_arguments_gets_it_from_the_config(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As version 5.17."""

    @dataclass
    class OldConfig:
        fsdp_size: int
        fsdp_mixed_precision: bool

    monkeypatch.setattr(transformers.distributed, "DistributedConfig", OldConfig)
    config = AutoConfig.from_pretrained(base.folder())
    placement = loading._fsdp_placement(config, DistContext(0, 2), True)
    assert placement == {"distributed_config": OldConfig(2, True), "config": config}
    assert config.base_model_fsdp_plan == {"layers.*": "free_full_weight"}


@pytest.mark.distributed
@pytest.mark.usefixtures("forked_ranks")
def test_an_error_of_every_rank_is_one_message(compose: Compose, tmp_path: Path) -> None:
    cfg = compose(*SHAPE, "optimizer.lr=1e30", "hardware.num_processes=2")
    with pytest.raises(UserError, match=r"^training diverged in epoch 1, step") as error:
        train(cfg, tmp_path)
    assert str(error.value).count("try:") == 1


@pytest.mark.distributed
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("optimizer", ["adam_bf16", "adam_8bit"])
@torch.compiler.set_stance("force_eager")
def test_bfloat16_models_learn_as_in_one_process(
    compose: Compose, tmp_path: Path, optimizer: str
) -> None:
    """Up to the noise of stochastic rounding: about 0.001 between seeds."""
    low = ["model.dtype=bfloat16", f"optimizer={optimizer}", "optimizer.lr=3e-3"]
    overrides = [*SHAPE, *low, "model.architecture.hidden_size=128", "trainer.epochs=4"]
    expected, _ = train(compose(*overrides), tmp_path / "one")
    rows, _ = train(compose(*overrides, "hardware.num_processes=2"), tmp_path / "many")
    assert expected[-1]["train/loss"] < expected[0]["train/loss"] - 1
    for row, expected_row in zip(rows, expected, strict=True):
        assert row["train/loss"] == pytest.approx(expected_row["train/loss"], abs=0.01)


@pytest.mark.distributed
def test_torchrun_starts_the_same_training(tmp_path: Path) -> None:
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
        read_rows(below(tmp_path / store, "history.jsonl")[0])[-1]["train/loss"]
        for store in ("one-store", "two-store")
    )
    assert two_loss == pytest.approx(one_loss, rel=1e-3)


@pytest.mark.distributed
def test_an_error_under_torchrun_is_reported_once(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*torchrun, "-m", "hyperfitting.run", *SHAPE, "optimizer.lr=1e30"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode != 0
    assert ended.stderr.count("error: training diverged") == 1


def test_torchrun_is_for_one_run(tmp_path: Path) -> None:
    ended = hyperfit(tmp_path, "-m", "preset=debug", "seed=0,1", WORLD_SIZE="2", RANK="0")
    assert ended.returncode == 1
    assert "torchrun starts the processes of one run" in ended.stderr


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_model_loaded_with_a_device_map_is_the_same(
    compose: Compose, store: Store, tuning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate places it, here on the only device, and it is not moved to another."""
    job = job_of(compose(*SHAPE, *TUNINGS[tuning]), store.folder)
    list(job.run())
    state = ModelState(job.base, job.cfg.tuning, job.tuned, "last.safetensors")
    tokens = torch.arange(20).view(2, 10)
    from_pretrained, device_maps = AutoModelForCausalLM.from_pretrained, []

    def recorded(*arguments: Any, **options: Any) -> PreTrainedModel:
        device_maps.append(options.get("device_map"))
        return from_pretrained(*arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", recorded)
    mapped = state.load(torch.device("meta"), device_map="auto")
    with torch.inference_mode():
        expected = state.load(torch.device("cpu"))(input_ids=tokens).logits
        assert device_maps == ["auto", None]
        assert torch.equal(mapped(input_ids=tokens).logits, expected)


def test_evaluation_and_decoding_work_with_blocks_on_different_devices(
    base: BaseModel, tmp_path: Path
) -> None:
    """The other device is the disk, from which accelerate loads a block's weights."""
    texts = np.random.default_rng(0).integers(0, 256, (5, 12), dtype=np.int32)
    greedy = DecodeConfig(name="greedy", seed=0)

    def outputs(model: PreTrainedModel) -> tuple[Any, Any]:
        return compute_token_stats(model, texts, 2), continue_texts(model, texts, 30, greedy).tokens

    expected, expected_tokens = outputs(load(base).eval())
    model = load(base).eval()
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    devices = dict.fromkeys([*names, "model.layers.0", "model.layers.2"], "cpu")
    devices["model.layers.1"] = "disk"
    mapped = dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path)
    assert not is_on_one_device(mapped)
    stats, tokens = outputs(mapped)
    assert tokens == expected_tokens
    for name, values in expected.items():
        np.testing.assert_allclose(stats[name], values, rtol=1e-5)


def test_shards_hold_all_rows_and_have_one_length() -> None:
    rows = np.arange(7 * 2).reshape(7, 2)
    assert SINGLE_PROCESS.shard(rows)[1] == 7
    for world_size in range(1, 9):
        shards = [DistContext(rank, world_size).shard(rows) for rank in range(world_size)]
        assert len({shard.shape for shard, _ in shards}) == 1
        valid = np.concatenate([shard[:n] for shard, n in shards])
        np.testing.assert_array_equal(valid, rows)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert num_processes(HardwareConfig(num_processes=None)) == 2
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        num_processes(HardwareConfig(num_processes=2, device="cpu"))
    with pytest.raises(UserError, match=r"hardware\.num_processes=3.*\n.*at most 2"):
        num_processes(HardwareConfig(num_processes=3))
