"""Decoding backends, caches and batches: the same tokens and logits as the plain model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.fsdp import fully_shard

from hyperfitting.decoding import generate
from hyperfitting.decoding.backends import packed_cpu, select_backend
from hyperfitting.decoding.backends.base import Backend
from hyperfitting.decoding.backends.cuda_graph import CudaGraphBackend, CudaGraphStep
from hyperfitting.decoding.backends.packed_cpu import PackedCpuBackend
from hyperfitting.decoding.backends.plain import PlainBackend
from hyperfitting.decoding.cache import cache_bytes, preallocated_cache
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.generate import continue_texts, even_batch_size, fitting_batch_size
from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel
from hyperfitting.models.layers import blocks
from hyperfitting.models.loading import load
from hyperfitting.runtime import memory
from hyperfitting.runtime.distributed import is_on_one_device, is_sharded
from tests.conftest import ARCHITECTURES, tiny_model
from tests.test_decoding import GREEDY, by_generate, contexts

mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL")


def use_backend(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "select_backend", lambda *_: backend)


def modules_with_overridden_forward(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


@mkl
@pytest.mark.parametrize("library", ["mkl", "onednn"])
@pytest.mark.parametrize("n_rows", [4, 7, 32])
def test_a_packed_step_has_the_logits_of_a_plain_one(
    any_base: BaseModel, n_rows: int, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With either library, whichever suits this processor."""
    monkeypatch.setattr(packed_cpu, "matmul_library", lambda: library)
    model = load(any_base).eval()
    backend = select_backend(model, GREEDY, n_rows, n_steps=1000)
    assert isinstance(backend, PackedCpuBackend)
    text = torch.as_tensor(contexts(n_rows, 9), dtype=torch.long)
    with torch.inference_mode(), backend.prepare(model, n_rows):
        assert modules_with_overridden_forward(model)
        cached_model = backend.start(model, 9)
        cached_model(text[:, :7])
        for position in (7, 8):
            logits = cached_model(text[:, position : position + 1])
            expected = load(any_base).eval()(input_ids=text[:, : position + 1]).logits[:, -1]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not modules_with_overridden_forward(model)


@mkl
def test_llama_blocks_are_replaced_as_a_whole(tmp_path: Path) -> None:
    ARCHITECTURES["mistral"] = ARCHITECTURES["llama"] | {"sliding_window": None}
    is_llama = {"llama": True, "qwen2": True, "mistral": True, "gpt2": False}
    for name, is_replaced in is_llama.items():
        model = load(tiny_model(tmp_path / name, name)).eval()
        with PackedCpuBackend().prepare(model, 8):
            modules = modules_with_overridden_forward(model)
        blocks = [m for m in modules if isinstance(m, packed_cpu.LLAMA_BLOCKS)]
        assert (len(blocks) == 3) == is_replaced
        start = contexts(8, 7)
        expected = by_generate(model, start, 30)
        assert continue_texts(model, start, 30, GREEDY, 8).tokens == expected


def test_a_sliding_window_model_uses_its_own_cache(tmp_path: Path) -> None:
    ARCHITECTURES["mistral"] = ARCHITECTURES["llama"] | {"sliding_window": 4}
    model = load(tiny_model(tmp_path, "mistral")).eval()
    assert preallocated_cache(model, 30) is None
    start = contexts(8, 7)
    expected = by_generate(model, start, 30)
    assert continue_texts(model, start, 30, GREEDY, 8).tokens == expected


