import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from torchvision import transforms

from vtp_diffusion.data.image_files import as_rgb, resized_center_crop, squash
from vtp_diffusion.data.images import _lines, enlarged, from_uint8, image_grid, pil_to_uint8, to_pil, to_uint8


def test_uint8_round_trip_is_exact_for_every_level():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)


def test_conversion_rounds_and_clamps():
    values = torch.tensor([-7.0, -1.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1.0, 7.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255]


def test_pil_round_trip():
    images = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8)
    assert torch.equal(torch.stack([pil_to_uint8(image) for image in to_pil(images)]), images)


def test_grey_of_16_bits_keeps_the_upper_8():
    levels = np.arange(0, 2**16, 64, dtype=np.uint16).reshape(32, 32)
    assert np.array_equal(pil_to_uint8(as_rgb(Image.fromarray(levels)))[0].numpy(), levels >> 8)


def test_grid_places_images_row_by_row():
    colors = ["red", "green", "blue"]
    grid = image_grid([Image.new("RGB", (100, 20), color) for color in colors], columns=2, padding=1)
    assert grid.size == (204, 44)
    assert [grid.getpixel(at) for at in ((50, 5), (152, 5), (50, 30))] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]


def test_tiny_images_are_enlarged_by_a_whole_factor():
    tiny = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 10, 3), dtype=np.uint8))
    assert np.array_equal(np.array(enlarged(tiny)), np.array(tiny).repeat(10, 0).repeat(10, 1))
    large = Image.new("RGB", (96, 20))
    assert enlarged(large).size == large.size
    assert image_grid([tiny], columns=1, padding=0).size == (100, 200)


def test_captions_take_several_lines_and_lose_nothing():
    font = ImageFont.load_default(size=10)
    for text in ("a label wider than its picture", "transport-ground", "x" * 60, "W", ""):
        lines = _lines(text, 50, font)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(font.getlength(line) <= 50 for line in lines)
    assert _lines("animal-amphibian", 70, font) == ["animal-", "amphibian"]
    heights = [image_grid([Image.new("RGB", (96, 96))], 1, [text]).height for text in ("cat", "x" * 60)]
    assert heights[0] < heights[1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: to_uint8(torch.zeros(3, dtype=torch.int64)),
        lambda: from_uint8(torch.zeros(3)),
        lambda: to_pil(torch.zeros(3, 4, 4)),
        lambda: pil_to_uint8(Image.new("I;16", (2, 2))),
        lambda: image_grid([Image.new("RGB", (1, 1)), Image.new("RGB", (2, 1))], 2),
        lambda: image_grid([Image.new("RGB", (1, 1))], 2, labels=["a", "b"]),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match="got"):
        call()


@pytest.mark.parametrize("size", [(400, 300), (300, 517), (90, 100)])
def test_crops_of_published_protocols_are_torchvisions(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image, mode = Image.fromarray(pixels), transforms.InterpolationMode.BICUBIC
    probe = transforms.Compose([transforms.Resize(256, interpolation=mode), transforms.CenterCrop(224)])
    for ours, theirs in (
        (squash(image, 256), transforms.Resize((256, 256))),
        (resized_center_crop(image, 224), probe),
    ):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs(image)))
