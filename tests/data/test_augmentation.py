"""Random changes of training images, made in batches."""

import pytest
import torch

from vtp_diffusion.data.batches import NUM_DRAWS, AugmentationConfig, augment_images
from vtp_diffusion.data.images import from_uint8


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 3, 12, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def draws_of(images, seed=1):
    return torch.rand(len(images), NUM_DRAWS, generator=torch.Generator().manual_seed(seed))


def seeded(images, **settings):
    return augment_images(images, AugmentationConfig(**settings), draws_of(images))


def test_the_default_changes_nothing(images):
    assert torch.equal(seeded(images), from_uint8(images))
    assert torch.equal(seeded(from_uint8(images)), from_uint8(images))


def test_flips(images):
    assert torch.equal(seeded(images, flip=1.0), from_uint8(images).flip(3))
    some = seeded(images, flip=0.5)
    flipped = [torch.equal(one, other.flip(2)) for one, other in zip(some, from_uint8(images), strict=True)]
    plain = [torch.equal(one, other) for one, other in zip(some, from_uint8(images), strict=True)]
    assert any(flipped) and any(plain) and all(a or b for a, b in zip(flipped, plain, strict=True))


def test_shifts_move_whole_pixels_and_bring_in_white(images):
    padded = torch.nn.functional.pad(from_uint8(images), (2, 2, 2, 2), value=1.0)
    found = set()
    for image, source in zip(seeded(images, shift=2), padded, strict=True):
        matches = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.allclose(source[:, y : y + 12, x : x + 16], image, atol=1e-4)
        ]
        assert len(matches) == 1
        found |= set(matches)
    assert len(found) > 2


def test_shifts_use_every_step_of_either_side():
    dot = torch.ones(400, 3, 9, 9)
    dot[:, :, 4, 4] = -1
    moved = augment_images(dot, AugmentationConfig(shift=1), draws_of(dot))
    places = moved[:, 0].flatten(1).argmin(1)
    assert {(place // 9 - 4, place % 9 - 4) for place in places.tolist()} == {
        (y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)
    }


def test_a_rotation_by_a_quarter_turn():
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    draws = torch.full((1, NUM_DRAWS), 0.5)
    draws[:, 2] = 1.0  # the largest angle
    turned = augment_images(image, AugmentationConfig(rotation=90.0), draws=draws)
    assert any(torch.allclose(turned, image.rot90(k, (2, 3)), atol=1e-5) for k in (1, 3))


def test_scaling_by_two_enlarges_the_centre():
    image = torch.ones(1, 3, 8, 8)
    image[:, :, 3:5, 3:5] = -1
    draws = torch.full((1, NUM_DRAWS), 0.5)
    draws[:, 3] = 1.0  # the largest scale
    # 0.999 and not 1: a scale of 1 would allow images of no size
    scaled = augment_images(image, AugmentationConfig(scale=0.999), draws=draws)
    assert (scaled[0, 0] < 0.5).sum() == 16 and (scaled[0, 0, 2:6, 2:6] < 0.5).all()


def test_hue_permutes_channels(images):
    for changed, image in zip(seeded(images, hue=1.0), from_uint8(images), strict=True):
        assert sorted(changed.sum((1, 2)).tolist()) == pytest.approx(sorted(image.sum((1, 2)).tolist()), abs=1e-3)
    assert not torch.equal(seeded(images, hue=1.0), from_uint8(images))


def test_draws_decide_everything(images):
    settings = {"flip": 0.5, "shift": 2, "scale": 0.2, "rotation": 10.0, "hue": 0.5}
    one = seeded(images, **settings)
    assert torch.equal(one, seeded(images, **settings))
    # what one image becomes does not depend on its batch
    alone = augment_images(images[2:3], AugmentationConfig(**settings), draws=draws_of(images)[2:3])
    assert torch.allclose(alone, one[2:3], atol=1e-5)
    with pytest.raises(ValueError, match=r"draws have shape \(1, 9\), expected \(6, 9\)"):
        augment_images(images, AugmentationConfig(**settings), draws_of(images)[:1])


@pytest.mark.parametrize("settings", [{"flip": 1.5}, {"hue": -0.1}, {"shift": -1}, {"scale": 1.0}, {"rotation": -5.0}])
def test_augmentations_out_of_range(settings):
    with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
        AugmentationConfig(**settings)
