"""Resolving and loading models, and which parameters a tuning trains, over architectures."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hyperfitting.errors import UserError
from hyperfitting.models import hub, layers, trainable
from hyperfitting.models.base import BaseModel, base_model
from hyperfitting.models.config import ModelConfig, TuningConfig
from hyperfitting.models.loading import ModelState, load
from hyperfitting.models.size import model_size
from hyperfitting.runtime.config import HardwareConfig
from hyperfitting.runtime.device import describe_device, resolve_device
from hyperfitting.store.artifact import DamagedArtifactError, Step, Store
from tests.conftest import ARCHITECTURES

FINAL_NORMS = {
    "llama": "model.norm",
    "qwen2": "model.norm",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
}


def local_config(folder: Path) -> ModelConfig:
    return ModelConfig(name="local", source="local", path=str(folder))


def test_late_stage_trains_the_last_blocks_and_the_final_norm(any_base: BaseModel) -> None:
    model = load(any_base)
    trained = trainable.select_trainable(model, TuningConfig("late_stage", last_blocks=2))
    blocks = layers.blocks(model)
    expected = {id(p) for block in blocks[1:] for p in block.parameters()}
    expected |= {id(p) for p in model.get_submodule(FINAL_NORMS[any_base.name]).parameters()}
    assert {id(p) for p in trained.values()} == expected
    assert {id(p) for p in model.parameters() if p.requires_grad} == expected


def test_full_trains_everything(any_base: BaseModel) -> None:
    model = load(any_base)
    assert set(trainable.select_trainable(model, TuningConfig("full"))) == set(
        dict(model.named_parameters())
    )


def test_more_last_blocks_than_the_model_has_is_an_error(base: BaseModel) -> None:
    with pytest.raises(UserError, match=r"(?s)tuning\.last_blocks=9.*1 to 3"):
        trainable.select_trainable(load(base), TuningConfig("late_stage", last_blocks=9))


def test_disable_dropout_makes_training_mode_equal_evaluation_mode(any_base: BaseModel) -> None:
    ids = torch.arange(20)[None]
    model = load(any_base)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    evaluated = model.eval()(input_ids=ids).logits
    assert not torch.equal(model.train()(input_ids=ids).logits, evaluated)
    trainable.disable_dropout(model)
    assert torch.equal(model.train()(input_ids=ids).logits, evaluated)


def test_the_id_of_a_local_model_is_a_hash_of_its_files(
    base: BaseModel, store: Store, tmp_path: Path
) -> None:
    shutil.copytree(base.folder(), tmp_path / "copy")
    source, copy = (base_model(local_config(f), store) for f in (base.folder(), tmp_path / "copy"))
    assert copy.id == source.id
    changed = json.loads((tmp_path / "copy" / "config.json").read_text()) | {"rope_theta": 5.0}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(changed))
    assert base_model(local_config(tmp_path / "copy"), store).id != source.id


def random_config(model_type: str, **fields: Any) -> ModelConfig:
    return ModelConfig(
        name="random", source="random", architecture={"model_type": model_type, **fields}
    )


def test_a_random_model_always_has_the_same_weights(tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        torch.manual_seed(hash(name) % 1000)
        base = base_model(random_config("gpt2", **ARCHITECTURES["gpt2"]), Store(tmp_path / name))
        base.ensure()
        weights.append(load(base).state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    with pytest.raises(UserError, match=r"model\.architecture"):
        base_model(random_config("nonesuch"), Store(tmp_path)).ensure()
    with pytest.raises(UserError, match=r"model\.architecture"):
        base_model(random_config("nonesuch"), Store(tmp_path)).shape()


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_config_and_size_are_known_before_the_model_is_built(model_type: str, store: Store) -> None:
    base = base_model(random_config(model_type, **ARCHITECTURES[model_type]), store)
    shape, size = base.shape(), model_size(base, store)
    assert base.step is not None
    assert not base.step.artifact.exists
    with pytest.raises(DamagedArtifactError, match="not built"):
        base.folder()
    base.ensure()
    model = load(base)
    blocks = layers.blocks(model)
    assert base.shape() == shape == (len(blocks), 32)
    assert (size.n_blocks, size.hidden_size) == shape
    assert size.n_params == sum(p.numel() for p in model.parameters())
    assert size.n_block_params == sum(p.numel() for p in blocks.parameters())
    assert size.n_head_params == model.get_output_embeddings().weight.numel()


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("missing", "is not a folder"),
        ("empty", "no config.json"),
        ("encoder", "does not predict the next token"),
        ("unknown", "config.json cannot be used"),
        ("truncated", "weights cannot be read"),
        ("no tokenizer", "no tokenizer"),
    ],
)
def test_an_unusable_model_folder_is_an_error_that_names_it(
    defect: str, message: str, base: BaseModel, store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    if defect == "empty":
        folder.mkdir()
    elif defect != "missing":
        shutil.copytree(base.folder(), folder)
    if defect in ("encoder", "unknown"):
        model_type = "t5" if defect == "encoder" else "nonesuch"
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    elif defect == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    elif defect == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    with pytest.raises(UserError) as raised:
        model = base_model(local_config(folder), store)
        if defect == "no tokenizer":
            model.tokenizer()
        else:
            load(model)
    assert message in str(raised.value)
    assert f"model.path={folder}" in str(raised.value)


def hub_cache(base: BaseModel, root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a model into a Hub cache, as a download does; return its commit."""
    sha = "0123456789" * 4
    cache = root / "models--someone--something"
    shutil.copytree(base.folder(), cache / "snapshots" / sha)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(sha)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return sha


