"""What protects the annotation page: escaping, headers, signed forms, limits and links."""

import base64
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hyperfitting.preference.database import DATABASE_FILE
from tests.annotation_app import Served, serving_studies
from tests.preference_study import Parsed, ScriptedAnnotator, make_study, shown_texts

HOSTILE = (
    "</script></p><script>window.evil = 1</script><img src=x onerror=alert(1)> {{ 7 * 7 }} & \"' "
)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    with serving_studies(tmp_path) as start:
        yield start


def test_hostile_texts_are_escaped_everywhere(serve: Callable[..., Served]) -> None:
    annotator = serve(make_study(words=HOSTILE, aspects=("fluency",))).annotator()
    page = Parsed(annotator.html)
    assert all(HOSTILE in text for text in shown_texts(annotator.html))
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not any(name.startswith("on") or name in ("src", "style") for name, _ in page.attributes)
    assert {value for name, value in page.attributes if name == "href"} <= {"data:,", "pause", "./"}


def test_a_lone_surrogate_in_a_text_is_shown_as_a_question_mark(
    serve: Callable[..., Served],
) -> None:
    assert "?Once" in shown_texts(serve(make_study(words="\ud800")).annotator().html)[0]


def test_every_response_has_the_security_headers(serve: Callable[..., Served]) -> None:
    served = serve()
    annotator = served.annotator()
    client = annotator.client
    path = annotator.page
    page = Parsed(client.get(path).text)
    hashes = {
        kind: "sha256-" + base64.b64encode(hashlib.sha256("".join(code).encode()).digest()).decode()
        for kind, code in page.code.items()
    }
    policy = (
        f"default-src 'none'; script-src '{hashes['script']}'; style-src '{hashes['style']}'; "
        "img-src data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )
    join = f"/join/{served.tokens['bob']}"
    responses = {
        200: client.get(path),
        303: client.get(join, follow_redirects=False),
        401: client.get("/a/0123456789ab/"),
        403: client.post(path + "judge", data={"choice": "left"}),
        404: client.get("/"),
        405: client.get(path + "judge"),
        409: (annotator.send("judge", choice="left"), annotator.send("judge", choice="right"))[1],
        413: client.post(path + "judge", content=b"x" * 10_000),
    }
    served.database.close()
    responses[503] = client.get(path)
    for status, response in responses.items():
        assert response.status_code == status
        assert response.headers["content-security-policy"] == policy
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["x-frame-options"] == "DENY"


def test_there_is_no_other_page_and_no_directory(serve: Callable[..., Served]) -> None:
    client = serve().annotator().client
    paths = ("/", "/a/", "/join/", "/static/", "/a/../annotations.sqlite", "/assets/annotate.js")
    for path in (*paths, "/docs", "/openapi.json", "/join/x/../../"):
        assert client.get(path).status_code == 404


def test_a_form_that_the_server_did_not_make_for_this_annotator_is_refused(
    serve: Callable[..., Served],
) -> None:
    served = serve()
    alice, bob = served.annotator("alice"), served.annotator("bob")
    theirs = bob.fields("judge")
    other_version = alice.fields("judge") | {"version": "1"}
    other_item = alice.fields("judge") | {"item": served.task.items[3].id}
    for fields in ({}, theirs, other_version, other_item, {"signature": "é"}):
        response = alice.client.post(alice.page + "judge", data={**fields, "choice": "left"})
        assert response.status_code == 403
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 303)):
        alice.client.headers["sec-fetch-site"] = site
        assert alice.send("judge", choice="left").status_code == status
    for fields in (
        {"choice": "best"},
        {},
    ):  # the latter is Enter in a radio group, without a script
        assert alice.send("judge", **fields).status_code == 400
    assert alice.client.post(bob.page + "judge", data=theirs).status_code == 401
    assert [row[:1] for row in served.rows()] == [("alice",)]


def test_two_annotators_work_in_one_browser(serve: Callable[..., Served]) -> None:
    served = serve()
    browser = served.client()
    alice, bob = (
        ScriptedAnnotator(browser, f"/join/{served.tokens[name]}") for name in ("alice", "bob")
    )
    alice.judge("left")
    bob.judge("right")
    assert [(row[0], row[3]) for row in served.rows()] == [("alice", "left"), ("bob", "right")]


def test_forms_that_are_too_large_or_malformed_are_refused(serve: Callable[..., Served]) -> None:
    served = serve()
    annotator = served.annotator()
    url = annotator.page + "judge"

    def chunks() -> Iterator[bytes]:  # without a Content-Length
        yield from [b"choice=" + b"x" * 1000] * 5

    assert annotator.client.post(url, content=chunks()).status_code == 413
    assert annotator.send("judge", choice="left" * 2000).status_code == 413
    bad = [
        "&".join(f"a{i}=1" for i in range(30)),
        "choice=left&choice=right",
        "a",
        "a=\udcff",
        "é=1",
    ]
    for body in bad:
        content = body.encode("utf-8", "surrogateescape")
        assert annotator.client.post(url, content=content).status_code == 400
    assert served.rows() == []


def test_a_client_that_asks_too_often_is_told_to_wait(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    alice, bob = served.annotator("alice"), served.annotator("bob")
    now = time.monotonic()
    monkeypatch.setattr("hyperfitting.preference.security.monotonic", lambda: now)
    while (response := alice.load()).status_code == 200:
        pass
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert bob.load().status_code == 200
    now += 1  # second
    assert [alice.load().status_code for _ in range(11)] == [200] * 10 + [429]
    guesses = [bob.client.get(f"/join/{i}").status_code for i in range(21)]
    assert guesses == [404] * 20 + [429]


def test_links_are_kept_as_hashes_alone_and_can_be_replaced(serve: Callable[..., Served]) -> None:
    served = serve()
    annotator = served.annotator()
    annotator.judge("left")
    token = served.tokens["alice"]
    files = list(served.folder.glob(f"{DATABASE_FILE}*"))
    assert len(files) == 3  # with the write-ahead log
    for file in files:
        assert token.encode() not in file.read_bytes()
        assert file.stat().st_mode & 0o077 == 0
    assert served.database.issue_tokens(["alice"]) == {}
    served.tokens |= served.database.issue_tokens([], renew=["alice"])
    assert annotator.load().status_code == 401
    assert served.client().get(f"/join/{token}").status_code == 404
    assert "1 of 6" in served.annotator().html


@pytest.mark.parametrize("is_https", [False, True])
def test_behind_a_proxy_with_a_path_links_and_cookies_have_it(
    serve: Callable[..., Served], is_https: bool
) -> None:
    served = serve(is_https=is_https)
    scheme = "https" if is_https else "http"
    client = served.client(root_path="/study", base_url=f"{scheme}://lab.example")
    annotator = ScriptedAnnotator(client, f"/study/join/{served.tokens['alice']}")
    assert annotator.page.startswith(f"{scheme}://lab.example/study/a/")
    (cookie,) = client.cookies.jar
    assert f"lab.example{cookie.path}" == annotator.page.split("//")[1]
    assert cookie.secure == is_https
    assert "HttpOnly" in cookie._rest
    response = annotator.judge("left")
    assert response.headers["location"] == "./"
    assert "1 of 6" in annotator.html
