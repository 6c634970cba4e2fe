"""Loading, and which parameters a tuning trains, over architectures that differ."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from hyperfitting import hub, models, parameters
from hyperfitting.config import HardwareConfig, ModelConfig, TuningConfig
from hyperfitting.errors import UserError
from hyperfitting.models import BaseModel, ModelState
from hyperfitting.store import Store

FINAL_NORMS = {
    "llama": "model.norm",
    "qwen2": "model.norm",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
}


def local(folder: Path) -> ModelConfig:
    return ModelConfig(name="mine", source="local", path=str(folder))


def test_late_stage_trains_the_last_blocks_and_the_final_norm(any_base: BaseModel) -> None:
    model = models.load(any_base)
    trained = parameters.select_trainable(model, TuningConfig("late_stage", last_blocks=2))
    stack = parameters.blocks(model)
    expected = {id(p) for block in stack[1:] for p in block.parameters()}
    expected |= {id(p) for p in model.get_submodule(FINAL_NORMS[any_base.name]).parameters()}
    assert {id(p) for p in trained.values()} == expected
    assert {id(p) for p in model.parameters() if p.requires_grad} == expected


def test_full_trains_everything(any_base: BaseModel) -> None:
    model = models.load(any_base)
    assert set(parameters.select_trainable(model, TuningConfig("full"))) == set(
        dict(model.named_parameters())
    )


def test_more_blocks_than_there_are_is_an_error(base: BaseModel) -> None:
    with pytest.raises(UserError, match=r"(?s)tuning\.last_blocks=9.*1 to 3"):
        parameters.select_trainable(models.load(base), TuningConfig("late_stage", last_blocks=9))


def test_without_dropout_training_mode_gives_what_evaluation_gives(any_base: BaseModel) -> None:
    ids = torch.arange(20)[None]
    model = models.load(any_base)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    evaluated = model.eval()(input_ids=ids).logits
    assert not torch.equal(model.train()(input_ids=ids).logits, evaluated)
    parameters.no_dropout(model)
    assert torch.equal(model.train()(input_ids=ids).logits, evaluated)


def test_a_local_models_id_follows_its_content(
    base: BaseModel, store: Store, tmp_path: Path
) -> None:
    shutil.copytree(base.folder(), tmp_path / "copy")
    one, two = (models.base_model(local(f), store) for f in (base.folder(), tmp_path / "copy"))
    assert one.id == two.id
    changed = json.loads((tmp_path / "copy" / "config.json").read_text()) | {"rope_theta": 5.0}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(changed))
    assert models.base_model(local(tmp_path / "copy"), store).id != one.id


def test_a_random_model_is_always_the_same(tmp_path: Path) -> None:
    from tests.conftest import ARCHITECTURES

    cfg = ModelConfig(
        name="r", source="random", architecture={"model_type": "gpt2", **ARCHITECTURES["gpt2"]}
    )
    weights = []
    for name in ("a", "b"):
        torch.manual_seed(hash(name) % 1000)
        base = models.base_model(cfg, Store(tmp_path / name))
        weights.append(models.load(base).state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    with pytest.raises(UserError, match=r"model\.architecture"):
        wrong = ModelConfig(name="r", source="random", architecture={"model_type": "nonesuch"})
        models.base_model(wrong, Store(tmp_path)).folder()


@pytest.mark.parametrize("what", ["missing", "empty", "encoder", "unknown", "torn", "no tokenizer"])
def test_a_folder_that_is_no_model_is_named_with_what_would_do(
    what: str, base: BaseModel, store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    if what == "empty":
        folder.mkdir()
    elif what != "missing":
        shutil.copytree(base.folder(), folder)
    says = {"missing": "is not a folder", "empty": "no config.json"}
    if what in ("encoder", "unknown"):
        kind = "t5" if what == "encoder" else "nonesuch"
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        says |= {
            "encoder": "does not predict the next token",
            "unknown": "config.json cannot be used",
        }
    elif what == "torn":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        says["torn"] = "weights cannot be read"
    elif what == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
        says["no tokenizer"] = "no tokenizer"
    with pytest.raises(UserError) as told:
        found = models.base_model(local(folder), store)
        if what == "no tokenizer":
            found.tokenizer()
        else:
            models.load(found)
    assert says[what] in str(told.value)
    assert f"model.path={folder}" in str(told.value)


def hub_cache(base: BaseModel, root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Lay a model out as an earlier download would have left it."""
    sha = "0123456789" * 4
    cache = root / "models--someone--something"
    shutil.copytree(base.folder(), cache / "snapshots" / sha)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(sha)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return sha


def test_a_hub_model_that_was_downloaded_works_without_the_network(
    base: BaseModel, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha = hub_cache(base, tmp_path, monkeypatch)
    cfg = ModelConfig(name="h", source="hub", path="someone/something")
    found = models.base_model(cfg, store)
    assert found.id == f"someone/something@{sha}:float32"
    ours, theirs = models.load(found).state_dict(), models.load(base).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_hub_model_without_a_network_says_what_to_do(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"(?s)model\.path=a/b.*cannot be reached.*smollm2_135m"):
        models.base_model(ModelConfig(name="h", path="a/b"), store)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("GatedRepoError", "hf auth login"),
        ("RepositoryNotFoundError", "no such model"),
        ("RevisionNotFoundError", "model.revision=v9"),
    ],
)
def test_the_hubs_refusals_are_explained(error: str, says: str) -> None:
    import httpx2
    from huggingface_hub import errors

    response = httpx2.Response(403, request=httpx2.Request("GET", "http://localhost"))
    with pytest.raises(UserError) as told, hub.explained("model", "meta-llama/x", "v9"):
        raise getattr(errors, error)("refused", response=response)
    assert says in str(told.value)
    assert "meta-llama/x" in str(told.value)


def test_an_overlay_is_what_a_state_adds_to_the_original(base: BaseModel, store: Store) -> None:
    from safetensors.torch import save_file

    trained = {"model.norm.weight": torch.full((32,), 3.0)}
    tuned = store.artefact(
        "tuned",
        version=1,
        config={"tuning": {"method": "full"}},
        inputs={},
        make=lambda work: save_file(trained, work / "last.safetensors"),
    )
    state = ModelState(base, tuned)
    model = state.load(torch.device("cpu"))
    assert state.id == f"{tuned.id}/last"
    assert torch.equal(model.get_parameter("model.norm.weight"), trained["model.norm.weight"])
    assert not model.training


def test_a_device_that_is_not_there_is_an_error() -> None:
    for name in ("cuda:99", "nonesuch"):
        with pytest.raises(UserError, match=f"hardware.device={name}"):
            models.device(HardwareConfig(device=name))