def test_a_downloaded_hub_model_works_offline(
    base: BaseModel, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha = hub_cache(base, tmp_path, monkeypatch)
    cfg = ModelConfig(name="h", source="hub", path="someone/something")
    cached = base_model(cfg, store)
    assert cached.id == f"someone/something@{sha}:float32"
    cached.ensure()
    actual, expected = load(cached).state_dict(), load(base).state_dict()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_a_hub_model_that_is_not_downloaded_is_an_error_offline(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"(?s)model\.path=a/b.*cannot be reached.*smollm2_135m"):
        base_model(ModelConfig(name="h", path="a/b"), store)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "hf auth login"),
        ("RepositoryNotFoundError", "no such model"),
        ("RevisionNotFoundError", "model.revision=v9"),
    ],
)
def test_errors_of_the_hub_name_field_and_remedy(error: str, message: str) -> None:
    import httpx2
    from huggingface_hub import errors

    response = httpx2.Response(403, request=httpx2.Request("GET", "http://localhost"))
    with pytest.raises(UserError) as raised, hub.explain_errors("model", "meta-llama/x", "v9"):
        raise getattr(errors, error)("refused", response=response)
    assert message in str(raised.value)
    assert "meta-llama/x" in str(raised.value)


def test_the_base_model_is_a_state_of_its_own(base: BaseModel) -> None:
    state = ModelState(base)
    model = state.load(torch.device("cpu"))
    assert state.id == base.id
    assert state.is_base
    assert not model.training
    expected = load(base).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


def test_a_tuned_state_overlays_the_trained_parameters_on_the_base_model(
    base: BaseModel, store: Store
) -> None:
    trained = {"model.norm.weight": torch.full((32,), 3.0)}
    weights = Step(
        store.artifact("tuned", version=1, config={}, inputs={}),
        lambda work: save_file(trained, work / "last.safetensors"),
    ).ensure()
    state = ModelState(base, TuningConfig("full"), weights, "last.safetensors")
    model = state.load(torch.device("cpu"))
    assert state.id == f"{weights.id}/last"
    assert not state.is_base
    assert torch.equal(model.get_parameter("model.norm.weight"), trained["model.norm.weight"])
    assert not model.training


def test_a_lora_state_is_loaded_with_its_adapters_merged(base: BaseModel, store: Store) -> None:
    tuning = TuningConfig("late_stage_lora", last_blocks=2, lora_rank=4)
    adapted = load(base)
    trained = trainable.select_trainable(adapted, tuning)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(std=0.1, generator=generator)
    weights = Step(
        store.artifact("tuned", version=1, config={}, inputs={}),
        lambda work: save_file(
            {name: p.detach().clone() for name, p in trained.items()}, work / "last.safetensors"
        ),
    ).ensure()
    merged = ModelState(base, tuning, weights, "last.safetensors").load(torch.device("cpu"))
    assert dict(merged.named_parameters()).keys() == dict(load(base).named_parameters()).keys()
    ids = torch.arange(20)[None]
    expected = adapted.eval()(input_ids=ids).logits
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(load(base).eval()(input_ids=ids).logits, expected, atol=1e-2)


def test_a_tuned_state_needs_tuning_weights_and_file(base: BaseModel) -> None:
    with pytest.raises(ValueError, match="tuning, weights and file"):
        ModelState(base, TuningConfig("full"))


def test_override_forward_nests_and_is_undone(base: BaseModel) -> None:
    ids = torch.arange(8)[None]
    model = load(base).eval()
    norm = layers.blocks(model)[0].input_layernorm
    expected = model(input_ids=ids).logits
    with layers.override_forward({norm: lambda states: states}):
        once = model(input_ids=ids).logits
        with layers.override_forward({norm: lambda states: 2 * states}):
            assert not torch.equal(model(input_ids=ids).logits, once)
        assert torch.equal(model(input_ids=ids).logits, once)
    assert not torch.equal(once, expected)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_replaced_blocks_return_the_given_output_and_are_put_back(any_base: BaseModel) -> None:
    ids = torch.arange(8)[None]
    model = load(any_base).eval()
    blocks = layers.blocks(model)
    hidden: list[torch.Tensor] = []
    handle = blocks[2].register_forward_pre_hook(
        lambda _, args, kwargs: hidden.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    expected = model(input_ids=ids).logits
    handle.remove()
    before = list(blocks)
    with layers.replace_blocks(blocks, range(2), hidden[0]):
        assert all(isinstance(block, layers.PassthroughBlock) for block in blocks[:2])
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert list(blocks) == before


def test_an_unavailable_device_is_an_error() -> None:
    for name in ("cuda:99", "nonesuch"):
        with pytest.raises(UserError, match=f"hardware.device={name}"):
            resolve_device(HardwareConfig(device=name))


def test_records_name_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert describe_device(torch.device("cuda:1")) == "cuda:1 (GPU 1)"
    assert describe_device(torch.device("cpu")) == "cpu"
