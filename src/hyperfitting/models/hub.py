"""The Hugging Face Hub: resolving revisions to commits, downloads, and actionable errors."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from hyperfitting.errors import UserError

RepoType = Literal["model", "dataset"]
_LOOKUP_TIMEOUT = 10.0
"""In seconds."""
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@contextmanager
def explain_errors(repo_type: RepoType, repo: str, revision: str | None) -> Iterator[None]:
    """Turn the Hub's exceptions into messages that name the field and the remedy.

    Raises:
        UserError: no such repository or revision, no access, no network.
    """
    from huggingface_hub import errors

    field = f"{repo_type}.path"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            "is gated: its license must be accepted first",
            field=field,
            value=repo,
            hint=f"accept it at https://huggingface.co/{repo} in your browser, then log in here "
            "with `hf auth login` (or set HF_TOKEN)",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{repo} has no such branch, tag or commit",
            field=f"{repo_type}.revision",
            value=revision,
            hint=f"leave {repo_type}.revision=null for the newest",
        ) from error
    except errors.RepositoryNotFoundError as error:
        local = "local" if repo_type == "model" else "files"
        raise UserError(
            f"no such {repo_type} on the Hub, or it is private",
            field=field,
            value=repo,
            hint="check the spelling; for a private one log in with `hf auth login`; "
            f"for a folder of yours: {repo_type}={local} {field}=DIR",
        ) from error
    except (
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        ConnectionError,
        TimeoutError,
    ) as error:
        raise _unreachable(repo_type, repo) from error
    except Exception as error:
        # the HTTP client under huggingface_hub has changed before: any of them, by its name
        if type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise _unreachable(repo_type, repo) from error
        raise


def _unreachable(repo_type: RepoType, repo: str) -> UserError:
    offline_options = (
        "the embedded model needs no network: model=smollm2_135m; a folder: model=local "
        "model.path=DIR"
        if repo_type == "model"
        else "the embedded texts need no network: dataset=news_sample; your own: dataset=files "
        "dataset.path=DIR"
    )
    return UserError(
        "the Hugging Face Hub cannot be reached, and this machine has no earlier download of it",
        field=f"{repo_type}.path",
        value=repo,
        hint="connect (and unset HF_HUB_OFFLINE), or download it elsewhere and copy it; "
        + offline_options,
    )


def resolve_commit(repo_type: RepoType, repo: str, revision: str | None) -> str:
    """Return the commit of a revision, as the Hub or, if it cannot be reached, its cache says.

    Raises:
        UserError: neither has it.
    """
    from huggingface_hub import HfApi

    try:
        with explain_errors(repo_type, repo, revision):
            info = HfApi().repo_info(
                repo, revision=revision, repo_type=repo_type, timeout=_LOOKUP_TIMEOUT
            )
            return str(info.sha)
    except UserError:
        cached = _cached_commit(repo_type, repo, revision)
        if cached is None:
            raise
        return cached


def _cached_commit(repo_type: RepoType, repo: str, revision: str | None) -> str | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE) / f"{repo_type}s--{repo.replace('/', '--')}"
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision if (cache / "snapshots" / revision).is_dir() else None
    ref = cache / "refs" / (revision or "main")
    return ref.read_text().strip() if ref.is_file() else None


def download_config(repo: str, commit: str) -> Path:
    """Return a local folder with a model's config.json, downloaded unless it is in the cache.

    Raises:
        UserError: no access, no network.
    """
    from huggingface_hub import snapshot_download

    with explain_errors("model", repo, commit):
        return Path(snapshot_download(repo, revision=commit, allow_patterns=["config.json"]))


def download_model(repo: str, commit: str) -> Path:
    """Return a model's local folder, downloaded unless it is in the cache.

    Only safetensors are downloaded, or, where a repository has none, PyTorch's .bin files.

    Raises:
        UserError: no access, no network.
    """
    from huggingface_hub import snapshot_download

    with explain_errors("model", repo, commit):
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=_MODEL_FILES))
        if not any(folder.glob("*.safetensors")):  # torch reads .bin with weights_only: no code
            snapshot_download(repo, revision=commit, allow_patterns=["*.bin"])
        return folder
