"""Multi-crop views and block masks of self-supervision, with the values DINOv2 publishes (arXiv:2304.07193 and its
`ssl_default_config.yaml`).

Crops are cut and recoloured on the device, in batches, from numbers drawn beforehand, so that what happens to a sample
depends on its position in the run alone. Differences from DINOv2: the four changes of colour have a fixed order, not a
random one; hue is rotated in the YIQ plane; a crop that does not fit is made smaller instead of drawn again; blur has
the probabilities that DINOv2 states: 1 for the first global view, .1 for the second, .5 for local ones, as in BYOL
(arXiv:2006.07733) and DINO. DINOv2's code passes on 1 - p instead, so that it ran with about 0, .9 and .5; nothing
says that this was intended.

Constants are Python numbers or copied by `to_device`: `torch.tensor(..., device=...)` would wait until everything that
is queued on the device is done.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from ..data.images import from_uint8, to_device
from ..runtime.config import Settings, setting
from ..runtime.reproducibility import exact_float32

# Probabilities and strengths of DINOv2's `DataAugmentationDINO`.
FLIP, JITTER, GREY = 0.5, 0.8, 0.2
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
BLUR_FIRST_GLOBAL, BLUR_OTHER_GLOBAL, BLUR_LOCAL = 1.0, 0.1, 0.5
BLUR_SIGMA, BLUR_RADIUS = (0.1, 2.0), 4  # pixels
SOLARIZE_OTHER_GLOBAL = 0.2
ASPECT_RATIO = (3 / 4, 4 / 3)
NUM_DRAWS = 14  # uniform numbers per crop
GREY_WEIGHTS = (0.299, 0.587, 0.114)
TO_YIQ = np.array([GREY_WEIGHTS, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])
# Rotating hue by an angle is TURN[0] + cos(angle) TURN[1] + sin(angle) TURN[2], on colours in RGB: (3, 3, 3).
TURN = torch.from_numpy(
    np.linalg.inv(TO_YIQ)
    @ np.array([np.diag((1, 0, 0)), np.diag((0, 1, 1)), [(0, 0, 0), (0, 0, -1), (0, 1, 0)]])
    @ TO_YIQ
)
MIN_MASK_PATCHES, MIN_MASK_ASPECT, MASK_ATTEMPTS = 4, 0.3, 10
MIN_MASK_GRID = 3  # smallest grid, patches a side: a block is smaller than the grid, but usually has four patches


@dataclass(kw_only=True)
class CropConfig(Settings):
    """Views of an image; the defaults are DINOv2's, except that global crops are as large as the training images."""

    global_crops: int = setting(2, "large views per image, for teacher and student", at_least=2)
    global_size: int | None = setting(None, "their side in pixels; none: data.resolution", at_least=1)
    global_scale: tuple[float, float] = setting(
        (0.32, 1.0), "smallest and largest share of the image's area", above=0, at_most=1, ordered=True
    )
    local_crops: int = setting(8, "small views per image, for the student only", at_least=0)
    local_size: int = setting(96, "their side in pixels", at_least=1)
    local_scale: tuple[float, float] = setting(
        (0.05, 0.32), "smallest and largest share of the image's area", above=0, at_most=1, ordered=True
    )
    colour: bool = setting(True, "jitter colours, blur and solarize as DINOv2 does")
    recipe: Literal["dinov2", "version_0_1"] = setting(
        "dinov2", "how crops are cut and masks drawn; runs of version 0.1 keep version_0_1", before="version_0_1"
    )


