"""Train and decode steps do not wait for a GPU: on torch's meta device, nothing is read."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from hyperfitting.decoding.backends.base import CachedModel
from hyperfitting.decoding.backends.cuda_graph import CudaGraphStep
from hyperfitting.decoding.citation_blocker import CitationBlocker
from hyperfitting.decoding.config import CitationBlockerConfig, DecodeConfig
from hyperfitting.decoding.constraints import Constraints
from hyperfitting.decoding.generate import _STRATEGIES, continue_texts
from hyperfitting.errors import UserError
from hyperfitting.evaluation.forward import TOKEN_STATS, compute_token_stats
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load
from hyperfitting.progress import no_op
from hyperfitting.runtime.distributed import SINGLE_PROCESS
from hyperfitting.runtime.transfer import HostScalar, to_device
from hyperfitting.training import train as train_module
from hyperfitting.training.activation_cache import ActivationCache
from hyperfitting.training.compile import CompiledBlocks
from hyperfitting.training.config import TrainingConfig
from hyperfitting.training.loss import NextTokenLoss
from hyperfitting.training.step import TrainState, build_train_state, train_step
from tests.host_reads import HostReads
from tests.training import DATA, cache_location, cfg

__all__ = ["cfg"]
VOCAB_SIZE = 2048  # on a CPU not all of it is sorted


def meta_llama() -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB_SIZE, num_hidden_layers=2, num_key_value_heads=2, **shape)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.fixture
def state(cfg: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> TrainState:
    """A Llama on the meta device, where autocast does not exist."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    model = meta_llama()
    loss = NextTokenLoss(model)
    loss._layer = model.lm_head  # the probe reads values
    cfg.trainer.clip_norm = 1.0
    return TrainState(
        model=model,
        trained=dict(model.named_parameters()),
        optimizer=torch.optim.Adam(model.parameters()),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        trainer=cfg.trainer,
        deterministic=True,
        micro_batch_size=2,
        compiled_blocks=CompiledBlocks(model, enabled=False),
        loss=loss,
        linear_forwards={},
        activation_cache=None,
        dist=SINGLE_PROCESS,
    )


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_train_step_reads_nothing_from_the_device(
    state: TrainState, monkeypatch: pytest.MonkeyPatch, is_cached: bool
) -> None:
    if is_cached:
        activations = torch.zeros(3, 8, 32, device="meta")
        blocks = state.model.model.layers
        state.activation_cache = ActivationCache(blocks, 1, activations, torch.float32)
    enqueued: list[tuple[int, ...]] = []

    def recorded(array: Any, device: torch.device) -> Tensor:
        enqueued.append(array.shape)
        return to_device(array, device)

    for module in ("step", "activation_cache"):
        monkeypatch.setattr(f"hyperfitting.training.{module}.to_device", recorded)
    tokens = torch.zeros(3, 8, dtype=torch.long, device="meta")
    with HostReads() as host:
        for _ in range(2):
            train_step(state, tokens, np.arange(3))
    assert host.reads == []
    rows = [(2,), (2,), (1,), (1,)] if is_cached else [(2,), (1,)]  # of each micro-batch
    assert host.uploads == enqueued == rows * 2


def test_a_masked_train_step_reads_nothing_from_the_device(state: TrainState) -> None:
    tokens = torch.zeros(3, 8, dtype=torch.long, device="meta")
    mask = np.arange(24).reshape(3, 8) % 3 > 0
    with HostReads() as host:
        train_step(state, tokens, np.arange(3), mask)
    assert host.reads == []
    counted = [(mask[:2, 1:].sum(),), (mask[2:, 1:].sum(),)]
    assert host.uploads == [(2,), counted[0], (1,), counted[1]]


