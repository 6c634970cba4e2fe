"""The Hub, over loopback: the real clients against a server that speaks its protocol."""

import io
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import close_session

from hyperfitting.data.config import TextsConfig
from hyperfitting.data.sources import documents_step, load_documents
from hyperfitting.errors import UserError
from hyperfitting.models import hub, hub_requests
from hyperfitting.models.base import BaseModel, base_model
from hyperfitting.models.config import ModelConfig
from hyperfitting.models.loading import load
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


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub; it is the one that the clients in this process use, with caches of their own."""
    with hub_server() as server:
        use_hub(server.url, tmp_path / "hf", monkeypatch)
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


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Do not wait before trying again; holds the seconds that would have been."""
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
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


def test_a_model_is_downloaded_once_with_its_progress(
    server: HubServer, base: BaseModel, store: Store
) -> None:
    commit = push_model(server, base, pytorch_model__bin=b"never fetched")
    progress = Reported()
    remote = base_model(ModelConfig(name="m", path=MODEL), store, progress)
    assert remote.id == f"{MODEL}@{commit}:float32"
    assert remote.location == f"{MODEL}@{commit}"
    assert remote.shape() == base.shape()
    assert server.seen(WEIGHTS) == 0, "the config needs no weights"
    remote.ensure()
    expected = load(base).state_dict()
    assert all(torch.equal(t, expected[key]) for key, t in load(remote).state_dict().items())
    assert remote.tokenizer().get_vocab() == base.tokenizer().get_vocab()
    (total, unit), done = progress.tasks[f"downloading {MODEL}"], progress.done
    assert (done[f"downloading {MODEL}"], unit) == (total, "bytes")
    assert total > (base.folder() / "model.safetensors").stat().st_size
    assert server.seen("pytorch_model") == 0
    n_requests = len(server.requests)
    remote.ensure()
    assert len(server.requests) == n_requests


@pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "dead"])
def test_without_network_the_last_commit_is_used(
    server: HubServer,
    base: BaseModel,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    waits: list[float],
    offline: bool,
) -> None:
    commit = push_model(server, base)
    push_dataset(server)
    model(store).ensure()
    online = texts(store)
    start_process()
    if offline:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        server.stop()
    n_requests = len(server.requests)
    with caplog.at_level(logging.WARNING):
        remote = model(store)
        remote.ensure()
        remote.tokenizer()
        assert remote.id == f"{MODEL}@{commit}:float32"
        assert texts(store) == online  # the artifact is there
        assert texts(Store(store.folder / "new")) == online  # the download is
    assert len(server.requests) == n_requests
    assert waits == []
    warned = [r for r in caplog.records if r.levelno >= logging.WARNING]
    messages = [record.getMessage() for record in warned]
    assert len(messages) == 2, messages
    assert f"using commit {commit}, which main was on 20" in messages[0]
    assert "cannot be reached" in messages[0]


def test_without_network_an_incomplete_download_says_what_it_lacks(
    server: HubServer, base: BaseModel, store: Store, waits: list[float]
) -> None:
    push_model(server, base)
    model(store).shape()
    start_process()
    server.stop()
    with pytest.raises(UserError, match=r"(?s)model\.path=owner/model.*lacks .*model\.safetensors"):
        model(store).ensure()
    with pytest.raises(UserError, match=r"127\.0\.0\.1 \(HF_ENDPOINT\) cannot be reached.*earlier"):
        model(store, path="owner/other")
    assert waits == []


