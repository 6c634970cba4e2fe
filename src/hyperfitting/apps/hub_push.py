"""An exported folder pushed to the Hugging Face Hub, as a repository that is private if it is new.

The login is that of `hf auth login`, or HF_TOKEN: it is read by huggingface_hub and never written.
"""

from pathlib import Path

from hyperfitting.errors import UserError
from hyperfitting.models.hub_errors import check_name, explain_errors

_FIELD = "--push"


def check_push(repo: str) -> None:
    """Refuse to push without a login, or to what is no repository's id, before any work is done.

    Raises:
        UserError: the id is invalid, or there is no login.
    """
    from huggingface_hub import get_token

    check_name("model", repo, _FIELD)
    if get_token() is None:
        raise UserError(
            "needs a login to the Hub",
            field=_FIELD,
            value=repo,
            hint="`hf auth login`, or set HF_TOKEN: a token with write access",
        )


def push(folder: Path, repo: str) -> str:
    """Commit a folder's files to a repository, and return the URL of the commit.

    Args:
        folder: of the model.
        repo: `OWNER/NAME`, or `NAME` for one of the login's own; created private if it is new.

    Raises:
        UserError: no network, or no right to write there.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with explain_errors("model", repo, None, _FIELD):
        created = api.create_repo(repo, private=True, exist_ok=True)
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=created.repo_id,
            commit_message="Model and card, by hyperfit-export",
        )
    return str(commit.commit_url)
