"""Memory that is planned, against memory that is used."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperfitting import footprint, models, parameters
from hyperfitting.config import RunConfig
from hyperfitting.forwards import running
from hyperfitting.models import BaseModel
from hyperfitting.store import Store
from hyperfitting.sweep.plan import Plan
from tests.conftest import Compose, environment

LLAMA_8B = [
    "preset=debug", "model.architecture.hidden_size=4096",
    "model.architecture.num_hidden_layers=32",
    "model.architecture.intermediate_size=14336", "model.architecture.num_attention_heads=32",
    "model.architecture.num_key_value_heads=8", "+model.architecture.vocab_size=128256",
    "model.architecture.tie_word_embeddings=false", "dataset.seq_len=256", "trainer.batch_size=8",
    "plan=true", "hardware.planned_memory=80", "hardware.planned_speed=400",
]  # fmt: skip
LLAMA_70B = [
    *LLAMA_8B, "model.architecture.hidden_size=8192", "model.architecture.num_hidden_layers=80",
    "model.architecture.intermediate_size=28672", "model.architecture.num_attention_heads=64",
]  # fmt: skip


def really_kept(cfg: RunConfig, base: BaseModel, rows: int) -> tuple[int, int]:
    """Count what autograd keeps of a real pass through the whole model, and what is trained."""
    model = models.load(base).train()
    trained = parameters.select_trainable(model, cfg.tuning)
    parameters.no_dropout(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        running({model.get_output_embeddings(): lambda states: states}),
    ):
        tokens = torch.zeros(rows, cfg.dataset.seq_len, dtype=torch.long)
        model(input_ids=tokens, use_cache=False)
    return sum(s.nbytes() for s in kept.values()), sum(p.numel() for p in trained.values())


@pytest.mark.parametrize("method", ["full", "late_stage", "lora", "late_stage_lora"])
def test_what_autograd_keeps_is_known_without_a_model(
    compose: Compose, any_base: BaseModel, store: Store, method: str
) -> None:
    """One and two blocks without content tell of three with it, in every architecture."""
    cfg = compose("preset=debug", f"tuning={method}")
    if cfg.tuning.is_late:
        cfg.tuning = replace(cfg.tuning, last_blocks=3)
    found = footprint._read(footprint.kept_by(cfg, any_base, 5, store))
    kept, trained = really_kept(cfg, any_base, 5)
    assert found.outside + 3 * found.in_block == pytest.approx(kept, rel=0.01)
    assert found.trained_outside + 3 * found.trained_in_block == trained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "dtype", "expected"),
    [("adam", "float32", 8.0), ("adam_bf16", "bfloat16", 4.0), ("adam_8bit", "bfloat16", 2.0)],
)
def test_an_optimizers_state_is_known(
    compose: Compose, store: Store, optimizer: str, dtype: str, expected: float
) -> None:
    made = footprint.state_of(compose(f"optimizer={optimizer}").optimizer, dtype, store)
    assert float(made.file("state.json").read_text()) == pytest.approx(expected, rel=0.05)


def only_item(cfg: RunConfig, store: Store) -> Any:
    cfg.store = str(store.folder)
    return Plan.of({"it": cfg}).items[0]


def test_a_model_too_large_for_a_gpu_is_told_what_makes_it_fit(
    compose: Compose, store: Store
) -> None:
    item = only_item(compose(*LLAMA_8B), store)
    assert 16 * 8.03e9 < item.memory < 17 * 8.03e9
    assert item.fits_with == "model.dtype=bfloat16 trainer.precision=float32 optimizer=adam_bf16"
    after = only_item(compose(*LLAMA_8B, *item.fits_with.split()), store)
    assert 8 * 8.03e9 < after.memory < 80e9
    assert not after.fits_with


def test_a_model_of_70b_takes_several_measures_together(compose: Compose, store: Store) -> None:
    given = [*LLAMA_70B, "hardware=fsdp", "hardware.ranks=16"]
    item = only_item(compose(*given), store)
    assert item.memory > 4 * 70e9  # evaluated on one GPU
    measures = item.fits_with.split()
    assert {"hardware.spread=true", "model.dtype=bfloat16"} <= set(measures)
    after = only_item(compose(*given, *measures), store)
    assert after.memory < 80e9
    without = [m for m in measures if m != "hardware.spread=true"]
    assert only_item(compose(*given, *without), store).memory > 80e9


MEASURE = """
import gc, json, os, sys, hydra, numpy as np, torch
from hyperfitting import distributed, footprint, models
from hyperfitting.config import conf_dir, from_hydra, register
from hyperfitting.progress import silent
from hyperfitting.store import Store
from hyperfitting.training.learner import Learner
from hyperfitting.training.trunk import KeptIn, trunk_of

