"""The licenses of a base model and of training data, as stated where they come from.

Hub: the front matter of the repository's README.md. A package that ships a model or data: its own
metadata. Else, and for your own files without such a README.md, a license is not stated.
"""

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from yaml import YAMLError

from hyperfitting.data import packaged, packaged_images
from hyperfitting.errors import UserError
from hyperfitting.models import hub
from hyperfitting.models.hub_errors import RepoType

NOT_STATED = "not stated"
_CARD = "README.md"


def model_license(model: Mapping[str, Any], location: str) -> str:
    """Return the license of a base model.

    Args:
        model: the run's `model` config.
        location: where the model's files come from: `repo@commit`, or a folder.
    """
    if model.get("package"):
        return package_license(str(model["package"]))
    if model.get("source") == "hub":
        return _hub_license("model", location)
    return _folder_license(model.get("path"))


def data_license(dataset: Mapping[str, Any], source: str) -> str:
    """Return the license of the training data.

    Args:
        dataset: the run's `dataset` config.
        source: the record's `dataset.source`: of the Hub `repo@commit`.
    """
    name = str(dataset.get("path"))
    if dataset.get("source") == "package":
        shipped = packaged_images if dataset.get("image") else packaged
        return "; ".join(map(package_license, shipped.distributions(name)))
    if dataset.get("source") == "hub":
        return _hub_license("dataset", source)
    return _folder_license(dataset.get("path"))


def package_license(name: str) -> str:
    """Return the license that a Python package's metadata states."""
    try:
        stated = metadata.metadata(name).json
    except metadata.PackageNotFoundError:
        return NOT_STATED
    license = str(stated.get("license_expression") or stated.get("license") or "").strip()
    return f"{license.splitlines()[0]} (of the package {name})" if license else NOT_STATED


def card_license(card: Path) -> str:
    """Return the license in the front matter of a model's or dataset's README.md."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(card.read_text("utf-8")).data
    except (OSError, ValueError, YAMLError):  # none, or not a card
        return NOT_STATED
    stated = data.get("license")
    license = ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated or "")
    name = data.get("license_name")
    return (f"{license} ({name})" if name else license) or NOT_STATED


def _hub_license(repo_type: RepoType, location: str) -> str:
    """Return the license that a repository states; offline, the copy in the cache."""
    repo, _, commit = location.partition("@")
    try:
        if _CARD not in hub.list_files(repo_type, repo, commit):
            return NOT_STATED
        return card_license(hub.download(repo_type, repo, commit, [_CARD]) / _CARD)
    except UserError:  # a license that cannot be looked up does not stop an export
        return NOT_STATED


def _folder_license(path: Any) -> str:
    if not path:
        return NOT_STATED
    given = Path(str(path)).expanduser()
    return card_license((given if given.is_dir() else given.parent) / _CARD)
