"""The images of a record, as pixels and as PNG."""

import base64
import io

import numpy as np
from numpy.typing import NDArray

from hyperfitting.record.schema import Record, Side
from hyperfitting.record.texts import SampleText

SHOWN_PIXELS = 128
"""Height to which small images are enlarged, if it is a multiple of theirs."""
Picture = NDArray[np.uint8]
"""(H, W, 4): red, green, blue and opacity; pixels that are not there are transparent."""


def picture(record: Record, row: int, side: Side | None) -> Picture:
    """Return the completed image of a sample, (H, W, 4).

    Args:
        record: of an image model.
        row: index of the sample.
        side: whose completion; none: the context alone.

    Raises:
        ValueError: the record is of a text model.
    """
    if record.image is None:
        raise ValueError("the record is of a text model")
    sample = record.samples[row]
    parts: list[SampleText] = [sample.context]
    if side is not None:
        parts.append(getattr(sample, side))
    image = record.image
    tokens = [token for part in parts for token in part.tokens if token != image.sos]
    tokens = tokens[: image.height * image.width]
    pixels = np.zeros((image.height * image.width, 4), dtype=np.uint8)
    pixels[: len(tokens), :3] = np.array(image.palette, dtype=np.uint8)[tokens]
    pixels[: len(tokens), 3] = 255
    return pixels.reshape(image.height, image.width, 4)


def enlarged(pixels: Picture) -> Picture:
    """Return a small image with each pixel repeated, about `SHOWN_PIXELS` high."""
    times = max(1, SHOWN_PIXELS // len(pixels))
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def data_uri(pixels: Picture) -> str:
    """Return an image, enlarged, as the address of a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(enlarged(pixels)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
