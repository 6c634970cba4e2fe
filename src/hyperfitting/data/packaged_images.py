"""Real images that Python packages ship, with the photograph that each is of. No network."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hyperfitting.data.config import ImageConfig
from hyperfitting.data.image_files import read_image
from hyperfitting.errors import UserError, no_such
from hyperfitting.models.image_format import Pixels
from hyperfitting.store.hashing import fingerprint


def source_id(name: str) -> str:
    """Return what determines the content of a set of images.

    Raises:
        UserError: there is no such set.
    """
    return _set(name).source_id()


def distributions(name: str) -> tuple[str, ...]:
    """Return the packages, by their names for pip, that ship a set of images.

    Raises:
        UserError: there is no such set.
    """
    return _set(name).distributions


def read(name: str, image: ImageConfig) -> Iterator[tuple[Pixels, int]]:
    """Yield the images (H, W, 3) of a set, with the number of the photograph of each."""
    yield from _set(name).read(image)


def photograph_sets(name: str) -> list[str] | None:
    """Return the set (a field of `ImageSplit`) of each photograph; none: a hash decides."""
    return [photo.set for photo in PHOTOGRAPHS] if name == "photographs" else None


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


def _digits_id() -> str:
    require_scikit_learn("dataset.path", "digits")
    return "sklearn.datasets.load_digits"


@dataclass(frozen=True)
class Photograph:
    """A color photograph that a package ships."""

    package: str
    path: str
    """In the package's folder."""
    set: str
    """The set of all its patches, a field of `ImageSplit`."""


PHOTOGRAPHS = (
    Photograph("sklearn", "datasets/images/china.jpg", "pretraining"),
    Photograph("skimage", "data/coffee.png", "pretraining"),
    Photograph("skimage", "data/motorcycle_left.png", "pretraining"),
    Photograph("skimage", "data/chelsea.png", "pretraining_validation"),
    Photograph("skimage", "data/astronaut.png", "held_out"),
    Photograph("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "validation"),
    Photograph("sklearn", "datasets/images/flower.jpg", "train"),
    Photograph("skimage", "data/rocket.jpg", "train"),
)
"""By hand, as a hash would leave a set of so few empty. All that the packages ship in color, but
motorcycle_right (the same scene) and what was taken through a microscope, a telescope or an
ophthalmoscope."""
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def _photographs(image: ImageConfig) -> Iterator[tuple[Pixels, int]]:
    """Yield the patches of all photographs: a grid that does not overlap, rest at the margins."""
    for group, photograph in enumerate(PHOTOGRAPHS):
        for patch in patches(read_image(_photograph_path(photograph)), image):
            yield patch, group


def patches(picture: Pixels, image: ImageConfig) -> Pixels:
    """Return the patches (N, height, width, 3) of a picture (H, W, 3), row by row."""
    rows, columns = picture.shape[0] // image.height, picture.shape[1] // image.width
    whole = picture[: rows * image.height, : columns * image.width]
    grid = whole.reshape(rows, image.height, columns, image.width, 3).swapaxes(1, 2)
    return grid.reshape(-1, image.height, image.width, 3)


def _photograph_path(photograph: Photograph) -> Path:
    return package_folder(photograph.package, "dataset.path", "photographs") / photograph.path


def _photographs_id() -> str:
    return fingerprint({photo.path: _photograph_path(photo) for photo in PHOTOGRAPHS})


@dataclass(frozen=True)
class _Set:
    """A set of images that packages ship."""

    source_id: Callable[[], str]
    distributions: tuple[str, ...]
    """That ship them."""
    read: Callable[[ImageConfig], Iterator[tuple[Pixels, int]]]


_SETS = {
    "digits": _Set(_digits_id, ("scikit-learn",), _digits),
    "photographs": _Set(
        _photographs_id, ("matplotlib", "scikit-image", "scikit-learn"), _photographs
    ),
}


def package_folder(package: str, field: str, value: object) -> Path:
    """Return the folder of an installed package, which is not imported.

    Raises:
        UserError: a package of the extra `images` is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"needs the package {_DISTRIBUTIONS.get(package, package)}",
            field=field,
            value=value,
            hint="pip install 'hyperfitting[images]'",
        )
    return Path(spec.submodule_search_locations[0])


def require_scikit_learn(field: str, value: object) -> None:
    """Check that scikit-learn is installed.

    Raises:
        UserError: it is not.
    """
    package_folder("sklearn", field, value)


def _set(name: str) -> _Set:
    if name not in _SETS:
        raise no_such("packaged images", "dataset.path", name, _SETS)
    return _SETS[name]
