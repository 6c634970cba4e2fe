"""Features of whole images for FID and KID, as artifacts; the network is injected.

`inception` is the Inception-v3 of FID, as torch-fidelity builds it, with weights that the user has
as safetensors: nothing is downloaded, and no pickle from elsewhere is loaded.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from hyperfitting.data.sequences import load_evaluation_texts
from hyperfitting.errors import UserError
from hyperfitting.evaluation.arrays import load_continuations, save_array
from hyperfitting.evaluation.images import ImageScoring
from hyperfitting.evaluation.setting import Setting
from hyperfitting.formatting import first_line
from hyperfitting.models.base import BaseModel
from hyperfitting.models.image_format import Pixels
from hyperfitting.store.artifact import Artifact, Step
from hyperfitting.store.hashing import fingerprint

VERSION = 1
_LAYER = "2048"
"""Inception's last pooling layer, on which FID and KID are defined."""
_BATCH_SIZE = 32

Network = Callable[[Pixels], NDArray[np.float32]]
"""From images (N, H, W, 3) to features (N, D)."""


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that gives features of images."""

    id: str
    """Determines its weights."""
    load: Callable[[], Network]
    """Reads the weights."""


def inception(path: Path, device: torch.device) -> FeatureNetwork:
    """Return the Inception-v3 of FID, whose weights are read when they are needed.

    Args:
        path: safetensors file of torch-fidelity's weights-inception-2015-12-05-6726825d.pth.
        device: where it runs.

    Raises:
        UserError: there is no such file, or torch-fidelity is not installed; so does `load` if
            the file does not hold these weights.
    """
    path = path.expanduser().absolute()
    if not path.is_file():
        raise UserError(
            "there is no such file",
            field="evaluation.fid_weights",
            value=path,
            valid="a safetensors file of Inception's weights",
            hint="docs/images.md says how to make it; nothing is downloaded",
        )
    if importlib.util.find_spec("torch_fidelity") is None:
        raise _not_installed(path, "torch-fidelity")
    return FeatureNetwork(fingerprint({"inception": path}), lambda: _load_inception(path, device))


def _not_installed(path: Path, package: str) -> UserError:
    return UserError(
        f"needs the package {package}",
        field="evaluation.fid_weights",
        value=path,
        hint="pip install 'hyperfitting[fid]', or evaluation.fid_weights=null",
    )


def _load_inception(path: Path, device: torch.device) -> Network:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:  # torchvision, which it imports
        raise _not_installed(path, str(error.name)) from error
    try:
        weights = load_file(path)
        with TemporaryDirectory() as folder:  # torch-fidelity loads pickles only
            pickled = Path(folder) / "weights.pth"
            torch.save(weights, pickled)
            network = FeatureExtractorInceptionV3("inception", [_LAYER], str(pickled)).to(device)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"does not hold Inception's weights: {first_line(error)}",
            field="evaluation.fid_weights",
            value=path,
            hint="docs/images.md says how to make it",
        ) from error

    @torch.inference_mode()
    def features(pixels: Pixels) -> NDArray[np.float32]:
        images = torch.as_tensor(pixels, device=device).permute(0, 3, 1, 2)  # (N, 3, H, W)
        values: NDArray[np.float32] = network(images)[0].cpu().numpy()
        return values

    return features


def image_features_steps(
    setting: Setting,
    network: FeatureNetwork,
    base: BaseModel,
    continuations: Mapping[str, Artifact],
) -> Iterator[tuple[str, Step]]:
    """Yield the steps of the features of completed images, and of the real ones.

    Args:
        setting: the real images, and lengths.
        network: gives the features.
        base: whose tokens the images are of.
        continuations: their artifacts, by dataset.
    """
    for dataset, artifact in continuations.items():
        yield f"continuation/{dataset}", _features_step(setting, network, base, dataset, artifact)
    for dataset in continuations:
        yield f"reference/{dataset}", _features_step(setting, network, base, dataset, None)


def _features_step(
    setting: Setting,
    network: FeatureNetwork,
    base: BaseModel,
    dataset: str,
    continuations: Artifact | None,
) -> Step:
    """Return the step of the features of images: `features.npy` (N, D).

    Args:
        setting: the real images, and lengths.
        network: gives the features.
        base: whose tokens the images are of.
        dataset: evaluation dataset.
        continuations: their artifact; none: of the real images.
    """
    texts, start = setting.texts[dataset], setting.evaluation.context_len

    def build(work: Path) -> None:
        image_format = base.image_format()
        if image_format is None:
            raise ValueError(f"{base.name} is no image model")
        tokens = load_evaluation_texts(texts).tokens[:, : setting.evaluation.total_len]
        if continuations is not None:
            generated = [sample["tokens"] for sample in load_continuations(continuations)]
            tokens = np.concatenate([tokens[:, :start], np.array(generated, np.int32)], axis=1)
        pixels = image_format.render(ImageScoring(image_format).pixels(tokens))
        extract = network.load()
        with setting.progress(f"FID features of {dataset}", len(pixels), "images") as advance:
            parts = []
            for batch in np.split(pixels, range(_BATCH_SIZE, len(pixels), _BATCH_SIZE)):
                parts.append(extract(batch))
                advance(len(batch))
        save_array(work, "features", np.concatenate(parts))

    inputs = {"network": network.id, "texts": texts.id}
    if continuations is not None:
        inputs["continuations"] = continuations.id
    artifact = setting.store.artifact(
        "image_features",
        version=VERSION,
        config={"context_len": start, "length": setting.evaluation.total_len},
        inputs=inputs,
    )
    return Step(artifact, build)
