"""Deterministic kernels and TF32: set for a train step on a GPU, and for nothing else."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.loading import load
from hyperfitting.pipeline.build import build_pipeline
from hyperfitting.runtime import device, memory, numerics
from hyperfitting.runtime.config import HardwareConfig
from hyperfitting.runtime.numerics import check_precision, matmul_precision, training_numerics
from hyperfitting.training import activation_cache, step
from hyperfitting.training import train as train_module
from hyperfitting.training.config import TrainingConfig
from tests.conftest import Compose
from tests.training import cfg, run_training

__all__ = ["cfg"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # the switches exist without a GPU too
DEFAULTS = (False, False, True, "highest", False)


def switches() -> tuple[bool, bool, bool, str, bool]:
    """Return torch's switches: deterministic, only warned, filling, precision of products."""
    options: Any = torch.utils.deterministic
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        options.fill_uninitialized_memory,
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.fp32_precision == "tf32",
    )


@pytest.mark.parametrize(
    ("where", "deterministic", "precision", "expected"),
    [
        (CUDA, True, "float32", (True, False, False, "highest", False)),
        (CUDA, True, "tf32", (True, False, False, "high", True)),
        (CUDA, False, "tf32", (False, False, True, "high", True)),
        (CUDA, False, "bfloat16", DEFAULTS),
        (CPU, True, "float32", DEFAULTS),
    ],
)
def test_the_switches_are_set_inside_the_context_only(
    where: torch.device, deterministic: bool, precision: str, expected: tuple[Any, ...]
) -> None:
    with training_numerics(where, deterministic, precision):
        assert switches() == expected
    assert switches() == DEFAULTS
    with pytest.raises(ZeroDivisionError), training_numerics(where, deterministic, precision):
        raise ZeroDivisionError
    assert switches() == DEFAULTS


def test_torchs_older_and_newer_settings_agree_with_tf32() -> None:
    """torch.compile reads the older ones, which raise if only the newer one is set."""
    with matmul_precision(CUDA, "tf32"):
        assert torch.backends.cuda.matmul.allow_tf32
        compiled = torch.compile(lambda x: x @ x, backend="eager")
        assert torch.equal(compiled(torch.ones(2, 2)), torch.full((2, 2), 2.0))
    assert not torch.backends.cuda.matmul.allow_tf32


def test_only_the_train_step_is_deterministic(
    cfg: TrainingConfig,
    base: BaseModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = run_training(cfg, base, tmp_path / "expected")
    seen: dict[str, set[bool]] = {}

    def recorded(module: Any, name: str) -> None:
        function = getattr(module, name)

        def record(*args: Any) -> Any:
            seen.setdefault(name, set()).add(torch.are_deterministic_algorithms_enabled())
            return function(*args)

        monkeypatch.setattr(module, name, record)

    recorded(step, "_accumulate_gradients")
    recorded(step, "_step_optimizer")
    recorded(train_module, "validate")
    monkeypatch.setattr(
        step, "training_numerics", lambda _, *settings: training_numerics(CUDA, *settings)
    )
    rows, weights = run_training(cfg, base, tmp_path / "w")
    assert seen == {"_accumulate_gradients": {True}, "_step_optimizer": {True}, "validate": {False}}
    assert rows == expected[0]  # on a CPU it is the same
    assert all(torch.equal(weights[name], expected[1][name]) for name in weights)
    cfg.hardware.deterministic = False
    seen.clear()
    run_training(cfg, base, tmp_path / "off")
    assert set.union(*seen.values()) == {False}


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    message = (
        "_histc_cuda does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'."
    )
    with (
        pytest.raises(UserError, match=r"hardware\.deterministic=True.*needs _histc_cuda"),
        training_numerics(CUDA, True, "float32"),
    ):
        raise RuntimeError(message)
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        training_numerics(CUDA, True, "float32"),
    ):
        raise RuntimeError("CUDA out of memory")


