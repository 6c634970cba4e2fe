"""What makes training fast, against what is slow and plain: the same numbers."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hyperfitting import models, parameters
from hyperfitting.config import RunConfig
from hyperfitting.errors import UserError
from hyperfitting.models import BaseModel, ModelState
from hyperfitting.progress import Row, silent
from hyperfitting.store import Store
from hyperfitting.training import compiled, loop, loss, trunk
from hyperfitting.training.learner import Learner, Rows
from hyperfitting.training.loss import NextTokenLoss, summed_loss
from hyperfitting.training.trunk import KeptIn
from tests.conftest import ARCHITECTURES, tiny_model
from tests.test_training import DATA, cfg, train

__all__ = ["cfg"]


def losses(rows: list[Row]) -> list[float]:
    return [row["train/loss"] for row in rows if "epoch" not in row]


def late(cfg: RunConfig, **fields: Any) -> RunConfig:
    cfg.tuning = replace(cfg.tuning, method="late_stage", last_blocks=1)
    cfg.trainer = replace(cfg.trainer, **fields)
    return cfg


@given(st.integers(0, 10_000), st.integers(1, 40), st.booleans(), st.integers(1, 7))
def test_the_loss_in_chunks_is_cross_entropy_with_its_gradients(
    seed: int, rows: int, with_bias: bool, chunk: int
) -> None:
    torch.manual_seed(seed)
    states, weight, bias = (
        torch.randn(*shape, requires_grad=True) for shape in ((rows, 6), (11, 6), (11,))
    )
    targets = torch.randint(0, 11, (rows,))
    given_bias = bias if with_bias else None
    parts = [states, weight, bias] if with_bias else [states, weight]
    expected = nn.functional.cross_entropy(
        nn.functional.linear(states, weight, given_bias), targets, reduction="sum"
    )
    wanted = torch.autograd.grad(3 * expected, parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_BYTES", {"cpu": chunk * 16 * 4 * 11})
        found = summed_loss(states, weight, given_bias, targets)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(torch.autograd.grad(3 * found, parts), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_every_architecture_here_has_its_loss_in_chunks(any_base: BaseModel) -> None:
    model = models.load(any_base).eval()
    ids = torch.as_tensor(DATA.train[:3]).long()
    mean = NextTokenLoss(model)
    assert mean._layer is model.get_output_embeddings()
    assert (mean(ids) / ids[:, 1:].numel()).item() == pytest.approx(
        model(input_ids=ids, labels=ids).loss.item(), rel=1e-5
    )


def test_an_architecture_that_caps_its_logits_keeps_them_whole(tmp_path: Path) -> None:
    ARCHITECTURES["gemma2"] = ARCHITECTURES["llama"] | {"head_dim": 8}
    model = models.load(tiny_model(tmp_path, "gemma2", final_logit_softcapping=2.0)).eval()
    ids = torch.as_tensor(DATA.train[:3]).long()
    mean = NextTokenLoss(model)
    assert mean._layer is None
    assert (mean(ids) / ids[:, 1:].numel()).item() == pytest.approx(
        model(input_ids=ids, labels=ids).loss.item(), rel=1e-5
    )


@pytest.mark.parametrize("last_blocks", [1, 2])
def test_from_the_trunk_cache_every_loss_is_the_same(
    cfg: RunConfig, any_base: BaseModel, tmp_path: Path, last_blocks: int
) -> None:
    late(cfg, trunk_cache="off").tuning.last_blocks = last_blocks
    expected, weights = train(cfg, any_base, tmp_path / "a" / "w")
    assert not (tmp_path / "a" / "store").exists()
    cfg.trainer.trunk_cache = "float32"
    rows, found = train(cfg, any_base, tmp_path / "b" / "w")
    assert (tmp_path / "b" / "store" / "trunk").is_dir()
    np.testing.assert_allclose(losses(rows), losses(expected), rtol=0, atol=1e-5)
    assert [set(row) for row in rows] == [set(row) for row in expected]
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)


def test_with_the_trunk_cache_the_frozen_blocks_run_once(
    cfg: RunConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    real = trunk._activations

    def counted(model: Any, depth: int, tokens: torch.Tensor) -> torch.Tensor:
        ran.append(len(tokens))
        return real(model, depth, tokens)

    monkeypatch.setattr(trunk, "_activations", counted)
    train(late(cfg), base, tmp_path / "w")
    assert ran == [1, 7]  # a first sequence to see whether it can be; then each of the seven
    cfg.optimizer["lr"], cfg.trainer.seed, cfg.decode.seed = 1e-4, 5, 3
    train(cfg, base, tmp_path / "v")
    assert ran == [1, 7, 1]  # another learning rate, order and decoding: nothing is made again


def test_a_cache_in_half_the_bytes_is_near(cfg: RunConfig, base: BaseModel, tmp_path: Path) -> None:
    expected, _ = train(late(cfg, trunk_cache="off"), base, tmp_path / "a" / "w")
    cfg.trainer.trunk_cache = "bfloat16"
    rows, _ = train(cfg, base, tmp_path / "b" / "w")
    np.testing.assert_allclose(losses(rows), losses(expected), rtol=2e-2)
    assert losses(rows) != losses(expected)
    (file,) = (tmp_path / "b" / "store" / "trunk").rglob("train.npy")
    assert np.load(file).nbytes == 7 * 16 * 32 * 2


def test_full_tuning_and_dropout_have_no_trunk(
    cfg: RunConfig, base: BaseModel, tmp_path: Path
) -> None:
    train(cfg, base, tmp_path / "w")
    train(late(cfg, dropout=True), base, tmp_path / "v")
    assert not (tmp_path / "store").exists()


def test_a_model_that_cannot_start_in_the_middle_runs_whole(
    cfg: RunConfig, base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected, _ = train(late(cfg, trunk_cache="off"), base, tmp_path / "a" / "w")
    monkeypatch.setattr(trunk, "_activations", lambda model, depth, tokens: torch.zeros(1, 8, 32))
    cfg.trainer.trunk_cache = "float32"
    rows, _ = train(cfg, base, tmp_path / "b" / "w")
    assert rows == expected
    assert "all blocks are run in every epoch" in caplog.text


def test_a_cache_too_large_for_the_disk_is_refused_before_any_work(
    cfg: RunConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(late(cfg), base, tmp_path / "w")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    train(cfg, base, tmp_path / "again")  # what is there needs no room
    monkeypatch.setattr(loop, "Learner", None)  # nothing is loaded
    with pytest.raises(
        UserError, match=r"(?s)trainer\.trunk_cache=float32: .*14\.3 kB.* 1\.0 kB.*store=DIR"
    ):
        train(cfg, base, tmp_path / "elsewhere" / "w")


@pytest.mark.parametrize("method", ["lora", "late_stage_lora"])
def test_lora_trains_adapters_that_merge_into_the_same_model(
    cfg: RunConfig, any_base: BaseModel, tmp_path: Path, method: str
) -> None:
    cfg.tuning = replace(cfg.tuning, method=method, lora_rank=4)
    if method == "late_stage_lora":
        cfg.tuning.last_blocks = 1
    cfg.optimizer["lr"] = 1e-2
    rows, adapters = train(cfg, any_base, tmp_path / "w")
    assert all("lora_" in name for name in adapters)
    places = {name.split(".lora_")[0] for name in adapters}
    assert len(places) % (1 if method == "late_stage_lora" else 3) == 0
    assert losses(rows)[-1] < losses(rows)[0]
    ids = torch.as_tensor(DATA.val).long()
    apart = models.load(any_base)
    parameters.select_trainable(apart, cfg.tuning)
    parameters.overlay(apart, adapters)
    expected = apart.eval()(input_ids=ids).logits

    made = Store(tmp_path / "s").artefact(
        "tuned", version=0, config={"tuning": cfg.tuning.determining()}, inputs={},
        make=lambda work: (work / "last.safetensors").write_bytes(
            (tmp_path / "w" / "last.safetensors").read_bytes()
        ) and None,
    )  # fmt: skip
    merged = ModelState(any_base, made).load(torch.device("cpu"))
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    plain = models.load(any_base)
    assert [name for name, _ in merged.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    assert not torch.allclose(plain.eval()(input_ids=ids).logits, expected, atol=1e-3)


def test_late_stage_lora_with_the_trunk_cache_is_the_same(
    cfg: RunConfig, base: BaseModel, tmp_path: Path
) -> None:
    late(cfg, trunk_cache="off").tuning = replace(
        cfg.tuning, method="late_stage_lora", last_blocks=2, lora_rank=4
    )
    expected, _ = train(cfg, base, tmp_path / "a" / "w")
    cfg.trainer.trunk_cache = "float32"
    rows, _ = train(cfg, base, tmp_path / "b" / "w")
    assert (tmp_path / "b" / "store" / "trunk").is_dir()
    np.testing.assert_allclose(losses(rows), losses(expected), rtol=0, atol=1e-5)


def test_compiled_blocks_have_the_same_losses_and_decoding_runs_as_it_is(
    cfg: RunConfig, base: BaseModel, tmp_path: Path
) -> None:
    expected, _ = train(cfg, base, tmp_path / "a")
    cfg.hardware.compile = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rows, _ = train(cfg, base, tmp_path / "b")
    np.testing.assert_allclose(losses(rows), losses(expected), rtol=1e-4)
    # shapes of a whole and of a last batch, in three epochs with decoding between them
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_where_torch_cannot_compile_training_goes_on(
    cfg: RunConfig, base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = train(cfg, base, tmp_path / "a")
    torch._dynamo.reset()
    cfg.hardware.compile = True
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        rows, _ = train(cfg, base, tmp_path / "b")
    assert rows == expected
    assert "cannot compile" in caplog.text


def test_full_tuning_needs_no_list_of_blocks(
    cfg: RunConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = train(cfg, base, tmp_path / "a")
    monkeypatch.setattr(parameters, "find_blocks", lambda model: None)
    cfg.hardware.compile = True
    rows, _ = train(cfg, base, tmp_path / "b")
    assert rows == expected


def test_compiling_is_for_long_trainings(cfg: RunConfig, base: BaseModel) -> None:
    cpu, trained = torch.device("cpu"), [nn.Parameter(torch.empty(134_500_000, device="meta"))]
    cfg.dataset.n_train, cfg.dataset.seq_len, cfg.trainer.epochs = 16, 128, 7
    assert not compiled.pays(cfg, cpu, trained)
    cfg.dataset.n_train, cfg.dataset.seq_len, cfg.trainer.epochs = 2000, 256, 20
    assert compiled.pays(cfg, cpu, trained)
    cfg.hardware.compile = False
    assert not compiled.pays(cfg, cpu, trained)


def test_out_of_memory_halves_the_micro_batch_and_the_update_is_taken_again(
    cfg: RunConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    expected, _ = train(cfg, base, tmp_path / "a")
    real = Learner._update

    def small(self: Learner, tokens: torch.Tensor, rows: Rows) -> float:
        if self.micro_batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, tokens, rows)

    monkeypatch.setattr(Learner, "_update", small)
    rows, _ = train(cfg, base, tmp_path / "b")
    np.testing.assert_allclose(losses(rows), losses(expected), rtol=1e-4)
    assert "micro_batch_size=1" in caplog.text


@pytest.fixture
def kept_in(tmp_path: Path) -> KeptIn:
    return KeptIn(Store(tmp_path / "store"), {"model": "m"})


def test_a_killed_cache_is_made_again_whole(
    cfg: RunConfig, base: BaseModel, kept_in: KeptIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    late(cfg).hardware.evaluation_batch_size = 2
    learner = Learner.new(cfg, base)
    real, taken = trunk._activations, 0

    def dies(model: Any, depth: int, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == 3:
            raise KeyboardInterrupt
        return real(model, depth, tokens)

    monkeypatch.setattr(trunk, "_activations", dies)
    with pytest.raises(KeyboardInterrupt):
        trunk.trunk_of(cfg, learner.model, DATA.train, kept_in, silent)
    found = trunk.trunk_of(cfg, learner.model, DATA.train, kept_in, silent)
    assert found is not None
    ids = torch.as_tensor(DATA.train).long()
    inside = learner.model(input_ids=ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(
        found.of(np.arange(7), inside), inside.detach(), rtol=1e-5, atol=1e-5
    )
