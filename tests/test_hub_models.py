"""Models of the Hub: commits, downloads and what is refused, with the real client."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel, base_model
from hyperfitting.models.config import ModelConfig
from hyperfitting.models.loading import load
from hyperfitting.store.artifact import Store
from tests.hub_client import (
    MODEL,
    WEIGHTS,
    Reported,
    hub_of_this_process,
    model,
    push_model,
    record_sleeps,
    start_process,
    texts,
)
from tests.hub_server import HubServer


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_of_this_process(tmp_path / "hf", monkeypatch) as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    return record_sleeps(monkeypatch)


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
