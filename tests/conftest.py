"""What the tests share: composed configs, tiny models of all kinds, and the real CLI."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings

from hyperfitting.config import RunConfig, conf_dir, from_hydra, register
from hyperfitting.models.base import BaseModel
from hyperfitting.models.random_init import byte_tokenizer
from hyperfitting.store import Store

torch.set_num_threads(1)  # a tiny model only loses by more
# a shell lets what it runs in the background ignore Ctrl+C, and all that it starts: not ours
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
Compose = Callable[..., RunConfig]

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
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(
        model_type,
        **ARCHITECTURES[model_type],
        **{"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None} | fields,
    )
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


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "hyperfitting.run", *arguments]


def environment(**more: str) -> dict[str, str]:
    """A user's environment without W&B login or Hub token, single-threaded."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "HF_", "HYDRA"))}
    home = more.pop("home", None)
    return kept | ({"HOME": home} if home else {}) | {"OMP_NUM_THREADS": "1"} | more


def hyperfit(
    cwd: Path, *arguments: str, timeout: float = 300, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the real command line in a folder."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def below(folder: Path, pattern: str = "*") -> list[Path]:
    """All below a folder in which another process works, whose end matches a pattern.

    (`Path.glob` raises if a folder is renamed while it looks inside.)
    """
    found = [Path(at, name) for at, dirs, files in os.walk(folder) for name in dirs + files]
    return [path for path in found if path.match(pattern)]


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
