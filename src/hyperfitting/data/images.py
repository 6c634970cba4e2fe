"""Where images come from, and how they are split: the Hub, a folder, images that packages ship.

Every source ends as one artifact: `images.npy` (N, H, W, 3), and `groups.npy`, which images are of
one photograph. A photograph is in one of the sets only:

    packaged images: pre-training (60%, never seen otherwise) | held out | validation | train
    all others:                                                 held out | validation | train

A set depends on a hash of the photograph's own pixels, as that of a text (`data.sequences`), but
those of the few packaged photographs are fixed.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hyperfitting.data import packaged_images
from hyperfitting.data.config import DatasetConfig, ImageConfig, TextsConfig
from hyperfitting.data.hub_dataset import explain_datasets_errors, load_rows
from hyperfitting.data.image_files import decode_image, find_images, read_image
from hyperfitting.data.sources import errors_at
from hyperfitting.data.splits import uniform_hash
from hyperfitting.errors import UserError, no_such
from hyperfitting.fields import id_config
from hyperfitting.models import hub
from hyperfitting.models.image_format import Pixels
from hyperfitting.progress import ProgressReporter, no_op
from hyperfitting.store.artifact import Artifact, Step, Store
from hyperfitting.store.hashing import fingerprint

VERSION = 1
PRETRAINING_FRACTION = 0.6
"""Of packaged images, the fraction that only base models are pre-trained on."""


@dataclass(frozen=True)
class Images:
    """The images of a dataset."""

    pixels: Pixels
    """(N, H, W, 3), all different."""
    groups: NDArray[np.int32]
    """(N,) the photograph that each is of."""
    is_packaged: bool
    """Whether a part is for pre-training only."""
    n_read: int
    """Images read, exact copies included."""
    sets: NDArray[np.str_] | None = None
    """(G,) the set of each photograph, a field of `ImageSplit`; none: a hash decides."""


@dataclass(frozen=True)
class ImageSplit:
    """Indices of the images of each set."""

    pretraining: NDArray[np.int64]
    pretraining_validation: NDArray[np.int64]
    held_out: NDArray[np.int64]
    validation: NDArray[np.int64]
    train: NDArray[np.int64]


Groups = Iterable[tuple[Pixels, int]]
"""Images (H, W, 3) with the number of the photograph of each."""


def images_step(
    cfg: TextsConfig,
    image: ImageConfig,
    store: Store,
    progress: ProgressReporter = no_op,
    at: str = "dataset",
) -> Step:
    """Return the step that reads a dataset's images. Only its id is determined here.

    Args:
        cfg: the dataset.
        image: size that images are scaled to.
        store: where they are kept.
        progress: displays the reading.
        at: position of ``cfg`` in the whole config, for error messages.

    Raises:
        UserError: the source does not exist or cannot be reached; so does the step's build if an
            image cannot be read.
    """
    with errors_at(at):
        source_id, read = _SOURCES[cfg.source](cfg, image, progress)
        sets = packaged_images.photograph_sets(str(cfg.path)) if cfg.source == "package" else None
        if sets is not None:
            _refuse_fractions(cfg)

    def build(work: Path) -> None:
        distinct: dict[bytes, tuple[Pixels, int]] = {}
        n_read = 0
        with errors_at(at), progress(f"reading {cfg.name}", 0, "images") as advance:
            for picture, group in read():
                resized = _resize(picture, image)
                distinct.setdefault(resized.tobytes(), (resized, group))
                n_read += 1
                advance(1)
            if not distinct:
                raise UserError("holds no image", field="dataset.path", value=cfg.path)
        pixels, groups = zip(*distinct.values(), strict=True)
        np.save(work / "images.npy", np.stack(pixels), allow_pickle=False)
        np.save(work / "groups.npy", np.array(groups, np.int32), allow_pickle=False)
        np.save(work / "n_read.npy", np.int64(n_read), allow_pickle=False)

    config = id_config(image, "images") | {"split": cfg.split, "subset": cfg.subset}
    config |= {"source": cfg.source} | ({} if sets is None else {"sets": sets})
    artifact = store.artifact(
        "images",
        version=VERSION,
        config=config,
        inputs={"source": source_id},
    )
    return Step(artifact, build)


def _refuse_fractions(cfg: TextsConfig) -> None:
    for name in ("holdout_fraction", "validation_fraction"):
        default = getattr(DatasetConfig, name)
        value = getattr(cfg, name, default)  # other texts have no validation sequences
        if value != default:
            raise UserError(
                f"changes nothing: the sets of {cfg.path} are fixed",
                field=f"dataset.{name}",
                value=value,
                valid=f"{default}, the default",
            )


def load_images(artifact: Artifact) -> Images:
    """Return the images of an `images` artifact."""
    config = artifact.recipe["config"]
    return Images(
        np.load(artifact.file("images.npy")),
        np.load(artifact.file("groups.npy")),
        config["source"] == "package",
        int(np.load(artifact.file("n_read.npy"))),
        np.array(config["sets"]) if "sets" in config else None,
    )


def split_images(images: Images, holdout_fraction: float, validation_fraction: float) -> ImageSplit:
    """Split images by photograph.

    Args:
        images: N images.
        holdout_fraction: of the photographs that are not for pre-training, for evaluation.
        validation_fraction: of the others, and of those for pre-training.
    """
    keys = np.array([image_key(picture) for picture in images.pixels])
    sets: dict[str, list[NDArray[np.int64]]] = {}
    for group in np.unique(images.groups):
        members = np.flatnonzero(images.groups == group)
        if images.sets is not None:
            name = str(images.sets[group])
        else:
            name = _set_of(min(keys[members]), images, holdout_fraction, validation_fraction)
        sets.setdefault(name, []).append(members)
    empty = [np.zeros(0, np.int64)]
    return ImageSplit(
        **{f.name: np.concatenate(sets.get(f.name, empty)) for f in fields(ImageSplit)}
    )


def _set_of(key: str, images: Images, holdout_fraction: float, validation_fraction: float) -> str:
    if images.is_packaged and uniform_hash("pretraining", key) < PRETRAINING_FRACTION:
        is_val = uniform_hash("pretraining validation", key) < validation_fraction
        return "pretraining_validation" if is_val else "pretraining"
    if uniform_hash("split", key) < holdout_fraction:
        return "held_out"
    return "validation" if uniform_hash("validation", key) < validation_fraction else "train"


def ordered(images: Images, rows: NDArray[np.int64], seed: int) -> Pixels:
    """Return some images in a random order that depends only on ``seed`` and their own pixels."""
    keys = [uniform_hash(str(seed), image_key(images.pixels[row])) for row in rows]
    return images.pixels[rows[np.argsort(keys, kind="stable")]]


def image_key(picture: Pixels) -> str:
    """Return a hash of an image's pixels."""
    return hashlib.sha256(picture.tobytes()).hexdigest()


