"""Image files of any kind are read right, or refused with an error that names the file."""

import io
import logging
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyperfitting.data import image_files
from hyperfitting.data.image_files import find_images, read_image
from hyperfitting.errors import UserError

RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
"""(4, 6, 3)"""
GRAY = np.linspace(0, 65535, 24).astype(np.uint16).reshape(4, 6)


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def png(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + (
        chunk(b"IEND", b"")
    )  # fmt: skip


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".ppm", ".tiff", ".webp"])
def test_a_lossless_file_is_read_pixel_by_pixel(tmp_path: Path, suffix: str) -> None:
    path = save(Image.fromarray(RGB), tmp_path / f"a{suffix}", lossless=True)
    read = read_image(path)
    assert read.dtype == np.uint8
    assert np.array_equal(read, RGB)


def test_the_format_is_that_of_the_content_and_not_of_the_name(tmp_path: Path) -> None:
    path = save(Image.fromarray(RGB), tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(read_image(path), RGB)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bit_gray_is_scaled_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    read = read_image(save(Image.fromarray(GRAY), tmp_path / f"a{suffix}"))
    assert np.array_equal(read, np.repeat(np.rint(GRAY / 257)[:, :, None], 3, axis=2))


def test_values_of_32_bits_are_refused(tmp_path: Path) -> None:
    for values in (GRAY.astype(np.int32) * 9, GRAY.astype(np.float32)):
        path = save(Image.fromarray(values), tmp_path / "deep.tiff")
        with pytest.raises(UserError, match=r"deep\.tiff.*32 bits"):
            read_image(path)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_other_color_spaces_become_rgb(tmp_path: Path, mode: str) -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode)
    read = read_image(save(red, tmp_path / "a.tiff")).astype(int)
    assert np.abs(read - [255, 0, 0]).max() <= 2


def test_a_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    read = read_image(save(cyan, tmp_path / "a.jpg", quality=100)).astype(int)
    assert np.abs(read - [0, 255, 255]).max() <= 4


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_gray_black_and_white_and_palettes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.uint8([[0, 255], [255, 0]])).convert(mode)
    read = read_image(save(image, tmp_path / "a.png"))
    assert read.tolist() == [[[0] * 3, [255] * 3], [[255] * 3, [0] * 3]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "P":
        image = image.quantize(4)
    path = save(image.convert(mode), tmp_path / "a.png")
    assert read_image(path).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 3), (8, 1)])
def test_an_image_is_turned_upright(tmp_path: Path, orientation: int, turns: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(RGB), tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(path), np.rot90(RGB, turns))


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tiff"])
def test_of_an_animation_the_first_frame_is_read_with_a_warning(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Image.new("RGB", (4, 4), "white"), Image.new("RGB", (4, 4), "black")
    path = save(first, tmp_path / f"a{suffix}", save_all=True, append_images=[second])
    with caplog.at_level(logging.WARNING):
        assert (read_image(path) >= 254).all()
    assert "only its first frame" in caplog.text
    assert str(path) in caplog.text


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".tiff", ".webp"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(Image.fromarray(noise), tmp_path / f"cut{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"cut{suffix}"):
        read_image(path)


@pytest.mark.parametrize("size", [(30_000, 30_000), (20_000, 5_000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size))
    with pytest.raises(UserError, match=r"bomb\.png.*too many pixels"):
        read_image(path)


def test_a_file_of_too_many_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.touch()
    os.truncate(path, image_files.MAX_BYTES + 1)
    with pytest.raises(UserError, match=r"large\.png.*bytes"):
        read_image(path)


@pytest.mark.parametrize(
    "content", [b"", b"It was a dark night.", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", png(0, 0)]
)
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png") as error:
        read_image(path)
    assert "PNG" in str(error.value)


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "none.png", tmp_path, tmp_path / "pipe.png"):
        with pytest.raises(UserError, match="no such file"):
            read_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_give_an_image_or_a_user_error(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(buffer, kind, exif=exif)
    rng = random.Random(0)
    path = tmp_path / "a"
    for _ in range(15):
        content = bytearray(buffer.getvalue())
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            read = read_image(path)
        except UserError as error:
            assert str(path) in str(error)
        else:
            assert read.ndim == 3


def test_a_folder_is_searched_for_images(tmp_path: Path) -> None:
    names = ("b.PNG", "a.jpg", "sub/c.webp")
    for name in (*names, "notes.txt", ".hidden/d.png", ".e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == [tmp_path / name for name in ("a.jpg", "b.PNG", "sub/c.webp")]


def test_a_folder_of_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("It was a dark night.")
    with pytest.raises(UserError, match="no image in it"):
        find_images(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_images(tmp_path / "a.txt")
