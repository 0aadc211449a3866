"""Images from files and bytes: crop, transparency, deep pixels, orientation."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from test_image_datasets import picture

from vtp_diffusion.data.image_files import (
    UnreadableImageError,
    as_rgb,
    center_crop,
    decode_image,
    read_header,
    read_image,
)


def test_crop_halves_with_a_box_filter_scales_bicubically_and_cuts_the_centre():
    image = picture(0, (70, 50))
    halved = image.resize((35, 25), Image.Resampling.BOX)  # 50 >= 2 * 20; 25 < 2 * 20
    scaled = halved.resize((28, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(center_crop(image, 20), np.array(scaled)[:, 4:24])


def test_crop_of_the_right_size_is_the_image_and_small_images_are_enlarged():
    assert np.array_equal(center_crop(picture(1, (16, 16)), 16), np.array(picture(1, (16, 16))))
    assert center_crop(picture(2, (5, 9)), 16).size == (16, 16)


def test_transparency_is_shown_on_white_and_deep_greys_are_scaled():
    transparent = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    transparent.putpixel((1, 0), (0, 0, 0, 0))
    assert np.array(as_rgb(transparent)).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    deep = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    assert np.array(as_rgb(deep))[0, :, 0].tolist() == [0, 1, 255]


def tiff(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "TIFF")
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused_wherever_images_are_read(dtype, tmp_path):
    value = tiff(np.ones((2, 2), dtype))
    (tmp_path / "deep.tif").write_bytes(value["bytes"])
    for read in (lambda: decode_image(value, "it"), lambda: read_image(tmp_path / "deep.tif")):
        with pytest.raises(UnreadableImageError, match="its pixels are of mode '[IF]', expected 8 or 16 bits"):
            read()


@pytest.mark.parametrize(("depth", "row", "clear"), [(16, ">HH", 1000), (8, ">BB", 100)])
def test_a_transparent_grey_is_white_whatever_its_bits(depth, row, clear):
    row = b"\0" + struct.pack(row, clear, 0)
    file = png(struct.pack(">IIBBBBB", 2, 1, depth, 0, 0, 0, 0), row, struct.pack(">H", clear))
    assert np.array(decode_image({"bytes": file, "path": None}, "it"))[0, :, 0].tolist() == [255, 0]


def png(header, rows, clear):
    chunks = [(b"IHDR", header), (b"tRNS", clear), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
def test_images_are_turned_as_their_exif_data_say(orientation, suffix, tmp_path):
    exif, plain = Image.Exif(), picture(0, (3, 2))
    exif[ExifTags.Base.Orientation] = orientation
    plain.save(tmp_path / f"0.{suffix}", suffix, exif=exif)
    with Image.open(tmp_path / f"0.{suffix}") as image:
        expected = np.array(ImageOps.exif_transpose(image))  # what `datasets` does
    found = read_image(tmp_path / f"0.{suffix}")
    assert np.array_equal(found, expected) and read_header(tmp_path / f"0.{suffix}")[:2] == expected.shape[:2]
    if suffix == "PNG":  # Pillow itself turns a TIFF
        assert np.array_equal(read_image(tmp_path / "0.PNG", orient=False), plain)
