"""Images as pixels: the one float-to-uint8 conversion, PIL and tensors, labelled grids, augmentation in batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from ..runtime.config import Settings, setting

NUM_DRAWS = 9  # uniform numbers that `augment_images` takes an image


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float images in [-1, 1] -> uint8 in [0, 255], clamped and rounded to nearest. Any shape.

    Every picture and every metric of this package goes through this function: projects that truncate or use other
    offsets get slightly different numbers from the same model.
    Raises: ValueError if the tensor is not a floating-point one.
    """
    if not images.is_floating_point():
        raise ValueError(f"expected floating-point images in [-1, 1], got {images.dtype}")
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def finite_to_uint8(images: torch.Tensor, names: Sequence[object] | None = None) -> torch.Tensor:
    """`to_uint8` of images (B, ...) that are to be measured: it alone would make black pixels of what is not a number.

    Raises: ValueError as of `check_finite`.
    """
    check_finite(images, "pixels", names)
    return to_uint8(images)


def check_finite(values: torch.Tensor, what: str, names: Sequence[object] | None = None) -> None:
    """Raises: ValueError if values (B, ...) are not finite, naming the images by `names` or else by their places."""
    finite = values.isfinite().flatten(1).all(1)  # (B,)
    if not finite.all():
        names = range(len(values)) if names is None else names
        broken = [str(name) for name, good in zip(names, finite.tolist(), strict=True) if not good]
        raise ValueError(
            f"{what} of image {', '.join(broken)} are not finite: expected numbers; the weights, their precision "
            f"({values.dtype} {what}) or the settings of the sampler make none"
        )


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """uint8 images in [0, 255] -> float32 in [-1, 1]. Any shape; `to_uint8` undoes it exactly."""
    if images.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images, got {images.dtype}")
    return images.float() / 127.5 - 1


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Float images (B, 3, H, W) in [-1, 1], or uint8 ones, -> PIL images."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images (B, 3, H, W), got {tuple(images.shape)}")
    if images.is_floating_point():
        images = to_uint8(images)
    return [Image.fromarray(array) for array in images.permute(0, 2, 3, 1).cpu().numpy()]


def from_pil(image: Image.Image) -> torch.Tensor:
    """A PIL image -> float32 (3, H, W) in [-1, 1]. Transparent pixels are shown on white."""
    if image.mode != "RGB":
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return from_uint8(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def image_grid(
    images: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None, padding: int = 4
) -> Image.Image:
    """Paste equally sized images row by row on white, each with its label above it when labels are given.

    Args: `columns`: images a row; `padding`: pixels around each image. Raises: ValueError on no images, mixed sizes,
    or a number of labels other than the number of images.
    """
    if not images:
        raise ValueError("a grid needs at least one image")
    if any(image.size != images[0].size for image in images):
        raise ValueError(f"a grid needs images of one size, got {sorted({image.size for image in images})}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"got {len(labels)} labels for {len(images)} images")
    width, height = images[0].size
    font = ImageFont.load_default(size=max(10, min(16, width // 10)))
    text_height = font.size + 4 if labels is not None else 0
    cell_width, cell_height = width + 2 * padding, height + 2 * padding + text_height
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (min(columns, len(images)) * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(grid)
    for index, image in enumerate(images):
        left, top = index % columns * cell_width + padding, index // columns * cell_height + padding
        if labels is not None:
            draw.text((left, top), _shorten(labels[index], width, font), fill="black", font=font)
        grid.paste(image.convert("RGB"), (left, top + text_height))
    return grid


def _shorten(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text


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
