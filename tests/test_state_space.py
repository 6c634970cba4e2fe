"""State-space models: Mamba and Mamba2 decode, train and are evaluated as transformers are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hyperfitting.decoding.backends import CudaGraphBackend, packed_cpu
from hyperfitting.decoding.cache import cache_bytes
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.decoding.sampling import sample_tokens, uniform_draws
from hyperfitting.errors import UserError
from hyperfitting.evaluation.forward import compute_token_stats, last_hidden_states
from hyperfitting.models import layers, trainable
from hyperfitting.models.base import BaseModel
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.loading import ModelState, load
from hyperfitting.models.random_init import byte_tokenizer
from hyperfitting.store.artifact import Store
from hyperfitting.training.config import TrainingConfig
from hyperfitting.training.saved_tensors import count_saved_tensors
from tests.conftest import Compose
from tests.test_activation_cache import late_stage
from tests.test_decoding import by_generate, contexts
from tests.test_memory_estimate import count_saved_by_a_real_pass
from tests.training import cfg, plain_loop, run_training, step_losses

__all__ = ["cfg"]

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "vocab_size": 256}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mamba": {},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 16},
    "rwkv": {"attention_hidden_size": 32},
    "recurrent_gemma": {"num_attention_heads": 4, "lru_width": 32, "intermediate_size": 64},
}


def save_model(folder: Path, model_type: str) -> BaseModel:
    fields = SMALL | ARCHITECTURES[model_type]
    config = AutoConfig.for_model(model_type, **fields, bos_token_id=None, eos_token_id=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "A_log" not in name:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return BaseModel.local(model_type, folder)


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def ssm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return save_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def model(ssm: BaseModel) -> PreTrainedModel:
    return ModelState(ssm).load(torch.device("cpu"))


def without_cache(model: PreTrainedModel, start: np.ndarray, choose: Any) -> list[list[int]]:
    """Continue texts by a forward pass over the whole text for each of 12 tokens."""
    ids = torch.as_tensor(start, dtype=torch.long)
    for step in range(12):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        ids = torch.cat([ids, choose(logits, step)[:, None]], dim=1)
    return ids[:, start.shape[1] :].tolist()


@torch.inference_mode()
def test_greedy_decoding_and_sampling_equal_those_without_a_cache(model: PreTrainedModel) -> None:
    start = contexts(5, 7)
    greedy = without_cache(model, start, lambda logits, _: logits.argmax(-1))
    assert greedy == by_generate(model, start, 12)
    assert len({token for row in greedy for token in row}) > 5
    decode = DecodeConfig("sample", "sample", temperature=1.3, seed=3)
    draws = torch.as_tensor(uniform_draws(3, start.tolist(), 12))
    sampled = without_cache(
        model, start, lambda logits, step: sample_tokens(logits, decode, draws[:, step])
    )
    for batch_size in (1, 2, None):
        cfg = DecodeConfig("greedy", seed=0)
        assert continue_texts(model, start, 12, cfg, batch_size).tokens == greedy
        assert continue_texts(model, start, 12, decode, batch_size).tokens == sampled


@torch.inference_mode()
def test_beam_and_contrastive_search_reorder_the_states(model: PreTrainedModel) -> None:
    start = contexts(3, 6)
    beam = DecodeConfig("beam", "beam", num_beams=3, seed=0)
    for batch_size in (1, 3):
        assert continue_texts(model, start, 20, beam, batch_size).tokens == by_generate(
            model, start, 20, num_beams=3
        )
    contrastive = DecodeConfig("c", "contrastive", top_k=3, penalty_alpha=0.6, seed=0)
    continuations = continue_texts(model, start, 10, contrastive, 3).tokens
    for context, tokens in zip(start.tolist(), continuations, strict=True):
        for i, token in enumerate(tokens):
            text = [*context, *tokens[:i]]
            p = torch.softmax(model(input_ids=torch.tensor([text])).logits[0, -1].float(), -1)
            objective = {}
            for candidate in p.topk(3).indices.tolist():
                ids = torch.tensor([[*text, candidate]])
                states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
                similarity = torch.cosine_similarity(states[-1:], states[:-1], dim=-1).max()
                objective[candidate] = (0.4 * p[candidate] - 0.6 * similarity).item()
            assert objective[token] == pytest.approx(max(objective.values()), abs=1e-5)


def test_their_backends_and_the_size_of_their_cache(model: PreTrainedModel) -> None:
    start, greedy = contexts(8, 6), DecodeConfig("greedy", seed=0)
    expected = by_generate(model, start, 12)
    if packed_cpu.matmul_library() is not None:
        assert packed_cpu.PackedCpuBackend().supports(model, greedy, 8, 24)
        with packed_cpu.packed_weights(model, 8):
            assert continue_texts(model, start, 12, greedy, 8).tokens == expected
    assert not CudaGraphBackend().supports(model, greedy, 8, 24)
    cache = model(input_ids=torch.zeros(1, 9, dtype=torch.long), use_cache=True).cache_params
    states = [
        state
        for layer in cache.layers
        for state in (layer.conv_states[0], layer.recurrent_states[0])
    ]
    n_bytes = sum(state.numel() * 4 for state in states)
    scan = 3 * 4 * 64 * 8 if model.config.model_type == "mamba" else 0  # of a token
    assert cache_bytes(model, 9) == n_bytes + scan * 9


@torch.inference_mode()
def test_token_stats_and_features_equal_the_plain_forward_pass(model: PreTrainedModel) -> None:
    texts = contexts(3, 20)
    tokens = torch.as_tensor(texts, dtype=torch.long)
    output = model(input_ids=tokens, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    loss = compute_token_stats(model, texts, batch_size=2)["loss"]
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    features = last_hidden_states(model, [texts[0, :7].tolist(), texts[1].tolist()], batch_size=2)
    short = model(input_ids=tokens[:1, :7], output_hidden_states=True).hidden_states[-1][0, -1]
    np.testing.assert_allclose(features[0], short, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features[1], output.hidden_states[-1][1, -1], rtol=1e-4, atol=1e-5)


def test_late_stage_trains_the_last_blocks_and_the_final_norm(ssm: BaseModel) -> None:
    model = load(ssm)
    trained = trainable.select_trainable(model, TuningConfig("late_stage", last_blocks=2))
    assert {name.split(".mixer")[0] for name in trained} == {
        "backbone.layers.1", "backbone.layers.1.norm.weight", "backbone.layers.2",
        "backbone.layers.2.norm.weight", "backbone.norm_f.weight",
    }  # fmt: skip
    assert len(layers.blocks(model)) == ssm.shape()[0] == 3


def test_training_has_the_losses_of_a_plain_loop(
    cfg: TrainingConfig, ssm: BaseModel, tmp_path: Path
) -> None:
    cfg.optimizer = {"_target_": "torch.optim.SGD", "lr": 1e-3}
    rows, _ = run_training(cfg, ssm, tmp_path / "w")
    losses, _ = plain_loop(cfg, ssm)
    np.testing.assert_allclose(step_losses(rows), losses, rtol=1e-4)


def test_late_stage_training_starts_from_cached_activations(
    cfg: TrainingConfig, ssm: BaseModel, tmp_path: Path
) -> None:
    expected, _ = run_training(late_stage(cfg, activation_cache="off"), ssm, tmp_path / "a" / "w")
    cfg.trainer.activation_cache = "float32"
    rows, _ = run_training(cfg, ssm, tmp_path / "b" / "w")
    assert (tmp_path / "b" / "store" / "activation_cache").is_dir()
    np.testing.assert_allclose(step_losses(rows), step_losses(expected), rtol=0, atol=1e-5)


def test_adapters_are_on_the_layer_that_every_kernel_calls(ssm: BaseModel) -> None:
    model, ids = load(ssm), torch.arange(20)[None]
    trained = trainable.select_trainable(model, TuningConfig("late_stage_lora", last_blocks=2))
    assert {name.split(".lora")[0] for name in trained} == {
        f"backbone.layers.{i}.mixer.in_proj" for i in (1, 2)
    }
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(std=0.1)
    expected = model(input_ids=ids).logits
    trainable.merge_adapters(model)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(load(ssm)(input_ids=ids).logits, expected, atol=1e-2)


@pytest.mark.parametrize("method", ["full", "late_stage", "late_stage_lora"])
def test_saved_tensors_of_one_and_two_blocks_are_counted(
    compose: Compose, ssm: BaseModel, store: Store, method: str
) -> None:
    overrides = [] if method == "full" else ["tuning.last_blocks=2"]
    cfg = compose("preset=debug", f"tuning={method}", *overrides).training
    saved = count_saved_tensors(cfg, (2, 16), ssm, store, "cpu")
    n_blocks = 3 if method == "full" else 2
    n_bytes, n_trained = count_saved_by_a_real_pass(cfg, ssm, (2, 16))
    assert saved.outside + n_blocks * saved.per_block == pytest.approx(n_bytes, rel=0.02)
    assert saved.trained_outside + n_blocks * saved.trained_per_block == n_trained


@pytest.mark.parametrize("model_type", ["rwkv", "recurrent_gemma"])
def test_a_model_without_a_cache_that_can_be_reordered_is_refused(
    model_type: str, tmp_path: Path
) -> None:
    base = save_model(tmp_path, model_type)
    with pytest.raises(UserError, match=r"(?s)model\.path=.*no cache.*valid: .*Mamba2"):
        ModelState(base).load(torch.device("cpu"))
