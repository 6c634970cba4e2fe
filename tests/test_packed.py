"""Decoding with packed weights and a cache laid out at once: what the plain model says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperfitting import memory, models
from hyperfitting.config import DecodeConfig
from hyperfitting.decoding import generate, packed
from hyperfitting.decoding.cache import bytes_per_token, cache_for
from hyperfitting.decoding.generate import continue_texts, evenly, fitting
from hyperfitting.models import BaseModel
from tests.conftest import ARCHITECTURES, tiny_model
from tests.test_decoding import GREEDY, by_generate, contexts

mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL")


@mkl
@pytest.mark.parametrize("library", ["mkl", "onednn"])
@pytest.mark.parametrize("rows", [4, 7, 32])
def test_a_packed_step_has_the_logits_of_a_plain_one(
    any_base: BaseModel, rows: int, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever library this processor would have."""
    monkeypatch.setattr(packed, "library", lambda: library)
    model = models.load(any_base).eval()
    text = torch.as_tensor(contexts(rows, 9), dtype=torch.long)
    with torch.inference_mode(), packed.packed(model, rows, steps=1000):
        changed = [m for m in model.modules() if "forward" in vars(m)]
        assert changed
        cache = cache_for(model, 9)
        model(input_ids=text[:, :7], past_key_values=cache, use_cache=True)
        for at in (7, 8):
            found = model(
                input_ids=text[:, at : at + 1], past_key_values=cache, use_cache=True
            ).logits[:, -1]
            whole = models.load(any_base).eval()(input_ids=text[:, : at + 1]).logits[:, -1]
            torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    assert not [m for m in model.modules() if "forward" in vars(m)]


@mkl
def test_blocks_of_llamas_kind_are_taken_whole(tmp_path: Path) -> None:
    ARCHITECTURES["mistral"] = ARCHITECTURES["llama"] | {"sliding_window": None}
    for name, whole in {"llama": True, "qwen2": True, "mistral": True, "gpt2": False}.items():
        model = models.load(tiny_model(tmp_path / name, name)).eval()
        with packed.packed(model, 8, steps=1000):
            changed = [m for m in model.modules() if "forward" in vars(m)]
        blocks = [m for m in changed if isinstance(m, packed._LIKE_LLAMA)]
        assert (len(blocks) == 3) == whole
        start = contexts(8, 7)
        expected = by_generate(model, start, 30)
        assert continue_texts(model, start, 30, GREEDY, 8).tokens == expected


def test_a_window_over_the_past_keeps_its_own_cache(tmp_path: Path) -> None:
    ARCHITECTURES["mistral"] = ARCHITECTURES["llama"] | {"sliding_window": 4}
    model = models.load(tiny_model(tmp_path, "mistral")).eval()
    assert cache_for(model, 30) is None
    start = contexts(8, 7)
    expected = by_generate(model, start, 30)
    assert continue_texts(model, start, 30, GREEDY, 8).tokens == expected


@mkl
@pytest.mark.parametrize(
    ("rows", "steps", "free"), [(2, 1000, 10**12), (200, 1000, 10**12), (8, 3, 10**12), (8, 99, 9)]
)
def test_packing_is_only_for_where_it_pays_and_fits(
    base: BaseModel, rows: int, steps: int, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free", lambda device: free)
    model = models.load(base).eval()
    with packed.packed(model, rows, steps):
        assert not [m for m in model.modules() if "forward" in vars(m)]


@given(st.integers(0, 400), st.integers(1, 100))
@settings(max_examples=200)
def test_batches_are_as_few_and_as_even_as_can_be(n: int, most: int) -> None:
    size = evenly(n, most)
    sizes = [min(size, n - start) for start in range(0, n, size)]
    assert sum(sizes) == n
    assert len(sizes) == -(-n // most)
    assert size <= most
    assert not sizes or size - sizes[-1] < len(sizes) + size / 2


def test_a_batch_fits_into_half_of_the_free_memory(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.load(base).eval()
    row = bytes_per_token(model) * 100 + 32 * 256
    assert bytes_per_token(model) == 2 * 3 * 2 * 8 * 4  # keys and values, blocks, heads, size
    for free, size in ((2 * 10 * row, 10), (10**12, 64), (1, 1)):
        monkeypatch.setattr(memory, "free", lambda device, free=free: free)
        assert fitting(model, 100, 1) == size
    monkeypatch.setattr(memory, "free", lambda device: 2 * 10 * row)
    assert fitting(model, 100, 4) == 2  # a beam of four takes four rows


def test_out_of_memory_halves_the_batch_and_loses_no_text(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, start = models.load(base).eval(), contexts(11, 6)
    expected = continue_texts(model, start, 9, GREEDY, 11).tokens
    real, done = generate._Decoder.run, 0

    def small(self: Any, batch: "np.ndarray[Any, Any]", new_tokens: int) -> Any:
        nonlocal done
        if len(batch) > 3 and done > 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done += 1
        return real(self, batch, new_tokens)

    monkeypatch.setattr(generate._Decoder, "run", small)
    assert continue_texts(model, start, 9, GREEDY, 4).tokens == expected
    assert "continuing 2 texts at once" in caplog.text


def test_without_a_size_texts_are_continued_all_the_same(base: BaseModel) -> None:
    model, start = models.load(base).eval(), contexts(5, 6)
    decode = DecodeConfig("x", "sample", top_k=20, seed=0)
    assert (
        continue_texts(model, start, 9, decode).tokens
        == continue_texts(model, start, 9, decode, 2).tokens
    )
    assert continue_texts(model, start[:0], 9, decode).tokens == []


def test_over_a_static_cache_the_tokens_are_the_same(
    any_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU records, run here as it is: recording itself needs CUDA."""
    model, start = models.load(any_base).eval(), contexts(5, 7)
    expected = by_generate(model, start, 24)
    monkeypatch.setattr(generate, "_RECORDED", ("cpu",))
    assert continue_texts(model, start, 24, GREEDY, 3).tokens == expected
    drawn = DecodeConfig("x", "sample", top_k=20, seed=0)
    static = continue_texts(model, start, 12, drawn).tokens
    monkeypatch.setattr(generate, "_RECORDED", ())
    assert continue_texts(model, start, 12, drawn).tokens == static


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_recorded_step_has_the_tokens_of_a_plain_one(any_base: BaseModel) -> None:
    model, start = models.load(any_base).eval(), contexts(5, 7)
    expected = continue_texts(model, start, 24, GREEDY, 3).tokens
    decoder = generate._Decoder(model.to("cuda"), GREEDY, [], None, None)
    tokens, _ = decoder.run(start, 24)
    assert decoder._step is not None
    assert decoder._step._graph is not None
    assert tokens.tolist() == expected
