"""A Hub that is offline, silent, or answers with errors, with the real client."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hyperfitting.errors import UserError
from hyperfitting.models import hub_requests
from hyperfitting.models.base import BaseModel
from hyperfitting.store.artifact import Store
from tests.hub_client import (
    INFO,
    MODEL,
    WEIGHTS,
    hub_of_this_process,
    model,
    push_dataset,
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
    n_connections, start = len(server.connections), time.monotonic()
    model(store).ensure()
    assert time.monotonic() - start >= 0.2
    assert texts(Store(store.folder / "new")) == ["large a", "large b"]
    assert len(server.connections) == n_connections + 1


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