def peak():  # (getrusage's would be the largest of this process and of the one that started it)
    told = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(told["VmHWM"].split()[0]) * 1024

folder, architecture, *overrides = sys.argv[1:]
register()
with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
    cfg = from_hydra(hydra.compose("config", overrides=overrides))
if json.loads(architecture):
    cfg.model.source, cfg.model.architecture = "random", json.loads(architecture)
store = Store(cfg.store)
base = models.base_model(cfg.model, store)
base.folder()
if folder == "plan":
    found = footprint.footprint(cfg, base, store, "cpu")
    print(json.dumps(vars(found) | {"peak": found.peak}))
    sys.exit()
models.prepare(cfg.hardware)
ranks = cfg.hardware.ranks
crew = distributed.ALONE
if ranks > 1:
    crew = distributed.join(int(os.environ["RANK"]), ranks, 0, os.environ["MEET"])
before = peak()
model = models.load(base, crew)
for parameter in model.parameters():
    distributed.local(parameter.detach()).sum()  # files are read when they are touched
loaded = peak() - before
del model, parameter
gc.collect()
learner = Learner.new(cfg, base, crew)
shape = (cfg.trainer.batch_size, cfg.dataset.seq_len)
tokens = np.random.default_rng(0).integers(0, 256, shape, dtype=np.int32)
learner.trunk = trunk_of(cfg, learner.model, tokens, KeptIn(Store(folder), {}), silent, crew)
learner.model.train()
for _ in range(2):
    learner.update(torch.as_tensor(tokens).long(), np.arange(len(tokens)))
print(json.dumps({"loaded": loaded, "peak": peak()}))
crew.wait()
"""
SIZES = {
    "10M": {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 768,
        "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 8192,
    },
    "50M": {
        "model_type": "gpt2", "n_embd": 512, "n_layer": 10, "n_head": 8, "vocab_size": 32000,
        "n_positions": 512,
    },
    "135M": {},
    "230M": {
        "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 4,
        "vocab_size": 49152, "tie_word_embeddings": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store where each model is made once."""
    return tmp_path_factory.mktemp("store")


def planned_and_measured(
    tmp_path: Path, store: Path, size: str, tuning: str, *more: str, ranks: int = 1
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Plan a training of 4 sequences, and take two updates of it; bytes, of each process."""
    overrides = [
        "preset=paper", f"tuning={tuning}", "hardware.compile=false", "hardware.device=cpu",
        "hardware.threads=1", "trainer.batch_size=4", f"hardware.ranks={ranks}",
        f"store={store}", *more,
    ]  # fmt: skip

    def begun(folder: str, rank: int = 0) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", MEASURE, folder, json.dumps(SIZES[size]), *overrides],
            env=environment(RANK=str(rank), MEET=f"file://{tmp_path / 'meet'}"), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def said(process: subprocess.Popen[str]) -> dict[str, float]:
        out, problems = process.communicate(timeout=600)
        assert process.returncode == 0, problems
        found: dict[str, float] = json.loads(out.splitlines()[-1])
        return found

    planned = said(begun("plan"))
    processes = [begun(str(tmp_path / "trunk"), rank) for rank in range(ranks)]
    return planned, [said(process) for process in processes]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "tuning"),
    [*((size, "full") for size in SIZES), ("10M", "late_stage")],
)
def test_the_plan_is_within_15_percent_of_the_peak(
    tmp_path: Path, made: Path, size: str, tuning: str
) -> None:
    """Of the whole process, as the system counts it, after two updates of 4 x 256 tokens."""
    planned, [measured] = planned_and_measured(tmp_path, made, size, tuning)
    assert planned["peak"] == pytest.approx(measured["peak"], rel=0.15)


@pytest.mark.distributed
def test_the_plan_of_each_of_several_processes_is_within_15_percent_of_its_peak(
    tmp_path: Path, made: Path
) -> None:
    """And loading has read a process's shards, not the model.

    With the pages of its shards the system maps some of the file's that lie beside them. They are
    the system's to take away, and no plan's.
    """
    planned, measured = planned_and_measured(
        tmp_path, made, "135M", "full", "dataset.seq_len=64", ranks=4
    )
    for each in measured:
        assert planned["weights"] < each["loaded"] < 3 * planned["weights"]
        beside = each["loaded"] - planned["weights"]
        assert planned["peak"] == pytest.approx(each["peak"] - beside, rel=0.15)
