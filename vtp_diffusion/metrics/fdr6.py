"""FDr6: the mean of Fréchet distances on six networks, each divided by that of real images (arXiv:2604.28190)."""

from collections.abc import Mapping
from dataclasses import dataclass

# FD of ImageNet's validation images against its training set, 50,000 against all, 256 px (FD-loss, its repository)
PUBLISHED_CONSTANTS = {
    "inception": 1.68,
    "convnextv2_b": 56.87,
    "dinov2_l": 14.19,
    "mae_l": 0.04,
    "siglip2_so400m": 0.60,
    "clip_l": 5.60,
}
SIX = tuple(PUBLISHED_CONSTANTS)


@dataclass
class FDr6:
    """The mean of six ratios, and what it is made of.

    Attributes:
        value: arithmetic mean of `ratios`. Real images get 1.
        distances, constants, ratios: network -> Fréchet distance, its divisor, and the quotient.
    """

    value: float
    distances: dict[str, float]
    constants: dict[str, float]
    ratios: dict[str, float]


def fdr6(distances: Mapping[str, float], constants: Mapping[str, float] = PUBLISHED_CONSTANTS) -> FDr6:
    """Mean over the six networks of the Fréchet distance divided by the constant.

    Args:
        distances: network -> Fréchet distance of generated images to the training set.
        constants: network -> that of validation images to it.
    Raises: ValueError: one of the six is missing on either side (there is no mean over five); a constant not above 0.
    """
    for what, values in (("distances", distances), ("constants", constants)):
        if missing := [name for name in SIX if name not in values]:
            raise ValueError(
                f"FDr6 is the mean over {', '.join(SIX)}: the {what} lack {', '.join(missing)}, expected all six"
            )
    if wrong := [f"{name} {constants[name]}" for name in SIX if not constants[name] > 0]:
        raise ValueError(f"constants of FDr6 must be above 0, got {', '.join(wrong)}")
    ratios = {name: distances[name] / constants[name] for name in SIX}
    chosen = ({name: values[name] for name in SIX} for values in (distances, constants))
    return FDr6(sum(ratios.values()) / len(SIX), *chosen, ratios)


def check_counts(counts: Mapping[str, int], dims: Mapping[str, int]) -> None:
    """Refuse sets of images that are too few for FDr6.

    The covariance of N images has rank N - 1 at most. Below full rank a Fréchet distance says more about N than about
    the images, how much more depends on the network, and the mean over networks means nothing.

    Args: `counts`: name of a set of images -> how many; `dims`: network -> number of its features.
    Raises: ValueError: a set with no more images than features, named with the network.
    """
    name = max(dims, key=dims.__getitem__)
    for images, count in counts.items():
        if count <= dims[name]:
            raise ValueError(
                f"FDr6 needs more images than features: the {images} images are {count}, {name} has {dims[name]} "
                "features. Take more images, or name single networks (their distances are computed at any number)"
            )