@mkl
@pytest.mark.parametrize(
    ("n_rows", "n_steps", "free"),
    [(2, 1000, 10**12), (200, 1000, 10**12), (8, 3, 10**12), (8, 99, 9)],
)
def test_weights_are_packed_only_where_it_is_faster_and_fits(
    base: BaseModel, n_rows: int, n_steps: int, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    model = load(base).eval()
    backend = select_backend(model, GREEDY, n_rows, n_steps)
    assert type(backend) is PlainBackend
    with backend.prepare(model, n_rows):
        assert not modules_with_overridden_forward(model)


@given(st.integers(0, 400), st.integers(1, 100))
@settings(max_examples=200)
def test_batches_are_as_few_and_as_even_as_possible(n: int, max_batch_size: int) -> None:
    size = even_batch_size(n, max_batch_size)
    sizes = [min(size, n - start) for start in range(0, n, size)]
    assert sum(sizes) == n
    assert len(sizes) == -(-n // max_batch_size)
    assert size <= max_batch_size
    assert not sizes or size - sizes[-1] < len(sizes) + size / 2


def test_a_batch_fits_into_half_of_the_free_memory(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(base).eval()
    row_bytes = cache_bytes(model, 100) + 32 * 256
    # keys and values, blocks, heads, head dimension, float32
    assert cache_bytes(model, 100) == 2 * 3 * 2 * 8 * 4 * 100
    for free, size in ((2 * 10 * row_bytes, 10), (10**12, 64), (1, 1)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert fitting_batch_size(model, 100, 1) == size
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * 10 * row_bytes)
    assert fitting_batch_size(model, 100, 4) == 2  # with four beams a text takes four rows


def test_out_of_memory_halves_the_batch_and_loses_no_text(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, start = load(base).eval(), contexts(11, 6)
    expected = continue_texts(model, start, 9, GREEDY, 11).tokens
    continue_batch, n_done = generate._continue_batch, 0

    def continue_small_batch(model: Any, backend: Any, contexts: Any, *arguments: Any) -> Any:
        nonlocal n_done
        if len(contexts) > 3 and n_done > 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        n_done += 1
        return continue_batch(model, backend, contexts, *arguments)

    monkeypatch.setattr(generate, "_continue_batch", continue_small_batch)
    monkeypatch.setattr(generate, "fitting_batch_size", lambda *_: 4)
    continuations = continue_texts(model, start, 9, GREEDY)
    assert continuations.tokens == expected
    assert "retrying with batches of 2 texts" in caplog.text
    assert continuations.batch_sizes == [4, 2, 2, 2, 1]  # for the record


def test_a_given_batch_size_is_never_changed(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the texts depend on it."""
    model, start = load(base).eval(), contexts(8, 6)
    assert continue_texts(model, start, 3, GREEDY, 4).batch_sizes == [4, 4]

    def continue_small_batch(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generate, "_continue_batch", continue_small_batch)
    with pytest.raises(UserError, match=r"^hardware\.generation_batch_size=4: out of memory"):
        continue_texts(model, start, 3, GREEDY, 4)


def test_the_default_batch_size_gives_the_same_texts(base: BaseModel) -> None:
    model, start = load(base).eval(), contexts(5, 6)
    decode = DecodeConfig("x", "sample", top_k=20, seed=0)
    assert (
        continue_texts(model, start, 9, decode).tokens
        == continue_texts(model, start, 9, decode, 2).tokens
    )
    assert continue_texts(model, start[:0], 9, decode).tokens == []


def test_a_static_cache_gives_the_same_tokens(
    any_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA graph backend without capturing, which requires CUDA."""
    model, start = load(any_base).eval(), contexts(5, 7)
    expected = by_generate(model, start, 24)
    sampling = DecodeConfig("x", "sample", top_k=20, seed=0)
    use_backend(CudaGraphBackend(), monkeypatch)
    assert continue_texts(model, start, 24, GREEDY, 3).tokens == expected
    static = continue_texts(model, start, 12, sampling).tokens
    use_backend(PlainBackend(), monkeypatch)
    assert continue_texts(model, start, 12, sampling).tokens == static


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_graph_replays_give_the_tokens_of_the_plain_model(
    any_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, start = load(any_base).eval(), contexts(5, 7)
    expected = continue_texts(model, start, 24, GREEDY, 3).tokens
    model = model.to("cuda")
    backend = select_backend(model, GREEDY, 5, 24)
    assert isinstance(backend, CudaGraphBackend)
    steps: list[Any] = []
    start_batch = backend.start
    monkeypatch.setattr(
        backend, "start", lambda *arguments: steps.append(start_batch(*arguments)) or steps[-1]
    )
    use_backend(backend, monkeypatch)
    assert continue_texts(model, start, 24, GREEDY).tokens == expected
    assert all(isinstance(step, CudaGraphStep) and step.graph is not None for step in steps)
    assert steps


def test_a_model_sharded_by_fsdp_is_decoded_plainly_also_after_a_forward_pass(
    base: BaseModel, tmp_path: Path
) -> None:
    """FSDP leaves parameters all-gathered after a forward pass, as plain tensors."""
    init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = load(base).eval()
        for block in blocks(model):
            fully_shard(block)
        fully_shard(model)
        for _ in range(2):
            assert is_sharded(model)
            assert not is_on_one_device(model)
            assert isinstance(select_backend(model, GREEDY, 8, 1000), PlainBackend)
            with torch.no_grad():
                model(input_ids=torch.arange(6).view(1, 6))
    finally:
        destroy_process_group()
    assert not is_sharded(load(base))
