"""What the tests share: composed configs, tiny models of all kinds, and finished runs.

Imports of torch and transformers are in the functions that need them: pytest's first process, which
runs no test, reads this file before it starts the workers.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings

from hyperfitting.config import RunConfig, conf_dir, from_hydra, register
from hyperfitting.store.artifact import Store
from tests.browser import browser  # noqa: F401 - a fixture
from tests.cli import hyperfit, kill_started

os.environ["OMP_NUM_THREADS"] = "1"  # a tiny model only loses by more threads
# a shell lets what it runs in the background ignore Ctrl+C, and all that it starts: not ours
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
if TYPE_CHECKING:
    from hyperfitting.models.base import BaseModel

Compose = Callable[..., RunConfig]
SWEEP = ("-m", "preset=debug", "seed=0,1", "tracking.mode=disabled")

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4},
    "gpt_neox": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
    "qwen2": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "opt": {
        "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
}  # fmt: skip


@pytest.fixture
def compose() -> Iterator[Compose]:
    """Compose and check a config, as the command line would."""
    register()

    def composed(*overrides: str) -> RunConfig:
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return from_hydra(hydra.compose("config", overrides=list(overrides)))

    yield composed
    GlobalHydra.instance().clear()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def tiny_model(folder: Path, model_type: str, **fields: Any) -> BaseModel:
    """Save a randomly initialized model whose greedy decoding does not repeat one token forever."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from hyperfitting.models.base import BaseModel
    from hyperfitting.models.random_init import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(model_type, **ARCHITECTURES[model_type] | tokens | fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return BaseModel.local(model_type, folder)


@pytest.fixture(scope="session", params=sorted(ARCHITECTURES))
def any_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """One tiny model of each architecture."""
    return tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(autouse=True)
def no_command_outlives_its_test() -> Iterator[None]:
    yield
    kill_started()


@pytest.fixture(autouse=True)
def no_test_changes_the_log_level() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    assert logging.getLogger().level == level


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that the workers end at about the same time."""
    several, slow = (
        {item.path for item in items if item.get_closest_marker(marker)}
        for marker in ("distributed", "slow")
    )
    commands = {item.path for item in items if "hyperfit" in vars(getattr(item, "module", item))}
    n_tests = Counter(item.path for item in items)
    items.sort(
        key=lambda item: (
            item.path not in several, item.path not in slow, item.path not in commands,
            -n_tests[item.path],
        )
    )  # fmt: skip


def pytest_collection_finish() -> None:
    """Leave what is imported out of all garbage collections, of which every training makes one."""
    gc.freeze()


def run_numbers(folder: Path) -> dict[str, Any]:
    """Everything in the record of a run that a repetition must reproduce: not times and places."""
    from hyperfitting.record.files import RECORD_FILE, read_record

    record = read_record(folder / RECORD_FILE)
    places = {"timings": True, "code": True, "machine": True, "artifacts": True}
    places |= {"model": {"location"}}
    return record.model_dump(exclude=places)


def sweep_numbers(folder: Path) -> dict[str, dict[str, Any]]:
    """The same of each run of a sweep; the config holds the place of the store."""
    return {
        path.parent.name: run_numbers(path.parent) | {"config": None}
        for path in sorted(folder.glob("*/results.json"))
    }


def only_sweep(folder: Path) -> Path:
    """The folder of the one sweep in a working folder."""
    (sweep,) = (folder / "outputs/sweeps").iterdir()
    return sweep


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which the debug run has ended, in `run`."""
    folder = tmp_path_factory.mktemp("debug")
    result = hyperfit(folder, "preset=debug", "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def debug_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which a sweep of the debug run over two seeds has ended."""
    folder = tmp_path_factory.mktemp("debug_sweep")
    result = hyperfit(folder, *SWEEP)
    assert result.returncode == 0, result.stderr
    return folder


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Have a folder that is a disk of this size; skips where nobody may mount one."""
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False
    ).returncode:
        pytest.skip("no permission to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
