"""What the Hub's client raises, as messages that name the field and the remedy."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from hyperfitting.errors import UserError, exhausted_resource
from hyperfitting.formatting import first_line
from hyperfitting.runtime.files import folder_error

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

RepoType = Literal["model", "dataset"]
_BAD_REVISION = re.compile(r"[\x00-\x20~^:?*\[\\\x7f]|\.\.|^/|/$|^$")
"""Not a git ref; `..` and a leading `/` would also leave the cache's folder."""


@contextmanager
def explain_errors(
    repo_type: RepoType, repo: str, revision: str | None, upload_field: str = ""
) -> Iterator[None]:
    """Turn the exceptions of requests to the Hub into messages for the user.

    Args:
        repo_type: of the repository.
        repo: its id.
        revision: that is downloaded; none: the newest.
        upload_field: the option that names the repository of an upload; empty: it is a download.

    Raises:
        UserError: in place of the error. It never holds the login token.
    """
    try:
        yield
    except UserError:
        raise
    except UnicodeEncodeError:  # it holds the header that cannot be sent
        raise UserError(
            "the login token holds characters that no token has",
            field=upload_field or f"{repo_type}.path",
            value=repo,
            hint="set HF_TOKEN to a new token, or log in with `hf auth login`",
        ) from None
    except Exception as error:
        explained = _explain(error, repo_type, repo, revision, upload_field)
        if explained is None:
            raise
        raise explained from error


def check_name(repo_type: RepoType, repo: str, upload_field: str = "") -> None:
    """Refuse what cannot be the id of a repository, such as a URL or a path.

    Args:
        repo_type: of the repository.
        repo: its id.
        upload_field: see `explain_errors`.

    Raises:
        UserError: it cannot be.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # not in __all__

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        field = upload_field or f"{repo_type}.path"
        hint = "" if upload_field else f"for a folder of yours: {_local_option(repo_type)}"
        from_url = re.fullmatch(
            r"(?:https?://)?[^/]*huggingface\.co/(?:datasets/)?([\w.-]+/[\w.-]+)(?:/.*)?", repo
        )
        if from_url:
            hint = f"{field}={from_url[1]}"
        raise UserError(
            "is not the id of a repository on the Hub",
            field=field,
            value=repo,
            valid="OWNER/NAME of letters, digits, `-`, `_` and `.`, such as openai-community/gpt2",
            hint=hint,
        ) from error


def check_revision(repo_type: RepoType, revision: str | None) -> None:
    """Refuse what cannot be a revision.

    Raises:
        UserError: it cannot be.
    """
    if revision is not None and _BAD_REVISION.search(revision):
        raise UserError(
            "is not a revision",
            field=f"{repo_type}.revision",
            value=revision,
            valid="a branch, tag or commit; null for the newest",
        )


def unreachable(repo_type: RepoType, repo: str, missing: str = "") -> UserError:
    """Return the error that the Hub does not answer and the cache does not suffice.

    Args:
        repo_type: of the repository.
        repo: its id.
        missing: what the cache lacks; empty: it has nothing of it.
    """
    from huggingface_hub.constants import is_offline_mode

    offline_options = (
        "the embedded model needs no network: model=smollm2_135m; a folder: "
        if repo_type == "model"
        else "the embedded texts need no network: dataset=news_sample; your own: "
    ) + _local_option(repo_type)
    cached = f"lacks {missing}" if missing else "has no earlier download of it"
    connect = "unset HF_HUB_OFFLINE" if is_offline_mode() else "connect"
    return UserError(
        f"{_hub()} cannot be reached, and this machine {cached}",
        field=f"{repo_type}.path",
        value=repo,
        hint=f"{connect}, or download it elsewhere and copy the cache (HF_HOME); {offline_options}",
    )


def damaged(repo_type: RepoType, repo: str, problem: str) -> UserError:
    """Return the error that a download is not what the Hub lists."""
    return UserError(
        f"a downloaded file is damaged: {problem}",
        field=f"{repo_type}.path",
        value=repo,
        hint="run again: it is downloaded again; if that repeats, a proxy or mirror on the way "
        "changes files",
    )


def _hub() -> str:
    from huggingface_hub import constants

    if constants.ENDPOINT == "https://huggingface.co":
        return "the Hugging Face Hub"
    return f"the Hugging Face Hub at {urlsplit(constants.ENDPOINT).hostname} (HF_ENDPOINT)"


def _local_option(repo_type: RepoType) -> str:
    option = "local" if repo_type == "model" else "files"
    return f"{repo_type}={option} {repo_type}.path=DIR"


def _explain(
    error: Exception, repo_type: RepoType, repo: str, revision: str | None, upload_field: str
) -> UserError | None:
    """Return the message of an error; None: it is a bug, or explained elsewhere."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(
        error.__cause__, errors.HfHubHTTPError
    ):  # it was not in the cache either
        error = error.__cause__
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_answer(error, repo_type, repo, revision, upload_field)
    if (
        isinstance(error, (ConnectionError, TimeoutError, errors.LocalEntryNotFoundError))
        # the HTTP client under huggingface_hub has changed before: any of them, by its name
        or type(error).__module__.startswith(("httpx", "httpcore", "requests"))
    ):
        if upload_field:
            return UserError(
                f"{_hub()} cannot be reached", field=upload_field, value=repo, hint="connect"
            )
        return unreachable(repo_type, repo)
    if exhausted_resource(error):
        return None
    if isinstance(error, OSError):
        return _explain_os_error(error, repo_type, repo)
    field, problem, hint = upload_field or f"{repo_type}.path", "", ""
    if isinstance(error, RuntimeError):  # by hf_xet
        problem = f"the {'upload' if upload_field else 'download'} failed: {first_line(error)}"
        hint = "run again; HF_HUB_DISABLE_XET=1 does it without the Xet protocol"
    elif isinstance(error, ValueError) and str(error).startswith("Invalid metadata"):
        problem = " ".join(str(error).split())  # what the Hub objects to in a README.md
    elif isinstance(error, (ValueError, KeyError, TypeError, AttributeError, AssertionError)):
        problem = f"{_hub()} gives an answer that is not a Hub's, such as a web page"
        hint = "log in to the network if it has a login page; check the proxy and HF_ENDPOINT"
    return UserError(problem, field=field, value=repo, hint=hint) if problem else None


