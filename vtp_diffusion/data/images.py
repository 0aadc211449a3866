"""Image tensors: the one float-to-uint8 conversion, PIL conversion, copies to a device, and labelled grids."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

Rounding = Literal["half to even", "half up"]
SHOWN_SIDE = 96  # pixels; narrower images are enlarged in pictures


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to the device without waiting for the work queued there."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def to_uint8(images: torch.Tensor, rounding: Rounding = "half to even") -> torch.Tensor:
    """Float images in [-1, 1] -> uint8 in [0, 255], clamped and rounded to nearest. Any shape.

    Every picture and every metric of this package goes through this function: projects that truncate or use other
    offsets get slightly different numbers from the same model.
    Args: `rounding`: of values halfway between two integers; "half up" is 127.5 x + 128 truncated, as in DiT and iMF.
    Raises: ValueError if the tensor is not a floating-point one.
    """
    if not images.is_floating_point():
        raise ValueError(f"expected floating-point images in [-1, 1], got {images.dtype}")
    if rounding == "half up":
        return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def finite_to_uint8(
    images: torch.Tensor, names: Sequence[object] | None = None, rounding: Rounding = "half to even"
) -> torch.Tensor:
    """`to_uint8` for images (B, ...) that are measured: NaN is an error, where `to_uint8` makes it a black pixel.

    Raises: ValueError as `check_finite`.
    """
    check_finite(images, "pixels", names)
    return to_uint8(images, rounding)


def check_finite(values: torch.Tensor, what: str, names: Sequence[object] | None = None) -> None:
    """Raises: ValueError if values (B, ...) are not finite, naming the images by `names` or their indices."""
    finite = values.isfinite().flatten(1).all(1)  # (B,)
    if not finite.all():
        names = range(len(values)) if names is None else names
        broken = [str(name) for name, good in zip(names, finite.tolist(), strict=True) if not good]
        raise ValueError(
            f"{what} of image {', '.join(broken)} are not finite, expected finite numbers: check the weights, their "
            f"precision ({values.dtype} {what}) and the settings of the sampler"
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


def pil_to_uint8(image: Image.Image) -> torch.Tensor:
    """An RGB image, as `data.image_files` reads them -> uint8 (3, H, W); `to_pil` undoes it.

    Raises: ValueError for another mode: Pillow's own conversion would clip 16 bits instead of scaling them.
    """
    if image.mode != "RGB":
        raise ValueError(f"got an image of mode {image.mode}, expected RGB: convert it with `image_files.as_rgb`")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def enlarged(image: Image.Image) -> Image.Image:
    """A tiny image enlarged by a whole factor to at least `SHOWN_SIDE` wide; larger images unchanged."""
    factor = -(-SHOWN_SIDE // image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def image_grid(
    images: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None, padding: int = 4
) -> Image.Image:
    """Paste equally sized images row by row on white, each with its label above it when labels are given.

    Tiny images are `enlarged`; a label that is wider than its image takes several lines.

    Args: `columns`: images per row; `padding`: pixels around each image.
    Raises: ValueError on no images, mixed sizes, or a number of labels other than the number of images.
    """
    if not images:
        raise ValueError("a grid needs at least one image")
    if any(image.size != images[0].size for image in images):
        raise ValueError(f"a grid needs images of one size, got {sorted({image.size for image in images})}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"got {len(labels)} labels for {len(images)} images")
    images = [enlarged(image.convert("RGB")) for image in images]
    width, height = images[0].size
    font = ImageFont.load_default(size=max(10, min(16, width // 10)))
    texts = ["\n".join(_lines(label, width, font)) for label in labels or []]
    text_height = (font.size + 4) * max((text.count("\n") + 1 for text in texts), default=0)
    cell_width, cell_height = width + 2 * padding, height + 2 * padding + text_height
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (min(columns, len(images)) * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(grid)
    for index, image in enumerate(images):
        left, top = index % columns * cell_width + padding, index // columns * cell_height + padding
        if texts:
            draw.multiline_text((left, top), texts[index], fill="black", font=font, spacing=2)
        grid.paste(image, (left, top + text_height))
    return grid


def _lines(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """A text in lines no wider than `width`, broken after spaces and hyphens where there are any."""
    lines = []
    while font.getlength(text) > width and len(text) > 1:
        fitting = max(1, next(k for k in range(len(text), -1, -1) if font.getlength(text[:k]) <= width))
        end = max(text.rfind(mark, 0, fitting) + 1 for mark in " -") or fitting
        lines, text = [*lines, text[:end].rstrip()], text[end:].lstrip()
    return [*lines, text]
