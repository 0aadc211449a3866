"""The one reader of images: files and bytes to RGB, cropped as ADM does; what cannot be decoded is named."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# what Pillow raises for files that are damaged, are no images, or would fill the memory
DECODING_ERRORS = (OSError, SyntaxError, EOFError, ValueError, struct.error, Image.DecompressionBombError)
# 32-bit integers and floats have no agreed range that could be brought to 8 bits
REFUSED_MODES = ("I", "F")
CROP = "ADM centre crop"  # what `center_crop` does, in the words of latents.json


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


def list_images(folder: Path) -> list[Path]:
    """Image files of a folder by name, hidden ones left out; folders in it are not looked into."""
    files = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in files if not path.name.startswith("."))


def read_header(path: Path) -> tuple[int, int, str]:
    """Height, width and mode of an image file, without decoding it. Pillow has no RGB of 16 bits, it gives their upper
    8: that is "RGB;16" here. Raises: UnreadableImageError naming the file."""
    try:
        with Image.open(path) as image:
            _check_mode(image)
            deep = image.mode == "RGB" and any(";16" in str(tile[3]) for tile in image.tile)  # only the layout tells
            return image.height, image.width, "RGB;16" if deep else image.mode
    except DECODING_ERRORS as error:
        raise UnreadableImageError(f"{path} cannot be read as an image: {error}") from error


def _check_mode(image: Image.Image) -> None:
    if image.mode in REFUSED_MODES:
        raise ValueError(f"its pixels are of mode {image.mode!r}, expected 8 or 16 bits")


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB, transparency on white. Raises: UnreadableImageError naming the file."""
    try:
        with Image.open(path) as image:
            return as_rgb(image)
    except DECODING_ERRORS as error:
        raise UnreadableImageError(f"{path} cannot be read as an image: {error}") from error


def decode_image(value: dict[str, Any] | None, name: str) -> Image.Image:
    """What `datasets` holds of an image that it does not decode, {"bytes", "path"}, as RGB.

    Raises: UnreadableImageError naming it, also where there is none.
    """
    if value is None:
        raise UnreadableImageError(f"{name} is missing")
    if value["bytes"] is None:
        return read_image(value["path"])
    try:
        return as_rgb(Image.open(io.BytesIO(value["bytes"])))
    except DECODING_ERRORS as error:
        raise UnreadableImageError(f"{name} cannot be read: {error}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """RGB from any mode, decoded: greys and palettes to RGB, transparency onto white; of 16 bits the upper 8 are kept.
    An image that is RGB already is given back itself: a copy would take a tenth of the time of decoding.

    Raises: ValueError for 32-bit integers and floats.
    """
    _check_mode(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop (Dhariwal and Nichol, arXiv:2105.05233): halve with a box filter while the short side is at
    least twice the target, scale the short side to the target with a bicubic filter, cut out the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def squash(image: Image.Image, size: int) -> Image.Image:
    """The whole image as a square, whatever its shape: torchvision's `Resize((size, size))`, bilinear."""
    return image.resize((size, size), Image.Resampling.BILINEAR)


def resized_center_crop(image: Image.Image, size: int) -> Image.Image:
    """The short side to 8/7 of the size, bicubic, then the centre: torchvision's `Resize(256)`, `CenterCrop(224)`."""
    short, around = min(image.size), round(size * 8 / 7)
    image = image.resize(tuple(int(around * side / short) for side in image.size), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))