def test_a_silent_hub_is_waited_for_once(
    server: HubServer, base: BaseModel, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_model(server, base)
    push_dataset(server)
    model(store).ensure()
    texts(store)
    start_process()
    monkeypatch.setattr(hub_requests, "LOOKUP_TIMEOUT", 0.2)
    server.is_silent = True
    start = time.monotonic()
    model(store).ensure()
    assert time.monotonic() - start >= 0.2
    assert texts(Store(store.folder / "new")) == ["large a", "large b"]
    assert hub_requests.is_reachable.cache_info().misses == 1


def test_config_tokenizer_and_weights_are_of_one_commit(
    server: HubServer, base: BaseModel, store: Store
) -> None:
    first = push_model(server, base)
    remote = model(store)
    remote.shape()
    second = push_model(server, base, config__json=b"{}", tokenizer__json=b"{}")
    remote.ensure()
    assert remote.folder().name == first
    assert load(remote) is not None
    assert model(store).id == remote.id, "main is asked for once in a process"
    start_process()
    assert model(store).location == f"{MODEL}@{second}"


def test_a_branch_tag_or_commit_can_be_given(
    server: HubServer, base: BaseModel, store: Store
) -> None:
    first = push_model(server, base)
    server.repositories[f"models/{MODEL}"].refs["refs/pr/1"] = first
    second = push_model(server, base, config__json=b"{}")
    assert model(store).location.endswith(second)
    assert model(store, revision="refs/pr/1").location.endswith(first)
    model(store, revision=first).ensure()
    with pytest.raises(UserError, match=r"(?s)model\.revision=v9.*no such branch.*null"):
        model(store, revision="v9")
    with pytest.raises(UserError, match=r"(?s)model\.revision=0{40}.*no such branch"):
        model(store, revision="0" * 40).ensure()
    with pytest.raises(UserError, match=r"model\.revision=\.\./\.\./x: is not a revision"):
        model(store, revision="../../x")


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (401, {}, "needs a login .HTTP 401.*hf auth login"),
        (403, {}, "access is denied .HTTP 403.*settings/tokens"),
        (403, {"X-Error-Code": "GatedRepo"}, "is gated.*https://huggingface.co/owner/model"),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, "is disabled"),
        (404, {}, "no such model.*check the spelling"),
        (404, {"X-Error-Code": "RepoNotFound"}, "no such model"),
        (418, {}, "refuses the request .HTTP 418"),
        (429, {"Retry-After": "3"}, "limits the number of requests .HTTP 429.*hf auth login"),
        (500, {}, "fails .HTTP 500.*status.huggingface.co"),
        (503, {}, "fails .HTTP 503"),
    ],
)
def test_an_error_of_the_hub_is_one_message_or_the_last_commit(
    server: HubServer,
    base: BaseModel,
    store: Store,
    waits: list[float],
    caplog: pytest.LogCaptureFixture,
    status: int,
    headers: dict[str, str],
    message: str,
) -> None:
    server.fail("/api/models/", status, headers=headers)
    with pytest.raises(UserError, match=f"(?s)^model.path=owner/model: .*{message}"):
        model(store)
    expected = {429: [3.0, 3.0, 3.0], 500: [1.0, 2.0, 4.0], 503: [1.0, 2.0, 4.0]}.get(status, [])
    assert waits == expected
    server.faults.clear()
    commit = push_model(server, base)
    model(store).ensure()
    start_process()
    server.fail("/api/models/", status, headers=headers)
    with caplog.at_level(logging.WARNING):
        remote = model(store)
        remote.ensure()
    assert remote.location.endswith(commit)
    assert f"using commit {commit}" in caplog.text


def test_a_passing_error_is_waited_out(
    server: HubServer, base: BaseModel, store: Store, waits: list[float]
) -> None:
    push_model(server, base)
    server.fail(INFO, 429, headers={"Retry-After": "7"}, times=1)
    server.fail(INFO, 503, times=1)
    server.fail("tree", 502, times=1)
    server.fail(WEIGHTS, 503, times=1)
    model(store).ensure()
    assert waits[:2] == [7.0, 2.0]


def test_a_hub_that_asks_for_hours_is_not_waited_for(
    server: HubServer, base: BaseModel, store: Store, waits: list[float]
) -> None:
    push_model(server, base)
    server.fail(INFO, 429, headers={"Retry-After": "7200"})
    with pytest.raises(UserError, match="HTTP 429"):
        model(store)
    assert waits == []


@pytest.mark.parametrize(
    "body", [b"<html>log in to the network</html>", b'{"id": "x"}', b'{"sha": "../../x"}', b"[]"]
)
def test_an_answer_that_is_no_hubs_is_a_message(
    server: HubServer, store: Store, body: bytes
) -> None:
    server.fail("/api/models/", 200, body=body)
    with pytest.raises(UserError, match=r"(?s)^model\.path=owner/model: .*web page.*HF_ENDPOINT"):
        model(store)