def _resize(picture: Pixels, image: ImageConfig) -> Pixels:
    """Scale an image (H, W, 3) as `ImageGPTImageProcessor` does: bilinear, without cropping."""
    if picture.shape[:2] == (image.height, image.width):
        return picture
    from PIL import Image

    size = (image.width, image.height)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))


Source = tuple[str, Callable[[], Groups]]
"""What determines the content, and the function that reads it."""


def _package(cfg: TextsConfig, image: ImageConfig, progress: ProgressReporter) -> Source:
    name = str(cfg.path)
    return packaged_images.source_id(name), lambda: packaged_images.read(name, image)


def _files(cfg: TextsConfig, image: ImageConfig, progress: ProgressReporter) -> Source:
    folder = Path(str(cfg.path)).expanduser().absolute()
    paths = find_images(folder)

    def read() -> Iterator[tuple[Pixels, int]]:
        for group, path in enumerate(paths):
            yield read_image(path), group

    return fingerprint({str(path.relative_to(folder)): path for path in paths}), read


def _hub(cfg: TextsConfig, image: ImageConfig, progress: ProgressReporter) -> Source:
    repo = str(cfg.path)
    commit = hub.resolve_commit("dataset", repo, cfg.revision)

    def read() -> Iterator[tuple[Pixels, int]]:
        from datasets import Image

        rows = load_rows(cfg, commit, progress)
        columns = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
        if image.column not in columns:
            raise no_such("column of images", "dataset.image.column", image.column, columns)
        with explain_datasets_errors(cfg):
            # undecoded: `datasets` reads any format and size, and what a row's `path` leads to
            files = rows.cast_column(image.column, Image(decode=False))[image.column]
            for group, file in enumerate(files):
                if file is None or file["bytes"] is None:
                    raise UserError(
                        f"row {group + 1} of {repo} holds no image",
                        field="dataset.image.column",
                        value=image.column,
                        hint="another column, or the rows before it: dataset.split=train[:N]",
                    )
                yield decode_image(file["bytes"], f"row {group + 1} of {repo}"), group

    return f"{repo}@{commit}", read


_SOURCES: dict[str, Callable[[TextsConfig, ImageConfig, ProgressReporter], Source]] = {
    "hub": _hub,
    "files": _files,
    "package": _package,
}
