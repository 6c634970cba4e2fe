"""manifest.json: what an artifact is, how it was built, and its files; validated when read."""

from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from hyperfitting.runtime.files import read_versioned

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
PACKAGES = ("hyperfitting", "torch", "transformers", "tokenizers", "datasets", "numpy")
CODE = "code"
"""Among an artifact's packages: `CodeVersion.digest` of the code that built it."""


@dataclass(frozen=True)
class FileEntry:
    """A file of an artifact."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, how it was built, and its files."""

    manifest_version: int
    id: str
    recipe: dict[str, Any]
    packages: dict[str, str]
    """Versions, `CODE` among them."""
    seconds: float
    """How long building it took; if it was resumed, the last attempt alone."""
    flops: float | None
    """Estimate of the floating-point operations of the build; none: unknown, or resumed."""
    files: dict[str, FileEntry]
    """By path within the artifact's folder."""
    resumed: bool = False
    """Whether an earlier attempt at the build was interrupted."""

    def __post_init__(self) -> None:
        for name in self.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{name!r} is not within the artifact")


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest in an artifact's folder.

    Raises:
        OtherVersionError: it was written by another version of this software.
        UserError: it cannot be read, or a field is invalid.
    """
    return read_versioned(
        folder / MANIFEST,
        Manifest,
        "manifest_version",
        MANIFEST_VERSION,
        field="artifact",
        value=folder,
        hint="use the version of hyperfitting that wrote it, another store=DIR, "
        "or delete that folder to have it built again",
    )


@cache
def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that can change a number."""
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
