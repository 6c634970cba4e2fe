"""Images as tokens: each pixel is its nearest color of a palette, in raster order (ImageGPT).

The same numbers as `ImageGPTImageProcessor` of transformers, whose `clusters` are the palette.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROWS = 1 << 16
"""Pixels whose distances to all colors are computed at once, to bound the memory."""

Tokens = NDArray[np.int32]
Pixels = NDArray[np.uint8]


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
        return self.colors[tokens].reshape(len(tokens), self.height, self.width, 3)
