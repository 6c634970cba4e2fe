"""The annotation page: one item at a time, each judgment saved before the next is shown.

    GET  /join/TOKEN     an annotator's link: keeps the token in a cookie, leads to the page
    GET  /a/PAGE/        the first item without a judgment
    POST /a/PAGE/judge   saves a judgment
    POST /a/PAGE/undo    supersedes the last one
    GET  /a/PAGE/pause   no item, so that no time passes

All addresses in pages are relative, so that a reverse proxy may serve them below any path. The
server keeps no state but the database: it can be killed and started again at any time.
"""

import logging
import math
import sqlite3
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import cast

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from hyperfitting import templates
from hyperfitting.preference.database import Database, ItemVersion, Outcome
from hyperfitting.preference.items import (
    ASPECT_CHOICES,
    ASPECT_LABELS,
    ASPECT_QUESTIONS,
    Aspect,
    Shown,
    Task,
)
from hyperfitting.preference.judgments import Answer, make_judgment
from hyperfitting.preference.security import (
    RateLimiter,
    SecurityHeaders,
    content_security_policy,
    is_signed,
    read_form,
    refuse_other_sites,
    sign,
)

log = logging.getLogger(__name__)
_PACKAGE = "hyperfitting.preference"
_COOKIE = "hyperfit_annotator"
_COOKIE_SECONDS = 90 * 24 * 3600
Fields = Mapping[str, str]
"""Of a form."""
_STALE = (
    "That page was out of date, for example because the item was answered in another tab. "
    "Its answer was not saved; this is where you are now."
)
_LINK = "Open the personal link that you were given."
_MESSAGES = {
    400: ("This form is not valid", "Nothing was saved. Go back and load the page again."),
    401: ("This page is not open in this browser", f"{_LINK} Everything you answered is saved."),
    403: ("This form is not valid here", "Nothing was saved. Go back and load the page again."),
    404: ("There is no such page", _LINK),
    405: ("There is no such page", _LINK),
    413: ("This form is too large", "Nothing was saved. Go back and load the page again."),
    429: ("Too many requests", "Wait a moment, then load the page again."),
    503: ("This could not be saved", "Wait a moment, then load the page again."),
}
"""Heading and text, by status."""


def create_app(task: Task, database: Database, is_https: bool = False) -> ASGIApp:
    """Return the web application of a study.

    Args:
        task: the study.
        database: where judgments are saved.
        is_https: annotators reach it over HTTPS, so that cookies are for that alone.
    """
    style = templates.source(_PACKAGE, "annotate.css")
    script = templates.source(_PACKAGE, "annotate.js")
    pages = _Pages(task, database, is_https, {"style": style, "script": script})
    app = Starlette(
        routes=[
            Route("/join/{token}", pages.join),
            Route("/a/{page}/", pages.item),
            Route("/a/{page}/pause", pages.pause),
            Route("/a/{page}/judge", pages.judge, methods=["POST"]),
            Route("/a/{page}/undo", pages.undo, methods=["POST"]),
        ],
        exception_handlers={HTTPException: pages.http_error, sqlite3.Error: pages.database_error},
    )
    app.router.redirect_slashes = False  # it would redirect to an absolute address
    policy = content_security_policy(templates.csp_hash(script), templates.csp_hash(style))
    return SecurityHeaders(app, policy)


