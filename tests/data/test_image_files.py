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
    resized_center_crop,
)


def test_crop_halves_with_a_box_filter_scales_bicubically_and_cuts_the_centre():
    image = picture(0, (70, 50))
    halved = image.resize((35, 25), Image.Resampling.BOX)  # 50 >= 2 * 20; 25 < 2 * 20
    scaled = halved.resize((28, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(center_crop(image, 20), np.array(scaled)[:, 4:24])


def test_crop_of_the_right_size_is_the_image_and_small_images_are_enlarged():
    assert np.array_equal(center_crop(picture(1, (16, 16)), 16), np.array(picture(1, (16, 16))))
    assert center_crop(picture(2, (5, 9)), 16).size == (16, 16)


@pytest.mark.parametrize("crop", [center_crop, resized_center_crop])
@pytest.mark.parametrize("turned", [False, True])
def test_of_a_very_long_image_only_what_the_crop_shows_is_enlarged(crop, turned, monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(90, 160, (5, 330, 3), dtype=np.uint8))
    image = image.transpose(Image.Transpose.TRANSPOSE) if turned else image
    resize, sizes = Image.Image.resize, []
    monkeypatch.setattr(Image.Image, "resize", lambda i, size, *a, **k: sizes.append(size) or resize(i, size, *a, **k))
    found = np.array(crop(image, 16), dtype=int)
    assert sizes == [(16, 16)]
    monkeypatch.setattr("vtp_diffusion.data.image_files.LONG", 1000)
    assert abs(found - np.array(crop(image, 16))).max() <= 2 and found.std() > 5


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


def grey_tiff(width, bits, photometric, content):
    """One row of uncompressed grey pixels."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 122), (277, 1), (278, 1)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (279, len(content))])
    return {"bytes": b"II*\0" + struct.pack("<IH", 8, 9) + entries + bytes(4) + content, "path": None}


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (grey_tiff(2, 12, 1, bytes.fromhex("fff800")), [255, 128]),
        (grey_tiff(2, 16, 1, struct.pack("<HH", 65535, 32768)), [255, 128]),
        (grey_tiff(2, 16, 0, struct.pack("<HH", 65535, 32768)), [0, 127]),  # white is zero
        (grey_tiff(2, 8, 0, bytes([255, 128])), [0, 127]),
        ({"bytes": b"P5 2 1 65535\n" + struct.pack(">HH", 65535, 32768), "path": None}, [255, 128]),
        ({"bytes": b"P5 2 1 4095\n" + struct.pack(">HH", 4095, 2048), "path": None}, [255, 128]),
        ({"bytes": b"P2 2 1 4095\n4095 2048\n", "path": None}, [255, 128]),
    ],
)
def test_greys_of_any_depth_are_scaled_to_8_bits(file, expected):
    assert np.array(decode_image(file, "it"))[0].tolist() == [[value] * 3 for value in expected]


def test_an_image_without_bytes_and_path_is_missing():
    with pytest.raises(UnreadableImageError, match="it is missing"):
        decode_image({"bytes": None, "path": None}, "it")


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


@pytest.mark.parametrize("mode", ["L", "I;16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_grey_tiff_is_the_same_from_its_file_and_its_bytes(orientation, mode, tmp_path):
    exif, file = Image.Exif(), tmp_path / "0.tif"
    exif[ExifTags.Base.Orientation] = orientation
    grey = np.random.default_rng(0).integers(0, 256, (2, 3), dtype=np.uint8)
    Image.fromarray(grey if mode == "L" else grey.astype(np.uint16) << 8).save(file, exif=exif)
    plain = Image.fromarray(grey)
    plain.getexif()[ExifTags.Base.Orientation] = orientation
    expected = np.array(ImageOps.exif_transpose(plain).convert("RGB"))
    assert np.array_equal(read_image(file), expected) and read_header(file) == (*expected.shape[:2], mode)
    assert np.array_equal(decode_image({"bytes": file.read_bytes(), "path": None}, "it"), expected)
