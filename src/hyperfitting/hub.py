"""The Hugging Face Hub: which commit a name means, and errors a user can act on."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from hyperfitting.errors import UserError

Kind = Literal["model", "dataset"]
_LOOKUP_SECONDS = 10.0
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@contextmanager
def explained(kind: Kind, repo: str, revision: str | None) -> Iterator[None]:
    """Turn the Hub's exceptions into messages that say what is needed.

    Raises:
        UserError: no such repository or revision, no access, no network.
    """
    from huggingface_hub import errors

    field = f"{kind}.path"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            "is gated: its owner wants its licence accepted first",
            field=field,
            value=repo,
            hint=f"accept it at https://huggingface.co/{repo} in your browser, then log in here "
            "with `hf auth login` (or set HF_TOKEN)",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{repo} has no such branch, tag or commit",
            field=f"{kind}.revision",
            value=revision,
            hint=f"leave {kind}.revision=null for the newest",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"no such {kind} on the Hub, or it is private",
            field=field,
            value=repo,
            hint="check the spelling; for a private one log in with `hf auth login`; "
            f"for a folder of yours: {kind}={'local' if kind == 'model' else 'files'} {field}=DIR",
        ) from error
    except (
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        ConnectionError,
        TimeoutError,
    ) as error:
        raise _unreachable(kind, repo) from error
    except Exception as error:
        # the HTTP client under huggingface_hub has changed before: any of them, by its name
        if type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise _unreachable(kind, repo) from error
        raise


def _unreachable(kind: Kind, repo: str) -> UserError:
    here = (
        "the embedded model needs no network: model=smollm2_135m; a folder: model=local "
        "model.path=DIR"
        if kind == "model"
        else "the embedded texts need no network: dataset=news_sample; your own: dataset=files "
        "dataset.path=DIR"
    )
    return UserError(
        "the Hugging Face Hub cannot be reached, and this machine has no earlier download of it",
        field=f"{kind}.path",
        value=repo,
        hint=f"connect (and unset HF_HUB_OFFLINE), or download it elsewhere and copy it; {here}",
    )


def commit(kind: Kind, repo: str, revision: str | None) -> str:
    """Return the commit that a repository's revision means: the Hub's word, else the cache's.

    Raises:
        UserError: neither knows it.
    """
    from huggingface_hub import HfApi

    try:
        with explained(kind, repo, revision):
            info = HfApi().repo_info(
                repo, revision=revision, repo_type=kind, timeout=_LOOKUP_SECONDS
            )
            return str(info.sha)
    except UserError:
        cached = _cached_commit(kind, repo, revision)
        if cached is None:
            raise
        return cached


def _cached_commit(kind: Kind, repo: str, revision: str | None) -> str | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}"
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision if (cache / "snapshots" / revision).is_dir() else None
    ref = cache / "refs" / (revision or "main")
    return ref.read_text().strip() if ref.is_file() else None


def config_folder(repo: str, sha: str) -> Path:
    """Return a folder with the config of a model at a commit, downloaded if need be.

    Raises:
        UserError: no access, no network.
    """
    from huggingface_hub import snapshot_download

    with explained("model", repo, sha):
        return Path(snapshot_download(repo, revision=sha, allow_patterns=["config.json"]))


def model_folder(repo: str, sha: str) -> Path:
    """Return the folder of a model at a commit, downloaded if need be, as safetensors if it can.

    Raises:
        UserError: no access, no network.
    """
    from huggingface_hub import snapshot_download

    with explained("model", repo, sha):
        folder = Path(snapshot_download(repo, revision=sha, allow_patterns=_MODEL_FILES))
        if not any(folder.glob("*.safetensors")):  # torch reads these with weights_only: no code
            snapshot_download(repo, revision=sha, allow_patterns=["*.bin"])
        return folder