class _Pages:
    """The endpoints. Those that are not async run in a thread, as everything in the database."""

    def __init__(
        self, task: Task, database: Database, is_https: bool, assets: dict[str, str]
    ) -> None:
        self._task, self._database, self._is_https = task, database, is_https
        self._assets = assets
        self._environment = templates.environment(_PACKAGE)
        self._annotators = RateLimiter(rate=10, burst=40)
        self._strangers = RateLimiter(rate=0.5, burst=20)

    # ---- endpoints

    def join(self, request: Request) -> Response:
        """Keep the token of a link in a cookie of the annotator's page alone.

        Two annotators can therefore work in one browser. (The cookie is `Lax`: a `Strict` one
        would not be sent after a click on the link in a web mail.)
        """
        token = request.path_params["token"]
        page = self._database.page_of(token)
        if page is None:
            self._strangers.check(_client(request))
            raise HTTPException(404)
        response = RedirectResponse(f"../a/{page}/", HTTPStatus.SEE_OTHER)
        response.set_cookie(
            _COOKIE,
            token,
            max_age=_COOKIE_SECONDS,
            path=f"{request.scope.get('root_path', '')}/a/{page}/",
            secure=self._is_https or request.url.scheme == "https",
            httponly=True,
            samesite="lax",
        )
        return response

    def item(self, request: Request) -> Response:
        """Show the first item without a judgment."""
        notice = _STALE if "stale" in request.query_params else ""
        return self._show(self._annotator(request), notice)

    def pause(self, request: Request) -> Response:
        """Show no item."""
        return self._show(self._annotator(request), is_paused=True)

    async def judge(self, request: Request) -> Response:
        """Save a judgment."""
        return await self._post(request, self._save)

    async def undo(self, request: Request) -> Response:
        """Undo the last judgment."""
        return await self._post(request, self._undo)

    async def _post(self, request: Request, change: Callable[[str, Fields], Outcome]) -> Response:
        """Answer when a change is saved: with the way to the next item, or that it is stale."""
        refuse_other_sites(request)
        fields = await read_form(request)

        def respond() -> Response:
            annotator = self._annotator(request)
            if change(annotator, fields) == "stale":
                return self._show(annotator, _STALE, status=HTTPStatus.CONFLICT)
            return RedirectResponse("./", HTTPStatus.SEE_OTHER)

        return await run_in_threadpool(respond)

    # ---- who, and what they may change

    def _annotator(self, request: Request) -> str:
        """Return whose page it is.

        Raises:
            HTTPException: 401, it is not this browser's; 429, too many requests.
        """
        token = request.cookies.get(_COOKIE, "")
        annotator = self._database.annotator_of(request.path_params["page"], token)
        if annotator is None:
            self._strangers.check(_client(request))
            raise HTTPException(401)
        self._annotators.check(annotator)
        return annotator

    def _save(self, annotator: str, fields: Fields) -> Outcome:
        shown, server_seconds = self._verify(annotator, "judge", fields)
        item = self._task.item(shown.item)
        question = self._task.question
        choice = fields.get("choice")
        aspects = {aspect: fields[aspect] for aspect in question.aspects if fields.get(aspect)}
        if item is None or choice not in question.choices:
            raise HTTPException(400)
        if not set(aspects.values()) <= set(ASPECT_CHOICES):
            raise HTTPException(400)
        answer = Answer(
            shown=choice,
            aspects=cast(dict[Aspect, Shown], aspects),
            seconds=_visible_seconds(fields.get("seconds", ""), server_seconds),
        )
        judgment = make_judgment(self._task, item, annotator, answer, "page")
        return self._database.save(judgment, shown.version, fields["signature"], server_seconds)

    def _undo(self, annotator: str, fields: Fields) -> Outcome:
        shown, _ = self._verify(annotator, "undo", fields)
        return self._database.undo(annotator, shown)

    def _signed(self, annotator: str, action: str, shown: ItemVersion) -> dict[str, str]:
        """Return the hidden fields of a form: what it is about, when it was sent, a signature."""
        fields = {
            "item": shown.item,
            "version": str(shown.version),
            "sent": str(time.time_ns() // 1_000_000),
        }
        signature = sign(self._database.key, annotator, action, *fields.values())
        return fields | {"signature": signature}

    def _verify(self, annotator: str, action: str, fields: Fields) -> tuple[ItemVersion, float]:
        """Return what a form is about, and the seconds since its page was sent.

        Raises:
            HTTPException: 403, this server did not make this form for this annotator.
        """
        item, version, sent, signature = (
            fields.get(name, "") for name in ("item", "version", "sent", "signature")
        )
        if not is_signed(self._database.key, signature, annotator, action, item, version, sent):
            raise HTTPException(403)
        return ItemVersion(item, int(version)), max(time.time() - int(sent) / 1000, 0.0)

    # ---- what is shown

    def _show(
        self, annotator: str, notice: str = "", is_paused: bool = False, status: int = 200
    ) -> Response:
        state = self._database.state(annotator)
        items = self._task.items_of(annotator)
        question = self._task.question
        context: dict[str, object] = {
            "heading": "Paused" if is_paused else "Finished",
            "judged": len(state.judged),
            "total": len(items),
            "notice": notice,
            "paused": is_paused,
            "undo": state.undoable and self._signed(annotator, "undo", state.undoable),
            "item": None,
        }
        item = next((item for item in items if item.id not in state.judged), None)
        if item and not is_paused:
            context |= {
                "heading": f"Item {items.index(item) + 1} of {len(items)}",
                "item": item.shown(self._task.left(annotator, item)),
                "judge": self._signed(annotator, "judge", state.version_of(item.id)),
                "guidelines": question.guidelines,
                "wording": question.wording,
                "choices": question.choices,
                "aspects": {aspect: ASPECT_QUESTIONS[aspect] for aspect in question.aspects},
                "aspect_choices": {choice: ASPECT_LABELS[choice] for choice in ASPECT_CHOICES},
            }
        return self._render("annotate.html", context, status)

    def http_error(self, _: Request, error: Exception) -> Response:
        """Show what is wrong with a request."""
        http_error = cast(HTTPException, error)  # the only kind it is registered for
        heading, text = _MESSAGES.get(http_error.status_code, (http_error.detail, ""))
        context = {"heading": heading, "text": text}
        response = self._render("message.html", context, http_error.status_code)
        response.headers.update(http_error.headers or {})
        return response

    def database_error(self, _: Request, error: Exception) -> Response:
        """Show that nothing was saved; the page's script tries again."""
        log.error("the database cannot be used: %s", error)
        return self.http_error(_, HTTPException(503, headers={"Retry-After": "1"}))

    def _render(self, template: str, context: Mapping[str, object], status: int) -> Response:
        html = self._environment.get_template(template).render({**self._assets, **context})
        # a lone surrogate, which JSON can have, is not text
        return Response(html.encode("utf-8", "replace"), status, media_type="text/html")


def _client(request: Request) -> str:
    """Return the address of a client without a page; that behind a proxy which is trusted."""
    return request.client.host if request.client else ""


def _visible_seconds(text: str, server_seconds: float) -> float:
    """Return the seconds that an item was visible; without a script those since it was sent.

    Raises:
        HTTPException: 400, it is no such number.
    """
    if not text:
        return server_seconds
    try:
        seconds = float(text)
    except ValueError as error:
        raise HTTPException(400) from error
    if not (math.isfinite(seconds) and seconds >= 0):
        raise HTTPException(400)
    return seconds
