"""The Hugging Face Hub: revisions resolved to commits, and verified downloads of one commit.

A revision is resolved once per process, so that a model's config, tokenizer and weights are of the
same commit. The Hub's own cache keeps which commit that was (`refs/`): without network the run
continues with it. A download that is complete needs no network either.
"""

import glob
import logging
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import cache
from pathlib import Path, PurePosixPath

from hyperfitting.errors import UserError
from hyperfitting.models import hub_requests
from hyperfitting.models.hub_errors import (
    RepoType,
    check_name,
    check_revision,
    damaged,
    explain_errors,
    unreachable,
)
from hyperfitting.models.hub_requests import is_reachable, progress_bar, retrying
from hyperfitting.progress import ProgressReporter, no_op
from hyperfitting.runtime.files import write_text

_COMMIT = re.compile("[0-9a-f]{40}")
_MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FIRST_FILE = {"model": "config.json", "dataset": "README.md"}
"""What is downloaded along with the list of files."""

log = logging.getLogger(__name__)


@cache
def resolve_commit(repo_type: RepoType, repo: str, revision: str | None) -> str:
    """Return the commit of a revision, as the Hub or, if that gives none, its cache says.

    Raises:
        UserError: neither has it, or there can be no such repository or revision.
    """
    from huggingface_hub import HfApi

    check_name(repo_type, repo)
    check_revision(repo_type, revision)
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    ref = _cache_folder(repo_type, repo) / "refs" / (revision or "main")
    cached = _read_commit(ref)
    try:
        if cached is not None and not is_reachable():
            raise unreachable(repo_type, repo)
        with explain_errors(repo_type, repo, revision):
            info = retrying(
                lambda: HfApi().repo_info(
                    repo,
                    revision=revision,
                    repo_type=repo_type,
                    timeout=hub_requests.LOOKUP_TIMEOUT,
                )
            )
            if not _COMMIT.fullmatch(info.sha or ""):
                raise ValueError("the answer names no commit")
    except UserError as error:
        if cached is None:
            raise
        log.warning(
            "%s %s: %s; using commit %s, which %s was on %s",
            repo_type,
            repo,
            error.problem.partition(",")[0],
            cached,
            revision or "main",
            datetime.fromtimestamp(ref.stat().st_mtime).strftime("%Y-%m-%d %H:%M"),
        )
        return cached
    commit = str(info.sha)
    log.info("%s %s: %s is commit %s", repo_type, repo, revision or "main", commit)
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        write_text(ref, commit)
    except OSError as error:
        log.info("%s cannot be written, so it is not known without network: %s", ref, error)
    return commit


def list_files(repo_type: RepoType, repo: str, commit: str) -> dict[str, int]:
    """Return the files of a repository, with their sizes in bytes.

    Without network and without a cached list, these are the files that were downloaded.

    Raises:
        UserError: the Hub cannot be asked, or a name leads out of the repository.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    def cached_tree() -> dict[str, int] | None:
        try:
            tree = get_cached_repo_tree(repo, repo_type=repo_type, revision=commit)
        except CachedRepoTreeNotFoundError:
            return None
        return {file.path: file.size for file in tree}

    files = cached_tree()
    if files is None and is_reachable():
        _fetch(repo_type, repo, commit, [_FIRST_FILE[repo_type]], lambda n: None)
        files = cached_tree()
    if files is None:
        folder = _snapshot(repo_type, repo, commit)
        paths = [path for path in folder.rglob("*") if path.is_file()]
        if not paths:
            raise unreachable(repo_type, repo)
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    for name in files:
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise UserError(
                f"the repository has a file named {name!r}, a path outside its folder",
                field=f"{repo_type}.path",
                value=repo,
                hint="do not use this repository",
            )
    return files


def download(
    repo_type: RepoType,
    repo: str,
    commit: str,
    names: Iterable[str],
    progress: ProgressReporter = no_op,
) -> Path:
    """Return the local folder of a repository, with some of its files downloaded and verified.

    Args:
        repo_type: of the repository.
        repo: its id.
        commit: which version.
        names: of the files, among those that `list_files` returns.
        progress: reports the bytes.

    Raises:
        UserError: no network, no access, or a file is damaged on the way.
    """
    folder = _snapshot(repo_type, repo, commit)
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return folder
    if not is_reachable():
        raise unreachable(repo_type, repo, ", ".join(missing[:3]))
    sizes = list_files(repo_type, repo, commit)
    total = sum(sizes[name] for name in missing)
    with progress(f"downloading {repo}", total, "bytes") as advance:
        _fetch(repo_type, repo, commit, missing, advance)
    return folder


def _fetch(
    repo_type: RepoType,
    repo: str,
    commit: str,
    names: list[str],
    advance: Callable[[int], None],
) -> None:
    """Download files into the cache, and the list of all files; remove those that are damaged."""
    from huggingface_hub import HfApi, snapshot_download

    folder = _snapshot(repo_type, repo, commit)
    with explain_errors(repo_type, repo, commit):
        retrying(
            lambda: snapshot_download(
                repo,
                repo_type=repo_type,
                revision=commit,
                allow_patterns=[glob.escape(name) for name in names],
                tqdm_class=progress_bar(advance),
            )
        )
        if not folder.is_dir():  # it has none of these files
            return
        checked = HfApi().verify_repo_checksums(repo, repo_type=repo_type, revision=commit)
    for mismatch in checked.mismatches:
        path = folder / mismatch["path"]
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    if checked.mismatches:
        bad = checked.mismatches[0]
        raise damaged(repo_type, repo, f"the {bad['algorithm']} of {bad['path']} is another")


def download_config(repo: str, commit: str) -> Path:
    """Return a local folder with a model's config.json, downloaded unless it is in the cache.

    Raises:
        UserError: no access, no network, or it has none.
    """
    if "config.json" not in list_files("model", repo, commit):
        raise UserError(
            "is not a model that transformers can load: it holds no config.json",
            field="model.path",
            value=repo,
        )
    return download("model", repo, commit, ["config.json"])


def download_model(repo: str, commit: str, progress: ProgressReporter = no_op) -> Path:
    """Return a model's local folder, downloaded unless it is in the cache.

    Only the top folder's safetensors, config and tokenizer files are.

    Raises:
        UserError: no access, no network, or its weights are not safetensors.
    """
    names = [name for name in list_files("model", repo, commit) if "/" not in name]
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        pickles = [name for name in names if name.endswith(_PICKLES)]
        raise UserError(
            f"its weights are pickles ({', '.join(pickles[:2])}), which can run code"
            if pickles
            else "it holds no weights",
            field="model.path",
            value=repo,
            valid="a model with .safetensors files",
            hint="the Hub's converter may offer them in a pull request (the model's Community "
            "tab): model.revision=refs/pr/N"
            if pickles
            else "",
        )
    # Mistral's own format comes beside the one of transformers, with the same weights
    names = [name for name in names if not name.startswith("consolidated")]
    return download(
        "model", repo, commit, [name for name in names if name.endswith(_MODEL_FILES)], progress
    )


def _cache_folder(repo_type: RepoType, repo: str) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE).expanduser() / f"{repo_type}s--{repo.replace('/', '--')}"


def _snapshot(repo_type: RepoType, repo: str, commit: str) -> Path:
    return _cache_folder(repo_type, repo) / "snapshots" / commit


def _read_commit(ref: Path) -> str | None:
    try:
        commit = ref.read_text().strip()
    except (OSError, ValueError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None