def test_a_page_in_place_of_the_file_list_is_a_message(
    server: HubServer, base: BaseModel, store: Store
) -> None:
    push_model(server, base)
    server.fail("/tree/", 200, body=b"<html>")
    with pytest.raises(UserError, match="web page"):
        model(store).ensure()


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("https://huggingface.co/openai-community/gpt2", "model.path=openai-community/gpt2"),
        ("https://huggingface.co/owner/name/tree/main", "model.path=owner/name"),
        ("my model", "model=local model.path=DIR"),
        ("../../etc", "model=local model.path=DIR"),
        ("a/../b", "model=local"),
    ],
)
def test_what_is_no_id_of_a_repository_is_refused(
    server: HubServer, store: Store, path: str, hint: str
) -> None:
    with pytest.raises(UserError) as raised:
        model(store, path=path)
    assert f"model.path={path}: is not the id" in str(raised.value)
    assert hint in str(raised.value)
    with pytest.raises(UserError, match=r"dataset\.path=.*is not the id"):
        texts(store, path=path)
    assert server.requests == []


@pytest.mark.parametrize("token", ["hf_secret0123", "hf_sécret0123"])
def test_a_token_is_in_no_message_and_goes_to_no_other_host(
    server: HubServer,
    base: BaseModel,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    token: str,
) -> None:
    import traceback

    monkeypatch.setenv("HF_TOKEN", token)
    push_model(server, base)
    with caplog.at_level(logging.DEBUG, "hyperfitting"):
        if token.isascii():
            model(store).ensure()
            sent = {line: headers.get("authorization") for line, headers in server.requests}
            assert sent[f"GET /api/models/{MODEL}"] == f"Bearer {token}"
            assert {a for line, a in sent.items() if "/cdn/" in line} == {None}
            server.fail("/api/", 401)
        with pytest.raises(UserError, match="token") as raised:
            model(store, revision="other")
    assert "0123" not in "".join(traceback.format_exception(raised.value))
    assert "0123" not in caplog.text


def test_a_dropped_connection_resumes_in_the_middle_of_the_file(
    server: HubServer,
    base: BaseModel,
    store: Store,
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    push_model(server, base)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # 10 MB
    server.fail(WEIGHTS, send_bytes=1000, times=1)
    remote = model(store)
    remote.ensure()
    ranges = [h.get("range") for line, h in server.requests if line.startswith(WEIGHTS)]
    assert ranges == [None, "bytes=1000-"]
    expected = (base.folder() / "model.safetensors").read_bytes()
    assert (remote.folder() / "model.safetensors").read_bytes() == expected


def test_a_file_of_the_wrong_size_or_hash_is_refused_and_downloaded_anew(
    server: HubServer, base: BaseModel, store: Store, waits: list[float]
) -> None:
    push_model(server, base)
    weights = (base.folder() / "model.safetensors").read_bytes()
    server.fail(WEIGHTS, body=weights[:-10], times=1)
    with pytest.raises(UserError, match=r"(?s)model\.path=owner/model: .*damaged.*run again"):
        model(store).ensure()
    server.fail(WEIGHTS, body=weights[:-10] + b"0123456789", times=1)
    with pytest.raises(UserError, match=r"damaged: the sha256 of model\.safetensors"):
        model(store).ensure()
    remote = model(store)
    remote.ensure()
    assert (remote.folder() / "model.safetensors").read_bytes() == weights
    push_model(server, base, config__json=b"{}")
    server.fail("GET .*config.json", body=b"[]")
    start_process()
    with pytest.raises(UserError, match=r"damaged: the git-sha1 of config\.json"):
        model(store).shape()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__safetensors": None, "pytorch_model__bin": b"\x80\x04K*."},
            r"its weights are pickles \(pytorch_model\.bin\).*refs/pr/N",
        ),
        ({"model__safetensors": None}, "it holds no weights"),
        ({"config__json": None}, r"it holds no config\.json"),
        ({"../../evil__json": b"{}"}, r"a file named '\.\./\.\./evil\.json'"),
        ({"/etc/evil__json": b"{}"}, "a file named '/etc/evil"),
    ],
)
def test_a_repository_that_cannot_be_used_is_refused_before_its_download(
    server: HubServer,
    base: BaseModel,
    store: Store,
    changes: dict[str, bytes | None],
    message: str,
) -> None:
    push_model(server, base, **changes)
    with pytest.raises(UserError, match=f"(?s)^model.path=owner/model: .*{message}"):
        remote = model(store)
        remote.shape()
        remote.ensure()
    assert server.seen("/cdn/") == 0


