"""Reading untrusted images, files or their bytes: as RGB, or a UserError that names the image.

Pillow decodes them, in the formats of `FORMATS` only: none that starts another program, such as
Ghostscript. Size and number of pixels are checked before anything is decoded.
"""

import io
import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hyperfitting.errors import UserError, exhausted_resource
from hyperfitting.models.image_format import Pixels

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is read, whatever the name of the file says."""
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Names by which images are found in a folder, in any case."""
MAX_BYTES = 2**28
"""Larger files are refused (256 MiB)."""
MAX_PIXELS = 2**26
"""Images of more pixels are refused (67 megapixels: 201 MB decoded), decompression bombs among
them."""

_DEEP_MODES = {"I;16": 16, "I;16L": 16, "I;16B": 16, "I;16N": 16}
"""Grayscale modes of Pillow with more than 8 bits, and how many."""
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")

log = logging.getLogger(__name__)


def find_images(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, in the order of their paths.

    Hidden files and folders are left out.

    Raises:
        UserError: it is no folder, or has no image.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder", hint="a folder of images")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise UserError(f"{folder}: there is no image in it", valid=" ".join(SUFFIXES))
    return paths


def read_image(path: Path) -> Pixels:
    """Return an image file as (H, W, 3) red, green and blue, upright.

    The orientation in its EXIF data is applied; 16 bits are scaled to 8; palettes, gray and CMYK
    are converted to RGB, without color profiles; transparent parts become white; of an animation
    the first frame is read, with a warning.

    Raises:
        UserError: it is missing, too large, damaged, or no image that is read.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file", hint="an image file")
    return _decode(path, path.stat().st_size, str(path))


def decode_image(content: bytes, name: str) -> Pixels:
    """Return the image in the bytes of an image file as `read_image` does.

    Args:
        content: of the file.
        name: of the image, for errors.

    Raises:
        UserError: it is too large, damaged, or no image that is read.
    """
    return _decode(io.BytesIO(content), len(content), name)


def _decode(file: Path | io.BytesIO, n_bytes: int, name: str) -> Pixels:
    if n_bytes > MAX_BYTES:
        raise _error(name, f"has {n_bytes} bytes", f"at most {MAX_BYTES}", "resize it first")
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(name, image)
            if getattr(image, "n_frames", 1) > 1:
                log.warning("%s is animated: only its first frame is read", name)
                image.seek(0)
            image.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise _error(name, "is not an image that can be read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(name) from error
    except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
        if exhausted_resource(error) is not None or isinstance(error, PermissionError):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise _error(name, f"is damaged or of a kind that is not read ({reason})") from error


def _check_size(name: str, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_many_pixels(name, f" ({width} x {height})")
    if width * height == 0:
        raise _error(name, "has no pixels")


def _too_many_pixels(name: str, size: str = "") -> UserError:
    return _error(name, f"has too many pixels{size}", f"at most {MAX_PIXELS}", "resize it first")


def _error(name: str, problem: str, valid: str = "", hint: str = "") -> UserError:
    return UserError(
        f"{name}: {problem}",
        valid=valid or ", ".join(FORMATS),
        hint=hint or "save it again as PNG or JPEG with 8 bits a channel, or remove it",
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return a decoded image in RGB.

    Raises:
        ValueError: Pillow cannot convert it.
    """
    if image.mode in _DEEP_MODES or image.mode in ("I", "F"):
        return _scaled_to_8_bits(image)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        foreground = image.convert("RGBA")
        background = Image.new("RGBA", foreground.size, "white")
        return Image.alpha_composite(background, foreground).convert("RGB")
    return image.convert("RGB")


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """Return a grayscale image of 16 bits a pixel in RGB.

    Raises:
        ValueError: its values are not within 16 bits: what is black and white is not known.
    """
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F" or values.min() < 0 or values.max() > 2**16 - 1:
        raise ValueError("32 bits a pixel: black and white are not known")
    scaled = np.rint(values / (2**16 - 1) * 255).astype(np.uint8)  # (H, W)
    return Image.fromarray(scaled).convert("RGB")
