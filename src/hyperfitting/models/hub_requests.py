"""Requests to the Hub: whether it answers at all, further tries, and the bytes that arrive."""

import logging
from collections.abc import Callable
from functools import cache
from threading import Lock
from time import sleep
from typing import Any, TypeVar

from hyperfitting.errors import UserError
from hyperfitting.models.hub_errors import explain_errors

LOOKUP_TIMEOUT = 10.0
"""In seconds."""
_RETRY_WAITS = (1.0, 2.0, 4.0)
"""Seconds before each further try, unless the Hub names them (`Retry-After`)."""
_LONGEST_WAIT = 60.0
"""In seconds; if the Hub asks for more, the run ends with that message."""
_RETRIED = (408, 429, 500, 502, 503, 504)
"""HTTP statuses that may pass."""

log = logging.getLogger(__name__)
T = TypeVar("T")


@cache
def is_reachable() -> bool:
    """Return whether the Hub answers; asked once, so that a process waits once if it does not."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return False
    try:
        with explain_errors("model", "", None):
            get_session().head(constants.ENDPOINT, timeout=LOOKUP_TIMEOUT)
    except UserError:
        return False
    return True


def retrying(request: Callable[[], T]) -> T:
    """Return what a request returns; statuses that may pass are tried again."""
    from huggingface_hub.errors import HfHubHTTPError

    for wait in _RETRY_WAITS:
        try:
            return request()
        except HfHubHTTPError as error:
            asked = error.response.headers.get("Retry-After", "")
            seconds = float(asked) if asked.isdecimal() else wait
            status = error.response.status_code
            if status not in _RETRIED or seconds > _LONGEST_WAIT:
                raise
            log.warning("the Hub answers HTTP %d: trying again in %g s", status, seconds)
            sleep(seconds)
    return request()


def progress_bar(advance: Callable[[int], None]) -> Any:
    """Return a tqdm class that draws nothing, and reports the bytes that arrive.

    The client has a bar for the bytes received and one for those written: the further one counts.
    """
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined] # not in __all__

    lock, reported = Lock(), 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.is_bytes, self.done = kwargs.get("unit") == "B", 0
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call] # tqdm has no types

        def update(self, n: float | None = 1) -> None:
            nonlocal reported
            if self.is_bytes:
                with lock:
                    self.done += int(n or 0)
                    further, reported = self.done - reported, max(self.done, reported)
                if further > 0:
                    advance(further)

    return Bar