def _explain_os_error(error: OSError, repo_type: RepoType, repo: str) -> UserError:
    if error.filename is None:  # the client's check of the size
        return damaged(repo_type, repo, first_line(error))
    folder = Path(str(error.filename)).parent
    return folder_error(folder, error, "HF_HOME", "another folder: HF_HOME=DIR")


def _explain_answer(
    error: "HfHubHTTPError",
    repo_type: RepoType,
    repo: str,
    revision: str | None,
    upload_field: str,
) -> UserError:
    """Return the message of an HTTP status."""
    from huggingface_hub import errors, get_token

    page = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repo}"
    status = error.response.status_code
    field, value = upload_field or f"{repo_type}.path", repo
    if isinstance(error, errors.GatedRepoError):
        problem = "is gated: its license must be accepted first"
        hint = (
            f"accept it at {page} in your browser, then log in here with `hf auth login` "
            "(or set HF_TOKEN)"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        field, value = f"{repo_type}.revision", str(revision)
        problem = f"{repo} has no such branch, tag or commit"
        hint = f"leave {repo_type}.revision=null for the newest"
    elif isinstance(error, errors.DisabledRepoError):
        problem, hint = "is disabled by the Hub", f"see {page}"
    elif isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        problem = f"no such {repo_type} on the Hub, or it is private"
        hint = "check the spelling; for a private one log in with `hf auth login`"
        if not upload_field:
            hint += f"; for a folder of yours: {_local_option(repo_type)}"
    elif status == 401 and get_token():
        problem = "the login token is not accepted (HTTP 401)"
        hint = "log in again with `hf auth login`, or unset HF_TOKEN"
    elif status == 401:
        problem, hint = "needs a login (HTTP 401)", "`hf auth login`, or set HF_TOKEN"
    elif status == 403:
        problem = "access is denied (HTTP 403)"
        hint = (
            "log in with a token that may access it (`hf auth login`; "
            f"https://huggingface.co/settings/tokens), or ask for access at {page}"
        )
    elif status == 429:
        problem = f"{_hub()} limits the number of requests (HTTP 429)"
        hint = "wait some minutes; logged in (`hf auth login`) more are allowed"
    elif status >= 500:
        problem = f"{_hub()} fails (HTTP {status})"
        hint = "try again later; its state is at https://status.huggingface.co"
    else:
        problem = f"{_hub()} refuses the request (HTTP {status})"
        hint = f"check {field} and HF_ENDPOINT"
    return UserError(problem, field=field, value=value, hint=hint)