def test_tf32_is_refused_where_there_is_none(
    cfg: TrainingConfig,
    base: BaseModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg.trainer.precision = "tf32"
    with pytest.raises(UserError, match=r"trainer\.precision=tf32: the device \(cpu\) has no TF32"):
        run_training(cfg, base, tmp_path / "w")
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda supported=supported: supported)
        if supported:
            check_precision(CUDA, "tf32")
        else:
            with pytest.raises(UserError, match="has no TF32"):
                check_precision(CUDA, "tf32")
    check_precision(CPU, "float32")


def test_tf32_is_refused_before_anything_is_prepared(compose: Compose, tmp_path: Path) -> None:
    overrides = ["preset=debug", f"store={tmp_path / 'store'}", "trainer.precision=tf32"]
    pipeline = build_pipeline(compose(*overrides, "hardware.device=cpu"), CPU)
    with pytest.raises(UserError, match="has no TF32"):
        pipeline.prepare()
    assert not list(tmp_path.rglob("manifest.json"))


def test_frozen_layers_are_computed_in_tf32_too(
    cfg: TrainingConfig,
    base: BaseModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg.tuning = TuningConfig("late_stage", last_blocks=1)
    cfg.trainer.precision = "tf32"
    activations = activation_cache._activations
    seen: list[str] = []

    def record(*args: Any) -> torch.Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return activations(*args)

    monkeypatch.setattr(step, "check_precision", lambda *_: None)
    monkeypatch.setattr(activation_cache, "_can_replay", lambda *_: True)
    monkeypatch.setattr(activation_cache, "_activations", record)
    monkeypatch.setattr(
        activation_cache, "matmul_precision", lambda _, precision: matmul_precision(CUDA, precision)
    )
    run_training(cfg, base, tmp_path / "w")
    assert set(seen) == {"high"}
    assert switches() == DEFAULTS


@pytest.mark.parametrize(("name", "kept"), [("cpu", True), ("cuda", False)])
def test_freed_host_memory_is_kept_for_computing_on_the_cpu_only(
    monkeypatch: pytest.MonkeyPatch, name: str, kept: bool
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(device, "resolve_device", lambda _: torch.device(name))
    monkeypatch.setattr(memory, "retain_freed", lambda: calls.append("retain"))
    device.setup_torch(HardwareConfig(device=name))
    assert calls == ["retain"] * kept
    assert switches() == DEFAULTS


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_libraries_are_made_deterministic_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    variables = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")
    for name in variables:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(device, "resolve_device", lambda _: CUDA)
    device.setup_torch(HardwareConfig(device="cuda", deterministic=deterministic))
    assert all((name in os.environ) == deterministic for name in variables)
    with training_numerics(CUDA, True, "float32"):  # also of a training without `setup_torch`
        assert all(name in os.environ for name in variables)


class Dtypes(TorchDispatchMode):
    """Records the dtypes in which a cumulative distribution is computed and searched."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] in ("cumsum", "nextafter", "minimum", "searchsorted"):
            self.dtypes.update(arg.dtype for arg in args if isinstance(arg, torch.Tensor))
        return output


@pytest.mark.parametrize("has_float64", [True, False])
def test_sampling_uses_float64_only_where_the_device_has_it(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, has_float64: bool
) -> None:
    assert numerics.accumulation_dtype(torch.device("mps")) == torch.float32
    assert numerics.accumulation_dtype(CUDA) == torch.float64
    assert [numerics.float64_device(torch.device(name)).type for name in ("mps", "cuda")] == [
        "cpu", "cuda",
    ]  # fmt: skip
    if not has_float64:
        monkeypatch.setattr(numerics, "_WITHOUT_FLOAT64", ("cpu",))
    decode = DecodeConfig(name="sample", strategy="sample", seed=0)
    model = load(base).eval()
    with Dtypes() as recorded:
        texts = continue_texts(model, np.arange(8, dtype=np.int32)[None], 6, decode)
    assert len(texts.tokens[0]) == 6
    assert recorded.dtypes == {torch.float64 if has_float64 else torch.float32}