def draw_crops(config: CropConfig, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The random numbers of `make_crops` for `count` images: "crops" (count, views, NUM_DRAWS) uniform in [0, 1)."""
    shape = (count, config.global_crops + config.local_crops, NUM_DRAWS)
    return {"crops": torch.rand(shape, generator=generator, device=generator.device)}


def make_crops(
    images: torch.Tensor, config: CropConfig, draws: torch.Tensor, change: Callable | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Global and local views of every image.

    Args:
        images: (B, 3, H, W), uint8 or float in [-1, 1].
        config: sizes, numbers and scales.
        draws: (B, views, NUM_DRAWS), as of `draw_crops`.
        change: `recolour_views`, or its compiled version.
    Returns: global views (G·B, 3, S, S) and local ones (L·B, 3, s, s) in [-1, 1], all images' first view first.
    """
    images = from_uint8(images) if images.dtype == torch.uint8 else images.float()
    draws = draws.transpose(0, 1)  # (views, B, NUM_DRAWS)
    large, small = draws[: config.global_crops], draws[config.global_crops :]
    resample = cut if config.recipe == "dinov2" else cut_as_version_0_1
    views = resample(images, large.flatten(0, 1), config.global_scale, config.global_size or images.shape[-1])
    local = images.new_empty(0, 3, config.local_size, config.local_size)
    if config.local_crops > 0:
        local = resample(images, small.flatten(0, 1), config.local_scale, config.local_size)
    if config.colour:
        change, turn = change or recolour_views, to_device(TURN.float(), images.device)
        views = change(views, large, turn, (BLUR_FIRST_GLOBAL, BLUR_OTHER_GLOBAL), (0.0, SOLARIZE_OTHER_GLOBAL))
        if config.local_crops > 0:
            local = change(local, small, turn, (BLUR_LOCAL, BLUR_LOCAL), (0.0, 0.0))
    return views, local


def recolour_views(
    views: torch.Tensor,
    draws: torch.Tensor,
    turn: torch.Tensor,
    blur: tuple[float, float],
    solarize: tuple[float, float],
) -> torch.Tensor:
    """Views (V·B, 3, s, s) in [-1, 1] with changed colours, some blurred and solarized.

    A function of its own, since `compile_parts` compiles it: it is bound by memory.

    Args:
        draws: (V, B, NUM_DRAWS).
        turn: TURN.
        blur, solarize: probabilities in the first view and in the others.
    """
    blurred, solarized = (
        torch.cat([draw[:1] < first, draw[1:] < others]).flatten()  # (V·B,)
        for draw, (first, others) in ((draws[..., 11], blur), (draws[..., 13], solarize))
    )
    draws = draws.flatten(0, 1)  # (V·B, NUM_DRAWS)
    pixels = recolour((views + 1) / 2, draws[:, 5:11], turn)
    sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * draws[:, 12]
    pixels = torch.where(_like(blurred), gaussian_blur(pixels, sigma), pixels)
    if solarize != (0.0, 0.0):
        pixels = torch.where(_like(solarized) & (pixels >= 0.5), 1 - pixels, pixels)
    return pixels * 2 - 1


def _like(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def cut(images: torch.Tensor, draws: torch.Tensor, scale: tuple[float, float], size: int) -> torch.Tensor:
    """Random resized crops, half of them mirrored, bicubic with antialiasing: torchvision's `RandomResizedCrop`, but a
    rectangle that does not fit into the image is made narrower or lower, where torchvision draws again.

    The rows and columns of a crop are weighted sums of the image's, computed by two matrix products.

    Args:
        images: (B, 3, H, W).
        draws: (V·B, >= 5) uniform: area, aspect ratio, left, top, mirroring; all images' first view first.
        scale: bounds of the share of area.
        size: side of the crops.
    Returns: (V·B, 3, size, size), in the order of the draws.
    """
    count, _, height, width = images.shape
    draws = draws.unflatten(0, (-1, count)).transpose(0, 1)  # (B, V, >= 5)
    wide, tall = _sides(draws, scale, height, width)
    across = resampling_weights(*_interval(draws[..., 2], wide, width), width, size)  # (B, V, size, W)
    down = resampling_weights(*_interval(draws[..., 3], tall, height), height, size)  # (B, V, size, H)
    across = torch.where((draws[..., 4] < FLIP)[..., None, None], across.flip(2), across)
    with exact_float32(), torch.autocast(images.device.type, enabled=False):
        rows = down.flatten(1, 2) @ images.transpose(1, 2).flatten(2)  # (B, V·size, 3·W): an image's views together
        rows = rows.unflatten(1, (-1, size)).unflatten(3, (3, -1))  # (B, V, size, 3, W)
        views = torch.einsum("bvscw,bvtw->vbcst", rows, across)
    return views.flatten(0, 1).clamp(-1, 1)


def _sides(
    draws: torch.Tensor, scale: tuple[float, float], height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Width and height in pixels of the rectangles of draws (..., >= 2): area and aspect ratio."""
    area = (scale[0] + (scale[1] - scale[0]) * draws[..., 0]) * height * width
    low, high = (math.log(ratio) for ratio in ASPECT_RATIO)
    ratio = (low + (high - low) * draws[..., 1]).exp()  # width / height
    return (area * ratio).sqrt().clamp(max=width), (area / ratio).sqrt().clamp(max=height)


def _interval(draw: torch.Tensor, length: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First pixel, uniform by `draw`, and number of pixels of an interval of about `length` within `side` pixels."""
    length = length.round().clamp(min=1)
    return torch.minimum((draw * (side - length + 1)).floor(), side - length), length


def resampling_weights(first: torch.Tensor, length: torch.Tensor, side: int, size: int) -> torch.Tensor:
    """Weights (..., size, side) that resample the pixels from `first` to `first + length` (...,), of `side` pixels, to
    `size` pixels by Keys' cubic (1981, a = -1/2). For fewer pixels the cubic is stretched: antialiasing."""
    step = length / size  # (...,) pixels of the image a pixel of the crop
    pixels, places = (torch.arange(count, device=first.device) + 0.5 for count in (side, size))
    inside = pixels - first[..., None]  # (..., side)
    distance = inside[..., None, :] - (places * step[..., None])[..., :, None]
    x = (distance / step.clamp(min=1)[..., None, None]).abs()
    weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    outside = (inside < 0) | (inside > length[..., None])
    weights = weights.masked_fill((x >= 2) | outside[..., None, :], 0)
    return weights / weights.sum(-1, keepdim=True)


def cut_as_version_0_1(
    images: torch.Tensor, draws: torch.Tensor, scale: tuple[float, float], size: int
) -> torch.Tensor:
    """`cut` as in version 0.1, for runs begun with it: bilinear, no antialiasing, rectangles with fractional ends."""
    count, _, height, width = images.shape
    draws = draws.unflatten(0, (-1, count)).transpose(0, 1).flatten(0, 1)  # (B·V, >= 5)
    wide, tall = _sides(draws, scale, height, width)
    wide, tall = wide / width, tall / height
    # shares of the sides; affine_grid's coordinates run from -1 to 1
    centre_x, centre_y = (2 * draws[:, 2] - 1) * (1 - wide), (2 * draws[:, 3] - 1) * (1 - tall)
    mirror = torch.where(draws[:, 4] < FLIP, -1.0, 1.0)
    zero = torch.zeros_like(wide)
    theta = torch.stack([wide * mirror, zero, centre_x, zero, tall, centre_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(theta), 3, size, size], align_corners=False)
    # An image's views are sampled as one tall picture: one call for all of them, without copies of the image.
    tall_views = F.grid_sample(images, grid.view(count, -1, size, 2), padding_mode="border", align_corners=False)
    views = tall_views.unflatten(2, (-1, size))  # (B, 3, V, size, size)
    return views.permute(2, 0, 1, 3, 4).flatten(0, 1)


def recolour(pixels: torch.Tensor, draws: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast, saturation and hue with probability 0.8, then grey with probability 0.2.

    Args: `pixels`: (B, 3, H, W) in [0, 1]; `draws`: (B, 6) uniform: whether, the four strengths, whether grey; `turn`:
        TURN.
    """
    strength = 2 * draws[:, 1:5] - 1  # (B, 4)
    changed = (pixels * _like(1 + BRIGHTNESS * strength[:, 0])).clamp(0, 1)
    mean = _luminance(changed).mean((2, 3), keepdim=True)
    changed = (mean + (changed - mean) * _like(1 + CONTRAST * strength[:, 1])).clamp(0, 1)
    grey = _luminance(changed)
    changed = (grey + (changed - grey) * _like(1 + SATURATION * strength[:, 2])).clamp(0, 1)
    changed = _turn_hue(changed, 2 * math.pi * HUE * strength[:, 3], turn).clamp(0, 1)
    pixels = torch.where(_like(draws[:, 0] < JITTER), changed, pixels)
    return torch.where(_like(draws[:, 5] < GREY), _luminance(pixels), pixels)


def _luminance(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    return sum(weight * channel for weight, channel in zip(GREY_WEIGHTS, pixels.split(1, dim=1), strict=True))


def _turn_hue(pixels: torch.Tensor, angle: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Colours (B, 3, H, W) turned by an angle (B,) in the plane of chrominance of YIQ, by `turn`, TURN; luminance
    stays."""
    weights = torch.stack([torch.ones_like(angle), angle.cos(), angle.sin()], dim=1).to(pixels.dtype)  # (B, 3)
    # no products of matrices, which may be rounded to TF32
    matrix = (weights[:, :, None, None] * turn.to(pixels.dtype)).sum(1)  # (B, 3, 3)
    return sum(matrix[:, :, j, None, None] * pixels[:, j : j + 1] for j in range(3))


def gaussian_blur(pixels: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Separable blur of (B, 3, H, W), `sigma` (B,) its standard deviation in pixels; kernel of 9, borders repeated."""
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=pixels.device)
    kernel = (-0.5 * (offsets / sigma[:, None]) ** 2).softmax(1)  # (B, 9)
    margin = (BLUR_RADIUS, BLUR_RADIUS)
    for dim, margins in ((3, (*margin, 0, 0)), (2, (0, 0, *margin))):
        wide, size = F.pad(pixels, margins, mode="replicate"), pixels.shape[dim]
        pixels = sum(_like(kernel[:, k]) * wide.narrow(dim, k, size) for k in range(len(offsets)))
    return pixels


def block_mask(
    grid: tuple[int, int], count: int, random: np.random.Generator, small_blocks: bool = True
) -> np.ndarray:
    """At most `count` patches hidden in rectangular blocks (BEiT, arXiv:2106.08254, algorithm 1, as DINOv2 has it).

    Args: `grid`: rows and columns of patches; `random`: source of the draws; `small_blocks`: False as in version 0.1,
        where the last one to three patches stay visible if no block of four fits.
    Returns: (rows, columns) bool.
    """
    height, width = grid
    mask, missing = 0, count  # the bits of an integer are the patches, row by row: much faster than small arrays
    while missing > 0:
        for _ in range(MASK_ATTEMPTS):
            size, shape, down, across = random.random(4).tolist()
            largest = missing if small_blocks else max(missing, MIN_MASK_PATCHES)
            area = MIN_MASK_PATCHES + size * (largest - MIN_MASK_PATCHES)
            aspect = math.exp((1 - 2 * shape) * math.log(MIN_MASK_ASPECT))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < rows < height and 0 < columns < width):
                continue
            top, left = int(down * (height - rows + 1)), int(across * (width - columns + 1))
            every_row = ((1 << width * rows) - 1) // ((1 << width) - 1)  # the first patch of each
            block = (((1 << columns) - 1) << left) * every_row << top * width
            if 0 < (block & ~mask).bit_count() <= missing:
                missing -= (block & ~mask).bit_count()
                mask |= block
                break
        else:
            break
    packed = np.frombuffer(mask.to_bytes(-(-height * width // 8), "little"), np.uint8)
    return np.unpackbits(packed, count=height * width, bitorder="little").astype(bool).reshape(grid)
