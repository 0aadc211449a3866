"""Augmentation of training images: flips, shifts, scales, rotations, permuted channels, in batches on the device."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..runtime.config import Settings, setting
from .images import from_uint8

NUM_DRAWS = 9  # uniform numbers that `augment_images` takes an image


@dataclass(kw_only=True)
class AugmentationConfig(Settings):
    """Random changes of training images, made in batches on the device; the defaults change nothing."""

    flip: float = setting(0.0, "probability of mirroring", at_least=0, at_most=1)
    shift: int = setting(0, "shift by up to so many whole pixels, in both directions", at_least=0)
    scale: float = setting(0.0, "scale by a factor in [1 - scale, 1 + scale]", at_least=0, below=1)
    rotation: float = setting(0.0, "rotate by up to so many degrees, both ways", at_least=0)
    hue: float = setting(0.0, "probability of permuting the colour channels", at_least=0, at_most=1)


UNCHANGED = AugmentationConfig()


def augment_images(
    images: torch.Tensor,
    config: AugmentationConfig,
    generator: torch.Generator | None = None,
    draws: torch.Tensor | None = None,
) -> torch.Tensor:
    """Randomly changed images, each with its own draw; what comes in from outside is white.

    Args:
        images: (B, 3, H, W), uint8 or float in [-1, 1].
        generator: source of the draws, on the images' device; None is the default generator.
        draws: (B, NUM_DRAWS) uniform in [0, 1), instead of a generator: for changes keyed by the image.

    Returns:
        (B, 3, H, W) float32 in [-1, 1].
    """
    images = from_uint8(images) if images.dtype == torch.uint8 else images.float()
    if config == UNCHANGED:
        return images
    if draws is None:
        draws = torch.rand(len(images), NUM_DRAWS, generator=generator, device=images.device)
    elif draws.shape != (len(images), NUM_DRAWS):
        raise ValueError(f"draws have shape {tuple(draws.shape)}, expected {(len(images), NUM_DRAWS)}")
    flip, recolour, angle, scale, shift_x, shift_y = draws[:, :6].unbind(1)  # (B,)
    if config.hue > 0:
        order = torch.where(
            recolour[:, None] < config.hue, draws[:, 6:].argsort(1), torch.arange(3, device=images.device)
        )
        images = images.gather(1, order[:, :, None, None].expand_as(images))
    if config.shift > 0 or config.scale > 0 or config.rotation > 0:
        steps = 2 * config.shift + 1
        images = _affine(
            images,
            angle=(2 * angle - 1) * math.radians(config.rotation),
            scale=1 + (2 * scale - 1) * config.scale,
            shift_x=(shift_x * steps).floor() - config.shift,
            shift_y=(shift_y * steps).floor() - config.shift,
        )
    if config.flip > 0:
        images = torch.where((flip < config.flip)[:, None, None, None], images.flip(3), images)
    return images


def _affine(images, angle, scale, shift_x, shift_y) -> torch.Tensor:
    """(B, 3, H, W) rotated (radians) and scaled about the centre, then shifted (pixels), each by its own (B,)."""
    height, width = images.shape[2:]
    # affine_grid maps the output to the input, so all is inverted; its coordinates run from -1 to 1 on either axis
    cos, sin = angle.cos() / scale, angle.sin() / scale
    back_x, back_y = cos * shift_x - sin * shift_y, sin * shift_x + cos * shift_y
    rows = [cos, -sin * height / width, -2 * back_x / width, sin * width / height, cos, -2 * back_y / height]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    # zeros come in from outside, so white is made zero
    return F.grid_sample(images - 1, grid, align_corners=False) + 1