def test_a_loss_is_read_when_the_next_step_is_enqueued(
    state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def step(_: TrainState, tokens: Tensor, rows: Any, mask: None) -> Tensor:
        events.append(f"step {rows[0]}")
        return torch.tensor(float(rows[0]))

    class Recorded(HostScalar):
        def read(self) -> float:
            events.append(f"read {int(self._scalar)}")
            return super().read()

    monkeypatch.setattr(train_module, "train_step", step)
    monkeypatch.setattr(train_module, "HostScalar", Recorded)
    rows = [np.array([i]) for i in range(3)]
    sequences = torch.zeros(3, 8, dtype=torch.int32)
    losses = list(train_module._train_steps(state, sequences, None, rows))
    assert losses == [(8, 0.0), (8, 1.0), (8, 2.0)]
    assert events == ["step 0", "step 1", "read 0", "step 2", "read 1", "read 2"]


class MetaModel(CachedModel):
    """Next-token logits without values; its own forward pass is not of interest."""

    def __init__(self) -> None:
        pass

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.empty(len(tokens), VOCAB_SIZE, device="meta")

    def forward_with_states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self(tokens), torch.empty(*tokens.shape, 16, device="meta")

    def expand(self, n: int) -> None:
        pass

    def select(self, rows: Tensor) -> None:
        pass


def host_reads(decode: DecodeConfig, n_steps: int) -> HostReads:
    """Decode two meta contexts with every constraint."""
    corpus = np.random.default_rng(0).integers(0, 4, (5, 12))
    blocker = CitationBlocker(corpus, CitationBlockerConfig(True, 2), str)
    contexts = torch.zeros(2, 5, dtype=torch.long, device="meta")
    with HostReads() as host:
        constraints = Constraints(decode, [3, 5], contexts.shape[1], blocker)
        strategy = _STRATEGIES[decode.strategy]
        with no_op("", 0, "") as advance:
            strategy(MetaModel(), contexts, n_steps, decode, constraints, advance)
    return host


@pytest.mark.parametrize(
    "fields",
    [
        {"strategy": "greedy"},
        {"strategy": "sample", "top_p": 0.9},
        {"strategy": "sample", "typical_p": 0.9},
        {"strategy": "sample", "top_k": 50, "top_p": 0.9},
        {"strategy": "sample", "top_k": 4, "min_p": 0.1},
        {"strategy": "beam", "num_beams": 3},
        {"strategy": "beam", "num_beams": 3, "stop_at_eos": True},
        {"strategy": "contrastive", "top_k": 4, "penalty_alpha": 0.5},
    ],
)
def test_what_decoding_reads_does_not_grow_with_its_steps(fields: dict[str, Any]) -> None:
    options = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "seed": 0}
    decode = DecodeConfig("x", **options, **fields)
    few, more, most = (host_reads(decode, n_steps) for n_steps in (4, 32, 33))
    assert few.reads == more.reads
    assert len(few.uploads) == len(more.uploads)
    assert len(most.reads) == len(more.reads) + 1  # the check that tokens are left, every 32 steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_of_a_cuda_graph_reads_and_uploads_nothing(dtype: torch.dtype) -> None:
    """What is captured: a graph cannot hold either."""
    model = meta_llama().to(dtype).eval()
    with torch.device("meta"):
        cache = StaticCache(config=model.config, max_cache_len=8)
        step, context = CudaGraphStep(model, cache), torch.zeros(2, 5, dtype=torch.long)
    with torch.inference_mode():
        step(context)
        with HostReads() as host:
            logits = step(context[:, :1])
    assert logits.shape == (2, VOCAB_SIZE)
    assert (host.reads, host.uploads) == ([], [])


def test_scoring_reads_each_statistic_once_per_batch() -> None:
    model = meta_llama().eval()
    texts = np.zeros((12, 6), np.int32)
    for batch_size, n_batches in ((12, 1), (4, 3)):
        with HostReads() as host:
            compute_token_stats(model, texts, batch_size)
        copies = [read for read in host.reads if read in ("_to_copy", "to")]
        assert len(copies) == n_batches * len(TOKEN_STATS)
        assert len(host.reads) - len(copies) <= n_batches  # by transformers, for packed sequences


def test_that_no_token_is_left_is_found_late_and_names_its_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hyperfitting.decoding.forbidden._STEPS_PER_READ", {})  # as on a GPU
    check = Constraints(DecodeConfig("x", seed=0), [], 5).allowed_check(n_steps=50)
    taken = iter(range(50))

    def steps() -> Iterator[int]:
        for step in taken:
            scores = torch.zeros(3, 1)
            scores[1] = -torch.inf if step == 35 else 0.0
            check(scores, step)
            yield step

    with pytest.raises(UserError, match="every token is forbidden after 35 new ones"):
        list(steps())
    assert next(taken, None) is None  # at the last step


def synchronizations(job: Callable[[], object]) -> int:
    """Return how often the host waits for the GPU, as torch counts it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            job()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("method", ["full", "late_stage"])
def test_on_a_gpu_a_train_step_does_not_synchronize(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, method: str
) -> None:
    cfg.hardware.device, cfg.tuning.method, cfg.tuning.last_blocks = "cuda", method, 1
    state = build_train_state(cfg, base, DATA.train, cache_location(tmp_path / "w", base))
    state.model.train()
    rows = np.arange(3)
    tokens = torch.as_tensor(DATA.train[rows]).long().cuda()
    train_step(state, tokens, rows)  # the optimizer's state
    assert synchronizations(lambda: train_step(state, tokens, rows)) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_on_a_gpu_decoding_does_not_synchronize_at_each_step(base: BaseModel) -> None:
    model = load(base).eval().cuda()
    blocker = CitationBlocker(DATA.train, CitationBlockerConfig(True, 2), str)
    decode = DecodeConfig("x", repetition_penalty=1.2, no_repeat_ngram_size=3, seed=0)

    def decode_steps(n: int) -> int:
        contexts = DATA.val[:, :8]
        return synchronizations(
            lambda: continue_texts(model, contexts, n, decode, 3, blocker=blocker)
        )

    decode_steps(40)
    assert decode_steps(40) == decode_steps(60)  # the check is read twice
