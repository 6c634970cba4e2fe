"""The clients of the Hub in this process, led to a server of its own, and what is on it."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session

from hyperfitting.data.config import TextsConfig
from hyperfitting.data.sources import documents_step, load_documents
from hyperfitting.models import hub, hub_requests
from hyperfitting.models.base import BaseModel, base_model
from hyperfitting.models.config import ModelConfig
from hyperfitting.progress import Advance
from hyperfitting.store.artifact import Store
from tests.hub_server import HubServer, hub_server

MODEL, DATASET = "owner/model", "owner/texts"
INFO = "GET /api/models/owner/model$"
WEIGHTS = "GET /cdn/"
README = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: small/train-*
- config_name: large
  data_files:
  - split: train
    path: large/train-*
  - split: test
    path: ["large/test-*"]
---
"""


@contextmanager
def hub_of_this_process(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Run a Hub that the clients in this process use, with caches of their own in ``home``."""
    with hub_server() as server:
        use_hub(server.url, home, monkeypatch)
        yield server
    start_process()


def use_hub(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what HF_ENDPOINT and HF_HOME do; the clients read those when they are imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr("huggingface_hub.constants.AGENT_HARNESSES_PATH", str(home / "agents"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    start_process()


def start_process() -> None:
    """Forget what a process remembers of the Hub."""
    hub.resolve_commit.cache_clear()
    hub_requests.is_reachable.cache_clear()
    close_session()


def record_sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Do not wait before trying again; return the list of seconds that would have been."""
    seconds: list[float] = []
    monkeypatch.setattr(hub_requests, "sleep", seconds.append)
    return seconds


def push_model(server: HubServer, base: BaseModel, **changes: bytes | None) -> str:
    """Push a tiny model, with files changed or (None) left out; `_` in a name stands for `.`."""
    files: dict[str, Any] = {p.name: p.read_bytes() for p in base.folder().iterdir()}
    files |= {name.replace("__", "."): content for name, content in changes.items()}
    return server.push("models", MODEL, {k: v for k, v in files.items() if v is not None})


def model(store: Store, **fields: Any) -> BaseModel:
    return base_model(ModelConfig(**{"name": "m", "path": MODEL} | fields), store)


def parquet(texts: list[str | None], column: str = "text") -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), file)
    return file.getvalue()


def push_dataset(server: HubServer, **more: bytes) -> str:
    files: dict[str, bytes | str] = {
        "README.md": README,
        "small/train-0.parquet": parquet(["small a"]),
        "large/train-0.parquet": parquet(["large a", None, "large b"]),
        "large/test-0.parquet": parquet(["large c"]),
    }
    return server.push("datasets", DATASET, files | more)


def texts(store: Store, progress: Any = None, **fields: Any) -> list[str]:
    cfg = TextsConfig(**{"name": "t", "path": DATASET, "subset": "large"} | fields)
    step = documents_step(cfg, store, **({"progress": progress} if progress else {}))
    return load_documents(step.ensure()).texts


class Reported:
    """A progress reporter that keeps what is reported."""

    def __init__(self) -> None:
        self.tasks: dict[str, tuple[int, str]] = {}
        self.done: dict[str, int] = {}

    @contextmanager
    def __call__(self, task: str, total: int, unit: str) -> Iterator[Advance]:
        self.tasks[task], self.done[task] = (total, unit), 0

        def advance(n: int, **shown: float) -> None:
            self.done[task] += n

        yield advance
