"""Real images that Python packages ship, with the photograph that each is of. No network."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hyperfitting.data.config import ImageConfig
from hyperfitting.errors import UserError, near_matches
from hyperfitting.models.image_format import Pixels


def source_id(name: str) -> str:
    """Return what determines the content of a set of images.

    Raises:
        UserError: there is no such set.
    """
    return _set(name).id


def package(name: str) -> str:
    """Return the package that ships a set of images.

    Raises:
        UserError: there is no such set.
    """
    return _set(name).package


def read(name: str, image: ImageConfig) -> Iterator[tuple[Pixels, int]]:
    """Yield the images (H, W, 3) of a set, with the number of the photograph of each."""
    yield from _set(name).read(image)


def classes(name: str) -> NDArray[np.int64] | None:
    """Return the class of each image of a set, in the order of `read`; none: it has no classes."""
    if name != "digits":
        return None
    from sklearn.datasets import load_digits

    return np.asarray(load_digits().target, dtype=np.int64)


def _digits(image: ImageConfig) -> Iterator[tuple[Pixels, int]]:
    """Yield 1,797 handwritten digits of 8 x 8 pixels in 17 grays, each on its own.

    (scikit-learn's, from UCI's optical recognition of handwritten digits.)
    """
    from sklearn.datasets import load_digits

    levels = load_digits().images  # (1797, 8, 8), 0 to 16
    grays = np.rint(levels * (255 / 16)).astype(np.uint8)
    for group, picture in enumerate(grays):
        yield np.repeat(picture[:, :, None], 3, axis=2), group


@dataclass(frozen=True)
class _Set:
    """A set of images that a package ships."""

    id: str
    package: str
    read: Callable[[ImageConfig], Iterator[tuple[Pixels, int]]]


_SETS = {
    "digits": _Set("sklearn.datasets.load_digits", "scikit-learn", _digits),
}


def require_scikit_learn(field: str, value: object) -> None:
    """Check that scikit-learn is installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise UserError(
            "needs the package scikit-learn",
            field=field,
            value=value,
            hint="pip install 'hyperfitting[images]'",
        )


def _set(name: str) -> _Set:
    if name not in _SETS:
        raise UserError(
            "no such packaged images",
            field="dataset.path",
            value=name,
            valid=", ".join(_SETS),
            hint=near_matches(name, _SETS),
        )
    require_scikit_learn("dataset.path", name)  # every set is one of its
    return _SETS[name]
