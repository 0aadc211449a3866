"""Nearest neighbours in feature space: which generated images are nearly images of the training set.

Features of EfficientNet-Lite0 tell images apart best: of 360 random OpenMoji at 128 px, 7 % have another one within
the threshold for near-duplicates, such as opposite arrows or one flag in two shades; with VGG16's relu4_3 it is 33 %.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch.nn import functional

from ..data.images import image_grid, to_pil
from ..runtime.reproducibility import stream_seed

MEMORISED_QUANTILE = 0.05
NEIGHBOUR_NETWORK = "efficientnet_lite0"


def nearest_neighbours(
    queries: torch.Tensor, keys: torch.Tensor, exclude_self: bool = False, chunk: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine distance (N,) of each query (N, D) to its nearest key (M, D), and that key's index (N,).

    Args: `exclude_self`: query i is key i and must not find itself.
    """
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} features and keys {keys.shape[1]}")
    if exclude_self and (len(queries) != len(keys) or len(keys) < 2):
        raise ValueError(f"exclude_self needs the same 2 or more images twice, got {len(queries)} and {len(keys)}")
    # float64: distances of near-duplicates are differences of numbers near 1
    queries, keys = (functional.normalize(features.double(), dim=1) for features in (queries, keys))
    distances, indices = [], []
    for start in range(0, len(queries), chunk):
        distance = 1 - queries[start : start + chunk] @ keys.T  # (chunk, M)
        if exclude_self:
            rows = torch.arange(len(distance))
            distance[rows, rows + start] = float("inf")
        nearest = distance.min(1)
        distances.append(nearest.values.clamp_min(0))
        indices.append(nearest.indices)
    return torch.cat(distances).float(), torch.cat(indices)


def shifted_or_flipped(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One slightly changed copy of each image (B, 3, H, W): shifted by up to a 32nd of the side, half of them flipped.

    A 32nd is 4 of 128 pixels. The shift is never zero in both directions; borders are repeated.
    """
    reach = max(1, min(images.shape[2:]) // 32)
    padded = functional.pad(images.float(), [reach] * 4, mode="replicate").to(images.dtype)
    height, width = images.shape[2:]
    copies = []
    for image in padded:
        top, left = reach, reach
        while (top, left) == (reach, reach):
            top, left = torch.randint(0, 2 * reach + 1, (2,), generator=generator).tolist()
        copy = image[:, top : top + height, left : left + width]
        copies.append(copy.flip(-1) if torch.rand((), generator=generator) < 0.5 else copy)
    return torch.stack(copies)


def near_duplicate_threshold(
    images: torch.Tensor,
    features: torch.Tensor,
    extract: Callable[[torch.Tensor], torch.Tensor],
    seed: int,
    quantile: float = 0.95,
) -> float:
    """The distance below which an image counts as a near-duplicate of another, taken from the training images.

    It is the 95th percentile of the cosine distances between training images and their own shifted or flipped copies:
    what is nearer to a training image than that is as near as the same picture moved by a few pixels. Real images that
    are no copies can lie below it too: report how many real images do.

    Args:
        images: uint8 (N, 3, H, W), a sample of the training images.
        features: theirs, (N, D).
        extract: uint8 images to features (N, D).
        seed: decides the copies.
    """
    copies = extract(shifted_or_flipped(images, torch.Generator().manual_seed(stream_seed("shifted copies", seed))))
    distance = 1 - functional.cosine_similarity(features.double(), copies.double(), dim=1)
    return torch.quantile(distance.clamp_min(0), quantile).item()


@dataclass
class Memorised:
    """How many images lie nearer to a training image than real held-out ones do.

    Attributes:
        share: part of the images whose nearest training image is nearer than `threshold`. New samples of the training
            distribution get `quantile`.
        threshold: the `quantile` of the cosine distances of held-out images to their nearest training images.
        share_of_copies: part of the copies that is found; None if there were none. Where it is small, a small `share`
            says nothing.
    """

    share: float
    threshold: float
    quantile: float
    num_images: int
    num_held_out: int
    num_training: int
    share_of_copies: float | None


def memorised(
    generated: torch.Tensor, held_out: torch.Tensor, training: torch.Tensor, copies: torch.Tensor | None = None
) -> Memorised:
    """The share of generated images that lie nearer to a training image than all but 5 % of real held-out images do.

    Args:
        generated, held_out, training: features (N, D), (M, D) and (K, D) of one network. `training` must be all
            training images: without some of them, copies are missed. Generated images went through a decoder, so
            held-out ones should have gone through the same autoencoder.
        copies: features (L, D) of training images after that autoencoder. The share of these that is found says how
            much a low share of the generated images means.
    Raises: ValueError: fewer held-out images than the quantile needs (20 for 5 %).
    """
    check_held_out(len(held_out))
    quantile = MEMORISED_QUANTILE
    threshold = torch.quantile(nearest_neighbours(held_out, training)[0], quantile).item()

    def below(features: torch.Tensor) -> float:
        return (nearest_neighbours(features, training)[0] < threshold).double().mean().item()

    found = None if copies is None else below(copies)
    return Memorised(below(generated), threshold, quantile, len(generated), len(held_out), len(training), found)


def check_held_out(count: int) -> None:
    """Raises: ValueError if there are too few held-out images for the quantile."""
    if count * MEMORISED_QUANTILE < 1:
        raise ValueError(
            f"memorisation is measured against the nearest {MEMORISED_QUANTILE:.0%} of held-out images: there are "
            f"{count}, expected at least {round(1 / MEMORISED_QUANTILE)}"
        )


def neighbour_grid(
    queries: torch.Tensor, neighbours: torch.Tensor, distances: torch.Tensor, columns: int = 8
) -> Image.Image:
    """Pairs, each generated image above its neighbour, in the order given, labelled with the distance.

    Args: `queries`, `neighbours`: uint8 (N, 3, H, W), of one size; `distances`: (N,).
    """
    pairs = []
    for query, neighbour in zip(to_pil(queries), to_pil(neighbours), strict=True):
        pair = Image.new("RGB", (query.width, query.height * 2), "white")
        pair.paste(query, (0, 0))
        pair.paste(neighbour, (0, query.height))
        pairs.append(pair)
    return image_grid(pairs, columns, [f"{distance:.4f}" for distance in distances.tolist()])
