"""The one reader of images: files and bytes to RGB, crops, and errors that name the image."""

import functools
import io
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile

# what Pillow raises for damaged files (RuntimeError: AVIF), other files than images, and images too large for memory
DECODING_ERRORS = (
    OSError, SyntaxError, EOFError, ValueError, struct.error, RuntimeError, Image.DecompressionBombError
)  # fmt: skip
# 32-bit integers and floats have no fixed range that could be scaled to 8 bits; but see `_check_mode`
REFUSED_MODES = ("I", "F")
LONG = 32  # of an image so many times as long as wide only what the crop shows is enlarged: all of it can fill memory
CROP = "ADM centre crop"  # what `center_crop` does, in the words of latents.json
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip # EXIF orientation -> transposition that undoes it


# end of a message where programs have that option
SKIP_HINT = (
    "--data.skip_unreadable leaves such images out (those of a validation's distance: "
    "--validation.distance.reference.skip_unreadable)"
)
NAMED = 10  # most images that a line on the console names


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


def left_out_line(keys: list[str]) -> str:
    """How many images were left out because they cannot be read, with the first names, for the console."""
    return f"unreadable images, left out: {len(keys)} ({first_names(keys)})"


def first_names(names: list[str]) -> str:
    """At most `NAMED` names in a line."""
    return ", ".join(names[:NAMED]) + ", ..." * (len(names) > NAMED)


@functools.cache
def image_formats() -> dict[str, str]:
    """File name suffix -> format, for every format that Pillow decodes by itself: without those it only recognises,
    and without EPS, for which it starts Ghostscript."""
    Image.init()
    stubs = {name for name, (make, _) in Image.OPEN.items() if ImageFile.StubImageFile in getattr(make, "__mro__", ())}
    known = Image.OPEN.keys() - stubs - {"EPS", "MPEG"}
    return {suffix: name for suffix, name in Image.registered_extensions().items() if name in known}


def is_image_name(name: str) -> bool:
    """Whether the name is that of an image file; hidden files are not."""
    return not name.startswith(".") and Path(name).suffix.lower() in image_formats()


def list_images(folder: Path) -> list[Path]:
    """Image files in a folder, sorted by name, without hidden files and sub-folders. Broken links and pipes are listed
    too: reading refuses them by name."""
    with os.scandir(folder) as entries:  # knows which entries are folders without a call per file
        return sorted(folder / entry.name for entry in entries if is_image_name(entry.name) and not entry.is_dir())


def _open(file: str | Path | io.BytesIO, max_pixels: int | None = None) -> ImageFile.ImageFile:
    if not isinstance(file, io.BytesIO) and not Path(file).is_file():  # opening a pipe would wait for a writer
        raise OSError("it is a broken link, a pipe or something else that is not a file")
    if max_pixels is not None and Image.MAX_IMAGE_PIXELS is not None:  # Pillow itself refuses twice as many pixels
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    image = Image.open(file, formats=sorted(set(image_formats().values())))
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise ValueError(f"it has {image.width} x {image.height} pixels, expected at most max_pixels, {max_pixels}")
    if image.format == "TIFF":
        image.filename = ""  # with a name Pillow maps the file into memory, with the rows of the turned image
    return image


def read_header(path: Path) -> tuple[int, int, str]:
    """Height and width as shown (EXIF orientation) and mode of an image file, without decoding it. RGB of 16 bits has
    the mode "RGB;16" here, because Pillow reduces it to 8. Raises: UnreadableImageError naming the file."""
    try:
        with _open(path) as image:
            _check_mode(image)
            turned = _turn(image) in (TURNS[5], TURNS[6], TURNS[7], TURNS[8])
            height, width = (image.width, image.height) if turned else (image.height, image.width)
            return height, width, "RGB;16" if (image.mode, _stored_bits(image)) == ("RGB", 16) else image.mode
    except DECODING_ERRORS as error:
        raise UnreadableImageError(f"{path} cannot be read as an image: {error}") from error


def _check_mode(image: Image.Image) -> None:
    # a grey PPM file of more than 8 bits has the mode I too, which Pillow scales to 16 bits
    if image.mode in REFUSED_MODES and (image.mode, image.format) != ("I", "PPM"):
        raise ValueError(f"its pixels are of mode {image.mode!r}, expected 8 or 16 bits")


