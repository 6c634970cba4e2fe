"""Images as tokens: each pixel is its nearest color of a palette, in raster order (ImageGPT).

The same numbers as `ImageGPTImageProcessor` of transformers, whose `clusters` are the palette.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperfitting.errors import UserError
from hyperfitting.formatting import first_line
from hyperfitting.runtime.files import write_json

PROCESSOR_FILE = "preprocessor_config.json"
"""Holds the palette and the size of an image model's images, as transformers writes it."""
_ROWS = 1 << 16
"""Pixels whose distances to all colors are computed at once, to bound the memory."""

Tokens = NDArray[np.int32]
Pixels = NDArray[np.uint8]
"""(H, W, 3) or (N, H, W, 3): red, green and blue."""


@dataclass(frozen=True, eq=False)
class ImageFormat:
    """Size and colors of the images of a model."""

    height: int
    width: int
    palette: NDArray[np.float32]
    """(K, 3) red, green and blue in [-1, 1]: color k is what token k means."""

    @property
    def n_pixels(self) -> int:
        """Tokens of an image, without SOS."""
        return self.height * self.width

    @property
    def sos(self) -> int:
        """The id that begins an image: the one after the colors, as in ImageGPT."""
        return len(self.palette)

    @property
    def colors(self) -> Pixels:
        """The palette as it is displayed, (K, 3)."""
        return np.rint(127.5 * (self.palette.clip(-1, 1) + 1)).astype(np.uint8)

    def quantize(self, images: Pixels) -> Tokens:
        """Return the token of each pixel in raster order, (N, H * W).

        Args:
            images: (N, H, W, 3).

        Raises:
            ValueError: the images have another size.
        """
        n = len(images)
        if images.shape != (n, self.height, self.width, 3):
            raise ValueError(f"{images.shape[1:]} instead of {(self.height, self.width, 3)}")
        pixels = (images.reshape(-1, 3).astype(np.float32) - 127.5) / 127.5  # (R, 3) in [-1, 1]
        clusters = self.palette.T.astype(np.float32)  # (3, K)
        tokens = np.empty(len(pixels), np.int32)
        for start in range(0, len(pixels), _ROWS):
            rows = pixels[start : start + _ROWS]
            # |a - b|^2 without |a|^2, which is the same for all colors
            distances = (clusters**2).sum(0) - 2 * rows @ clusters  # (R, K)
            tokens[start : start + _ROWS] = distances.argmin(1)
        return tokens.reshape(n, self.n_pixels)

    def render(self, tokens: NDArray[np.integer]) -> Pixels:
        """Return the images of tokens: (N, H, W, 3).

        Args:
            tokens: (N, H * W) in raster order, without SOS.
        """
        images: Pixels = self.colors[tokens]  # (N, H * W, 3)
        return images.reshape(len(tokens), self.height, self.width, 3)


def read_image_format(folder: Path) -> ImageFormat | None:
    """Return the format of an image model's folder; None: it holds no image model.

    Raises:
        UserError: its `preprocessor_config.json` names no palette or size.
    """
    path = folder / PROCESSOR_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text("utf-8"))
        if values.get("clusters") is None:
            return None
        palette = np.asarray(values["clusters"], np.float32)
        size = values["size"]  # a number in the files of older versions of transformers
        height, width = (size, size) if isinstance(size, int) else (size["height"], size["width"])
        if palette.ndim != 2 or palette.shape[1] != 3 or not np.isfinite(palette).all():
            raise ValueError(f"clusters of shape {palette.shape}")
        return ImageFormat(int(height), int(width), palette)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"its {PROCESSOR_FILE} cannot be used: {first_line(error)}",
            field="model.path",
            value=folder,
            valid="the file of an ImageGPT model, with clusters (K, 3) and size",
        ) from error


class PixelTokenizer:
    """Takes the place of a text model's tokenizer: a color is written as six hex digits.

    Args:
        image_format: palette of the tokens; the next id is SOS, which is written as nothing.
    """

    eos_token_id = None

    def __init__(self, image_format: ImageFormat) -> None:
        self._format = image_format
        self._texts = [f"{r:02x}{g:02x}{b:02x} " for r, g, b in image_format.colors.tolist()]
        self.bos_token_id = image_format.sos
        self._texts.append("")

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the colors of token ids, each followed by a space."""
        return "".join(self._texts[token] for token in tokens)

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        """Return the `input_ids` of the colors in a text; other words have none."""
        ids = {name.strip(): token for token, name in enumerate(self._texts[:-1])}
        return SimpleNamespace(input_ids=[ids[word] for word in text.split() if word in ids])

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the file that transformers' `ImageGPTImageProcessor` reads."""
        image_format = self._format
        values = {
            "image_processor_type": "ImageGPTImageProcessor",
            "clusters": image_format.palette.tolist(),
            "size": {"height": image_format.height, "width": image_format.width},
            "do_color_quantize": True,
            "do_normalize": True,
            "do_resize": True,
            "resample": 2,
        }
        write_json(Path(folder) / PROCESSOR_FILE, values)
