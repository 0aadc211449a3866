"""MIND, the Monge Inception Distance: a sliced Wasserstein distance of features (Berthet et al., arXiv:2605.06797)."""

from dataclasses import dataclass

import numpy as np
import torch

from ..runtime.reproducibility import random_stream
from .frechet import JACKKNIFE_GROUPS, jackknife_group
from .scores import check_pair

PROJECTIONS = 1000
PROJECTIONS_AT_ONCE = 64
SLICED_MINIMUM = 3  # images of a set: the jackknife leaves one out


@dataclass
class SlicedDistance:
    """A MIND of sets of equal size.

    Attributes:
        deviation: standard error over the images of both sets, by a jackknife of `groups` random groups.
        num_images: in each of the two sets.
    """

    value: float
    deviation: float
    groups: int
    num_images: int


def sliced_distance(
    generated: torch.Tensor,
    reference: torch.Tensor,
    seed: int,
    projections: int = PROJECTIONS,
    groups: int = JACKKNIFE_GROUPS,
) -> SlicedDistance:
    r"""3 D times the squared 2-Wasserstein distance of the features projected to a line, averaged over random lines:

    .. math:: \frac{3D}{P} \sum_{p=1}^{P} \frac{1}{N} \sum_{i=1}^{N} (x^{(p)}_{(i)} - y^{(p)}_{(i)})^2

    with x and y projected on unit vector p, sorted. P is 1000; the factor 3 D is the paper's, which brings the numbers
    to the size of an FID. The unit vectors are the same in every call: other ones would move a MIND by up to
    sqrt(2 / P), 4.5 % of it, if the sets differ in one direction only. The sets must be of equal size: of the larger
    one N random features are taken. Like every distance of finitely many samples it is biased upwards: compare it only
    at equal N.

    Args:
        generated, reference: (N, D) and (M, D).
        seed: decides subsets and groups.
        groups: number of groups of the jackknife, which leaves out group k of both sets together; 0: no jackknife, the
            deviation is NaN.
    Raises: ValueError: shapes that do not fit, features that are not finite, or fewer than 3 rows.
    """
    check_pair(generated, reference, SLICED_MINIMUM)
    count, dim = min(len(generated), len(reference)), generated.shape[1]
    x, y = (_subset(features, count, name, seed) for name, features in (("x", generated), ("y", reference)))
    centre = y.mean(0)
    x, y = x - centre, y - centre  # distances do not change, but float32 products keep more digits
    groups = min(groups, count)
    group = torch.from_numpy(jackknife_group(count, max(groups, 1), seed)).to(x.device)
    directions = torch.from_numpy(random_stream("projections").standard_normal((projections, dim)))
    directions = (directions / directions.norm(dim=1, keepdim=True)).to(x)  # (P, D)
    sums = torch.zeros(1 + groups, dtype=torch.float64)
    for part in directions.split(PROJECTIONS_AT_ONCE):
        sides = [(part @ side.T).sort(1) for side in (x, y)]  # values (p, N) and their indices
        sums[0] += _squares(*(side.values for side in sides))
        labels = [group[side.indices] for side in sides]
        for k in range(groups):  # a sorted row stays sorted when a group is left out
            left = (s.values[label != k].view(len(part), -1) for s, label in zip(sides, labels, strict=True))
            sums[1 + k] += _squares(*left)
    whole, *without = (3 * dim / projections * sums).tolist()
    deviation = float(np.sqrt((groups - 1) * np.var(without))) if groups else float("nan")
    return SlicedDistance(whole, deviation, groups, count)


def _subset(features: torch.Tensor, count: int, name: str, seed: int) -> torch.Tensor:
    if len(features) == count:
        return features
    order = random_stream(f"sliced distance, {name}", seed).permutation(len(features))[:count]
    return features[torch.from_numpy(order).to(features.device)]


def _squares(x: torch.Tensor, y: torch.Tensor) -> float:
    """Sum over the rows of the mean squared difference."""
    return (x - y).double().square().mean(1).sum().item()
