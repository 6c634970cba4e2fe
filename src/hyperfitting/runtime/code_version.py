"""Which code this process runs: package version, a digest of its files, and the git checkout.

The digest is what pins a sweep: it covers the Python files that a record's numbers depend on, so a
change to a report or an app does not count as other code, and it exists without git. Configs are
not in it: a record holds its config as composed. The import layers (pyproject.toml) guarantee that
nothing else imports the packages that are left out.
"""

import hashlib
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import Field

from hyperfitting.runtime.strict_model import StrictModel

DIFF_FILE = "code.diff"
MAX_DIFF_BYTES = 2**20
"""A longer diff is not kept: only its checksum is."""
_NO_RESULTS = ("apps", "preference", "reporting", "sweep", "tracking", "verify")
"""Packages that no number of a record depends on."""
_DIFFED = ("src", "conf", "experiments")
"""Folders of the checkout whose changes are kept; other files could hold anything."""
_PACKAGE = Path(__file__).resolve().parents[1]


class Git(StrictModel):
    """The checkout that the code ran from."""

    commit: str = Field(description="hash of the commit")
    dirty: bool = Field(
        description="whether there were uncommitted changes or new files in `src/`, `conf/` or "
        "`experiments/`"
    )
    diff_sha256: str | None = Field(
        description=f"SHA-256 of these changes, which are in `{DIFF_FILE}` unless they have more "
        "than 1 MiB; null: there are none"
    )


class CodeVersion(StrictModel):
    """The code that made a record."""

    package: str = Field(description="version of hyperfitting")
    digest: str = Field(description="of the Python files that a record's numbers depend on")
    git: Git | None = Field(description="the checkout; null: an installed package")

    def __str__(self) -> str:
        place = f"version {self.package}"
        if self.git is not None:
            place = f"commit {self.git.commit[:12]}{', with changes' * self.git.dirty}"
        return f"{place} (code {self.digest})"


@cache
def code_version() -> CodeVersion:
    """Return the version of this code, as of the first call: call it before the work begins."""
    try:
        package = version("hyperfitting")
    except PackageNotFoundError:  # run from src/, without being installed
        package = "unknown"
    git, _ = _own_checkout()
    return CodeVersion(package=package, digest=code_digest(_PACKAGE), git=git)


def code_diff() -> str:
    """Return the uncommitted changes of `code_version`, for `git apply`; "": there are none."""
    return _own_checkout()[1]


@cache
def _own_checkout() -> tuple[Git | None, str]:
    return read_checkout(_PACKAGE)


def code_digest(package: Path) -> str:
    """Return a digest of the Python files of the package in a folder, `_NO_RESULTS` left out."""
    sha = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] not in _NO_RESULTS:
            checksum = hashlib.sha256(path.read_bytes()).hexdigest()
            sha.update(f"{name.as_posix()} {checksum}\n".encode())
    return sha.hexdigest()[:16]


def read_checkout(package: Path) -> tuple[Git | None, str]:
    """Return the state of the checkout that holds a package, and its uncommitted changes.

    The changes are those of `src/`, `conf/` and `experiments/`, new files among them. None and "":
    no checkout tracks the package, or there is no git.
    """
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(package, "rev-parse", "HEAD").strip()
        root = Path(_git(package, "rev-parse", "--show-toplevel").strip())
        folders = [name for name in _DIFFED if (root / name).exists()]
        diff = _diff(root, "HEAD", "--", *folders)
        new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *folders)
        for name in filter(None, new.split("\0")):
            diff += _diff(root, "--no-index", "--", "/dev/null", name)
    except (OSError, subprocess.SubprocessError):
        return None, ""
    checksum = hashlib.sha256(diff.encode("utf-8", "surrogateescape")).hexdigest()
    return Git(commit=commit, dirty=bool(diff), diff_sha256=checksum if diff else None), diff


def _diff(root: Path, *arguments: str) -> str:
    return _git(
        root, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "--binary", *arguments
    )


def _git(folder: Path, *arguments: str) -> str:
    """Return what a git command prints.

    Raises:
        OSError: there is no git.
        subprocess.SubprocessError: the folder is no checkout.
    """
    process = subprocess.run(  # noqa: S603  (fixed arguments, no shell)
        ["git", *arguments],  # noqa: S607  (git is wherever the user has it)
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=30,
        check=False,
    )
    if process.returncode and not ("--no-index" in arguments and process.returncode == 1):
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return process.stdout