def _stored_bits(image: Image.Image) -> int:
    """Bits per channel in the file. Only Pillow's tile layout tells, and only before decoding."""
    layout = re.search(r";(\d+)", str([tile[3] for tile in getattr(image, "tile", ())]))
    return int(layout[1]) if layout else 8


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The transposition that the EXIF data ask for; None if they are damaged, as in other readers."""
    if image.format == "TIFF":  # Pillow does it itself
        return None
    try:
        # the base class's method: PNG's own decodes the pixels to look for EXIF data after them
        return TURNS.get(Image.Image.getexif(image).get(ExifTags.Base.Orientation))
    except (*DECODING_ERRORS, TypeError, LookupError, ArithmeticError):
        return None


def read_image(path: str | Path, orient: bool = True, max_pixels: int | None = None) -> Image.Image:
    """An image file as RGB, transparency on white. Raises: UnreadableImageError naming the file.

    Args: `orient`: rotate it as its EXIF data say, as viewers and `datasets` do; Pillow always does for TIFF.
        `max_pixels`: images with more are refused before decoding; None: Pillow's limit of 2 x 89,478,485.
    """
    try:
        with _open(path, max_pixels) as image:
            return as_rgb(image, orient)
    except DECODING_ERRORS as error:
        raise UnreadableImageError(f"{path} cannot be read as an image: {error}") from error


def decode_image(
    value: dict[str, Any] | None, name: str, orient: bool = True, max_pixels: int | None = None
) -> Image.Image:
    """An undecoded image of `datasets`, {"bytes", "path"}, as RGB.

    Args: `name`: for the message; `orient`, `max_pixels`: as in `read_image`.
    Raises: UnreadableImageError naming the image, also if it is missing.
    """
    if value is None or value["bytes"] is None and value["path"] is None:
        raise UnreadableImageError(f"{name} is missing")
    if value["bytes"] is None:
        return read_image(value["path"], orient, max_pixels)
    try:
        return as_rgb(_open(io.BytesIO(value["bytes"]), max_pixels), orient)
    except DECODING_ERRORS as error:
        raise UnreadableImageError(f"{name} cannot be read: {error}") from error


def as_rgb(image: Image.Image, orient: bool = True) -> Image.Image:
    """Decode and convert any mode to RGB: grey and palettes to RGB, transparency onto white, the upper 8 of 16 bits.
    An RGB image is returned itself: a copy would take a tenth of the time of decoding.

    Args: `orient`: as in `read_image`.
    Raises: ValueError for 32-bit integers and floats.
    """
    _check_mode(image)
    clear, bits = image.info.get("transparency"), _stored_bits(image)
    inverted = image.format == "TIFF" and image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == 0
    image.load()
    turn = _turn(image) if orient else None
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image)
        eight = (grey >> (4 if bits == 12 else 8)).astype(np.uint8)  # Pillow scales all but the 12 bits of TIFF to 16
        image = Image.fromarray(255 - eight if inverted else eight)  # of 8 bits Pillow itself inverts
        if clear is not None:
            image.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
    elif clear is not None and image.mode == "RGB" and bits == 16:  # in the bit depth of the file
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    elif clear is not None and image.mode == "L" and bits < 8:
        image.info["transparency"] = clear * 255 // (2**bits - 1)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def is_whole_png(path: Path) -> bool:
    """Whether a PNG file exists and is complete, by its checksums and without decoding its pixels."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
            return path.read_bytes()[-8:-4] == b"IEND"
    except DECODING_ERRORS:
        return False


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop (Dhariwal and Nichol, arXiv:2105.05233): halve with a box filter while the short side is at
    least twice the target, scale the short side to the target with a bicubic filter, cut out the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    return _cut_of_resized(image, (width, height), ((width - size) // 2, (height - size) // 2), size)


def _cut_of_resized(image: Image.Image, sides: tuple[int, int], corner: tuple[int, int], size: int) -> Image.Image:
    """The square of this size, from its left upper corner, of the image resized to `sides` with a bicubic filter."""
    (width, height), (left, top) = sides, corner
    if max(image.size) > LONG * min(image.size) and max(sides) > max(image.size):
        x, y = image.width / width, image.height / height
        shown = (left * x, top * y, min((left + size) * x, image.width), min((top + size) * y, image.height))
        return image.resize((size, size), Image.Resampling.BICUBIC, box=shown)
    if image.size != sides:
        image = image.resize(sides, Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def squash(image: Image.Image, size: int) -> Image.Image:
    """The whole image as a square, whatever its shape: torchvision's `Resize((size, size))`, bilinear."""
    return image.resize((size, size), Image.Resampling.BILINEAR)


def resized_center_crop(image: Image.Image, size: int) -> Image.Image:
    """The short side to 8/7 of the size, bicubic, then the centre: torchvision's `Resize(256)`, `CenterCrop(224)`."""
    short, around = min(image.size), round(size * 8 / 7)
    width, height = (int(around * side / short) for side in image.size)
    return _cut_of_resized(image, (width, height), (round((width - size) / 2), round((height - size) / 2)), size)
