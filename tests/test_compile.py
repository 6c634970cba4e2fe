"""torch.compile of the trained blocks: the same losses, and eager execution where it fails."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hyperfitting.models.base import BaseModel
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.trainable import select_trainable
from hyperfitting.runtime import linear_kernels
from hyperfitting.training.compile import should_compile
from hyperfitting.training.config import TrainingConfig
from tests.training import cfg, run_training, step_losses

__all__ = ["cfg"]


@pytest.mark.exhaustive
def test_compiled_blocks_have_the_same_losses_and_decoding_runs_eagerly(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # with the linear layers that are not torch's own, where there are such (on x86)
    library = "onednn" if torch.backends.mkl.is_available() else "mkl"
    monkeypatch.setattr(linear_kernels, "matmul_library", lambda: library)
    expected, _ = run_training(cfg, base, tmp_path / "a")
    cfg.hardware.compile = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rows, _ = run_training(cfg, base, tmp_path / "b")
    np.testing.assert_allclose(step_losses(rows), step_losses(expected), rtol=1e-4)
    # shapes of a whole and of a last batch, in three epochs with decoding between them
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_where_torch_cannot_compile_training_continues_eagerly(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = run_training(cfg, base, tmp_path / "a")
    torch._dynamo.reset()
    cfg.hardware.compile = True
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        rows, _ = run_training(cfg, base, tmp_path / "b")
    assert rows == expected
    assert "torch.compile failed" in caplog.text


def test_full_tuning_needs_no_list_of_blocks(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = run_training(cfg, base, tmp_path / "a")
    monkeypatch.setattr("hyperfitting.models.layers.find_blocks", lambda model: None)
    cfg.hardware.compile = True
    rows, _ = run_training(cfg, base, tmp_path / "b")
    assert rows == expected


def llama(tuning: TuningConfig, **shape: int) -> PreTrainedModel:
    """A Llama without values, with its trained parameters selected."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
        select_trainable(model, tuning)
    return model


SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
}  # fmt: skip
TINYLLAMA = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
}  # fmt: skip


def test_only_long_trainings_are_compiled_unless_configured(cfg: TrainingConfig) -> None:
    cpu, model = torch.device("cpu"), llama(TuningConfig("full"), **SMOLLM2)
    cfg.trainer.epochs = 7
    assert not should_compile(cfg, cpu, model, n_tokens=16 * 128)
    cfg.trainer.epochs = 20
    assert should_compile(cfg, cpu, model, n_tokens=2000 * 256)
    cfg.hardware.compile = False
    assert not should_compile(cfg, cpu, model, n_tokens=2000 * 256)


@pytest.mark.parametrize("method", ["full", "late_stage", "lora", "late_stage_lora"])
def test_on_a_gpu_a_paper_run_of_any_tuning_is_compiled(cfg: TrainingConfig, method: str) -> None:
    cuda, model = torch.device("cuda"), llama(TuningConfig(method, last_blocks=5), **TINYLLAMA)
    cfg.trainer.epochs = 20
    assert should_compile(cfg, cuda, model, n_tokens=2000 * 256)
    assert not should_compile(cfg, cuda, model, n_tokens=50 * 256)
    cfg.hardware.compile = False
    assert not should_compile(cfg, cuda, model, n_tokens=2000 * 256)