def test_a_cache_that_cannot_be_written_to_is_named(
    server: HubServer, base: BaseModel, store: Store, tmp_path: Path
) -> None:
    push_model(server, base)
    (tmp_path / "hf").write_text("a file")
    with pytest.raises(UserError, match=r"HF_HOME=.*is not a folder"):
        model(store).ensure()


def test_only_the_files_of_the_subset_are_downloaded(server: HubServer, store: Store) -> None:
    commit = push_dataset(server)
    progress = Reported()
    assert texts(store, progress) == ["large a", "large b"]
    assert texts(store, split="test") == ["large c"]
    assert texts(store, split="train[:1]") == ["large a"]
    assert server.seen("small/train") == 0
    assert f"downloading {DATASET}" in progress.tasks
    cfg = TextsConfig(name="t", path=DATASET, subset="large")
    recipe = documents_step(cfg, store).artifact.recipe
    assert recipe["inputs"] == {"source": f"{DATASET}@{commit}"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"subset": "lrage"}, r"dataset\.subset=lrage.*small, large.*did you mean large"),
        ({"subset": None}, "dataset.subset=None: it has several subsets.*small, large"),
        ({"split": "valid"}, "dataset.path=owner/texts.*valid.*dataset.split"),
        ({"text_field": "body"}, "dataset.text_field=body.*text"),
        ({"path": "owner/other"}, "dataset.path=owner/other.*no such dataset.*dataset=files"),
    ],
)
def test_wrong_fields_of_a_dataset_are_named(
    server: HubServer, store: Store, fields: dict[str, Any], message: str
) -> None:
    push_dataset(server)
    with pytest.raises(UserError, match=f"(?s){message}"):
        texts(store, **fields)


def test_a_dataset_without_a_readme_is_read_by_its_file_names(
    server: HubServer, store: Store
) -> None:
    rows = '{"text": "a"}\n{"text": "b"}\n'
    server.push("datasets", DATASET, {"train.jsonl": rows, "test.jsonl": '{"text": "c"}\n'})
    assert texts(store, subset=None) == ["a", "b"]
    assert texts(store, subset=None, split="test") == ["c"]
    with pytest.raises(UserError, match=r"dataset\.subset=x.*no such subset"):
        texts(store, subset="x")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"texts.py": b"print()", "train.csv": b"text\na\n"}, "is a dataset script .texts.py"),
        ({"picture.png": b""}, "no data file in it"),
        ({"../train.csv": b"text\na\n"}, "a file named '../train.csv'"),
        ({"train.parquet": b"no table"}, "cannot load it: Parquet"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_refused(
    server: HubServer, store: Store, files: dict[str, bytes], message: str
) -> None:
    server.push("datasets", DATASET, files)
    with pytest.raises(UserError, match=f"(?s)dataset.path=owner/texts.*{message}"):
        texts(store, subset=None)


@pytest.mark.parametrize(
    "pattern", ["../secret.csv", "{root}/secret.csv", "http://127.0.0.1/x.csv"]
)
def test_a_readme_leads_to_no_file_outside_of_the_repository(
    server: HubServer, store: Store, tmp_path: Path, pattern: str
) -> None:
    (tmp_path / "secret.csv").write_text("text\nsecret\n")
    path = pattern.format(root=tmp_path)
    readme = f"---\nconfigs:\n- config_name: a\n  data_files: {path}\n---\n"
    server.push("datasets", DATASET, {"README.md": readme, "train.csv": "text\na\n"})
    with pytest.raises(UserError, match="no data file of subset a"):
        texts(store, subset="a")


def test_a_folder_of_that_name_is_not_taken_for_the_dataset(
    server: HubServer, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_dataset(server)
    monkeypatch.chdir(tmp_path)
    (tmp_path / DATASET).mkdir(parents=True)
    (tmp_path / DATASET / "train.csv").write_text("text\nnot this\n")
    assert texts(store) == ["large a", "large b"]
