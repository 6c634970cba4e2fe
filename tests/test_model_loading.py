"""Model folders that would give wrong numbers, or a page of library text, are refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel, base_model
from hyperfitting.models.causality import check_causal
from hyperfitting.models.config import ModelConfig
from hyperfitting.models.loading import ModelState, load
from hyperfitting.models.random_init import byte_tokenizer
from hyperfitting.store.artifact import Store
from hyperfitting.training.step import build_train_state
from tests.conftest import ARCHITECTURES, tiny_model
from tests.training import DATA, cache_location, cfg

__all__ = ["cfg"]
Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")


@pytest.fixture
def folder(base: BaseModel, tmp_path: Path) -> Path:
    """A copy of a model's folder, to be damaged."""
    return Path(shutil.copytree(base.folder(), tmp_path / "model"))


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def edit_weights(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    tensors = edit(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        base = BaseModel.local("tiny", folder)
        base.tokenizer()
        ModelState(base).load(CPU)
    message = str(raised.value)
    assert message.startswith(f"model.path={folder}: ")
    assert len(message.splitlines()) <= 3
    return message


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("layers.1.mlp.up"), "its weights lack model.layers.1.mlp.up_proj.weight\n"),
        (without("lm_head"), "its weights lack lm_head.weight\n"),
        (without("layers.2"), "model.layers.2.mlp.up_proj.weight and 5 more\n"),
        (
            lambda tensors: {name.replace("norm", "ln"): t for name, t in tensors.items()},
            "its weights lack model.layers.0.input_layernorm.weight",
        ),
        (lambda tensors: tensors | {"head.bias": torch.ones(3)}, "describes, head.bias\n"),
        (
            lambda tensors: tensors | {"model.norm.weight": torch.ones(31)},
            "another shape than its config.json says for model.norm.weight ([31] instead of [32])",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused_by_name(
    folder: Path, edit: Callable[[Tensors], Tensors], message: str
) -> None:
    edit_weights(folder, edit)
    assert message in refusal(folder)


def test_tied_and_obsolete_tensors_may_be_missing_or_left_over(tmp_path: Path) -> None:
    tied = tiny_model(tmp_path / "tied", "qwen2")  # has no lm_head.weight in its file
    assert "lm_head.weight" not in load_file(tied.folder() / "model.safetensors")
    load(tied)
    old = tiny_model(tmp_path / "old", "llama")
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(old.folder(), lambda tensors: tensors | {inv_freq: torch.ones(4)})
    load(old)


def test_a_config_with_fewer_blocks_than_the_weights_is_refused(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=2)
    assert "hold, beyond what its config.json describes, model.layers.2." in refusal(folder)


@pytest.mark.parametrize("n_blocks", [0, 10**6])
def test_an_absurd_number_of_blocks_is_refused_before_the_model_is_built(
    folder: Path, n_blocks: int
) -> None:
    edit_config(folder, num_hidden_layers=n_blocks)
    with pytest.raises(UserError, match=rf"num_hidden_layers={n_blocks}; .* hold 30 tensors"):
        BaseModel.local("tiny", folder).shape()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(folder: Path, value: float) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        return tensors

    edit_weights(folder, spoil)
    message = refusal(folder)
    assert "its weights hold NaN or infinity: model.layers.1.mlp.up_proj.weight\n" in message


def bert(folder: Path, **fields: Any) -> BaseModel:
    config = AutoConfig.for_model(
        "bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        vocab_size=256, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return BaseModel.local("bert", folder)


def test_a_model_that_attends_to_the_future_is_neither_evaluated_nor_trained(
    cfg: Any, tmp_path: Path
) -> None:
    assert "is no causal model" in refusal(bert(tmp_path / "encoder").folder())
    encoder = BaseModel.local("bert", tmp_path / "encoder")
    with pytest.raises(UserError, match="is_decoder: true"):
        build_train_state(cfg, encoder, DATA.train, cache_location(tmp_path / "w", encoder))
    ModelState(bert(tmp_path / "decoder", is_decoder=True)).load(CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_decoders_are_causal_in_every_dtype(model_type: str, dtype: str, tmp_path: Path) -> None:
    ModelState(BaseModel.local("x", tiny_model(tmp_path, model_type).folder(), dtype)).load(CPU)


def test_a_mixture_of_experts_is_causal_although_it_groups_tokens(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "mixtral", **ARCHITECTURES["llama"], vocab_size=256, num_local_experts=4
    )
    for dtype in (torch.float32, torch.bfloat16):
        check_causal(AutoModelForCausalLM.from_config(config, dtype=dtype), "mixtral")


def test_a_cache_that_loses_the_position_is_refused() -> None:
    """Transformers' Bamba counts positions from 0 at every step that is given none."""
    config = AutoConfig.for_model(
        "bamba", **ARCHITECTURES["llama"], vocab_size=256, mamba_n_heads=4, mamba_d_head=16,
        mamba_d_state=8, attn_layer_indices=[1],
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    with pytest.raises(UserError, match="other logits with its cache"):
        check_causal(model, "bamba")


def test_the_check_leaves_model_and_random_numbers_as_they_are(any_base: BaseModel) -> None:
    model, ids = load(any_base).train(), torch.arange(20)[None]
    torch.manual_seed(5)
    expected, state = model(input_ids=ids).logits, torch.get_rng_state()
    torch.manual_seed(5)
    check_causal(model, "x")
    assert model.training
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert torch.equal(torch.get_rng_state(), state)
    model(input_ids=ids).logits.sum().backward()  # no inference tensors are left in it


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<pad>"])
    tokenizer.save_pretrained(folder)
    assert "ids up to 256, its embedding only 256 rows" in refusal(folder)


def test_a_padding_token_without_embedding_is_no_reason_to_refuse_a_model(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert BaseModel.local("x", folder).tokenizer().pad_token_id == 256


def test_code_that_comes_with_a_model_is_not_run_nor_asked_for(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = folder / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    auto_map = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    edit_config(folder, auto_map=auto_map)
    load(BaseModel.local("native", folder))  # transformers' own Llama
    edit_config(folder, model_type="my\x1b[31mown")
    message = refusal(folder)
    assert r"model type 'my\x1b[31mown' needs code that comes with it (auto_map" in message
    assert not ran.exists()
    assert "\x1b[31m" not in "".join(capfd.readouterr())


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_pickled_weights_are_read_only_if_they_are_tensors(folder: Path) -> None:
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    load(BaseModel.local("bin", folder))
    torch.save(tensors | {"x": RunsCode(folder / "ran")}, folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "weights cannot be read: they are pickled with more than tensors" in message
    assert "save them again as safetensors" in message
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "llama", "hidden_size": "x"}', "config.json cannot be used: "),
        ('{"model_type": "llama", "num_attention_heads": 5}', "not a multiple"),
        ('{"hidden_size": 32}', "knows no model type None"),
        ("[1]", "config.json cannot be used"),
        ("{", "config.json cannot be used"),
    ],
)
def test_an_invalid_config_is_one_sentence(folder: Path, content: str, message: str) -> None:
    (folder / "config.json").write_text(content)
    assert message in refusal(folder)


def test_no_limit_of_the_context_is_none(folder: Path) -> None:
    edit_config(folder, max_position_embeddings=-1)
    BaseModel.local("tiny", folder).check_length("dataset.seq_len", 10**6)


def test_the_location_says_where_the_files_come_from(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(source: str, **fields: Any) -> BaseModel:
        return base_model(ModelConfig(name="x", source=source, **fields), store)

    assert model("local", path=str(folder)).location == str(folder)
    random = model("random", architecture={"model_type": "llama", **ARCHITECTURES["llama"]})
    random.ensure()
    assert random.location == str(random.folder())
    monkeypatch.setattr("hyperfitting.models.hub.resolve_commit", lambda *_: "0" * 40)
    assert model("hub", path="someone/something").location == f"someone/something@{'0' * 40}"


def test_a_file_that_is_no_gguf_is_an_error_that_names_it(store: Store, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(60))
    cfg = ModelConfig(name="x", source="gguf", path=str(tmp_path), gguf_file="x.gguf")
    for use in (BaseModel.transformers_config, BaseModel.ensure):
        with pytest.raises(UserError, match=r"model\.gguf_file=.*x\.gguf: transformers cannot"):
            use(base_model(cfg, store))
