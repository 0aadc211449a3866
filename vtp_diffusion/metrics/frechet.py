"""Gaussian statistics of features, the Fréchet distance between two of them, its spread and its floor."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..runtime.reproducibility import random_stream

JACKKNIFE_GROUPS = 10


class GaussianStatistics:
    """Mean and covariance of features that arrive in batches, in float64.

    Features are kept until there are as many as dimensions; then they become a D x D matrix, and memory no longer
    grows. Fewer features take less memory than the matrix and are more exact: their covariance would be singular, and
    `frechet_distance` does without it. Parts are merged by the pairwise update of Chan, Golub and LeVeque (1979),
    which does not cancel when the mean is large beside the spread. The covariance is divided by N - 1, as in the FID
    implementations of TTUR and ADM.

    Args:
        dim: number of features, D.
        device: where features are kept and matrices multiplied; it must know float64.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.dim, self.device = dim, torch.device(device)
        self._rows: list[torch.Tensor] = []  # features that are not in the moments yet
        self._waiting = 0
        self._moments: tuple[int, torch.Tensor, torch.Tensor] | None = None  # count, mean (D,), scatter (D, D)
        self._root: torch.Tensor | None = None

    @classmethod
    def of(
        cls, features: torch.Tensor, batch_size: int = 4096, device: torch.device | str = "cpu"
    ) -> "GaussianStatistics":
        """Statistics of features (N, D)."""
        statistics = cls(features.shape[1], device)
        for batch in features.split(batch_size):
            statistics.update(batch)
        return statistics

    @classmethod
    def from_moments(
        cls, mean: torch.Tensor, covariance: torch.Tensor, count: int = 2, device: torch.device | str = "cpu"
    ) -> "GaussianStatistics":
        """Statistics from a mean (D,) and a covariance (D, D), as files hold them.

        Args: `count`: number of samples; only merging needs it.
        Raises: ValueError: shapes that do not fit, values that are not finite, a covariance that is not symmetric, or
            variances below 0.
        """
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or count < 2:
            raise ValueError(
                f"mean {tuple(mean.shape)}, covariance {tuple(covariance.shape)} and count {count} given, "
                "expected (D,), (D, D) and at least 2"
            )
        mean, covariance = mean.to(device, torch.float64), covariance.to(device, torch.float64)
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("mean or covariance are not finite: statistics of them would mean nothing")
        if not torch.allclose(covariance, covariance.T, rtol=1e-5, atol=1e-8 * covariance.abs().max().item()):
            raise ValueError("the covariance is not symmetric")
        if (covariance.diagonal() < 0).any():
            raise ValueError("the covariance holds variances below 0")
        statistics = cls(len(mean), device)
        statistics._moments = count, mean, covariance * (count - 1)
        return statistics

    @classmethod
    def merged(cls, parts: Sequence["GaussianStatistics"]) -> "GaussianStatistics":
        """Statistics of all the features of the parts, which stay as they are."""
        merged = cls(parts[0].dim, parts[0].device)
        for part in parts:
            merged.merge(part)
        return merged

    def to(self, device: torch.device | str) -> "GaussianStatistics":
        """The same statistics on a device."""
        moved = GaussianStatistics(self.dim, device)
        moved._rows, moved._waiting = [rows.to(device) for rows in self._rows], self._waiting
        if self._moments is not None:
            count, mean, scatter = self._moments
            moved._moments = count, mean.to(device), scatter.to(device)
        return moved

    def update(self, features: torch.Tensor) -> None:
        """Adds a batch (B, D).

        Raises: ValueError: a different width, at once. Values that are not finite raise it only when the statistics
            are computed: checking every batch would make the host wait for the device.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features {tuple(features.shape)} given, expected (B, {self.dim})")
        self._rows.append(features.to(self.device, copy=True))
        self._waiting += len(features)
        self._root = None
        if self._waiting >= self.dim:
            self._collapse()

    def merge(self, other: "GaussianStatistics") -> None:
        """Adds the statistics of other features, as if their batches had been given here."""
        if other.dim != self.dim:
            raise ValueError(f"statistics of {other.dim} features given, expected {self.dim}")
        for rows in other._rows:
            self.update(rows)
        if other._moments is not None:
            self._root = None
            self._add(*(part.to(self.device) if torch.is_tensor(part) else part for part in other._moments))

    def _waiting_rows(self) -> torch.Tensor:
        """(n, D) float64. Raises ValueError on values that are not finite."""
        rows = torch.cat(self._rows).double()
        if not rows.isfinite().all():
            raise ValueError("features are not finite: statistics of them would mean nothing")
        return rows

    def _collapse(self) -> None:
        rows = self._waiting_rows()
        self._rows, self._waiting = [], 0
        centred = rows - rows.mean(0)
        self._add(len(rows), rows.mean(0), centred.T @ centred)

    def _add(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        if self._moments is None:
            self._moments = count, mean.clone(), scatter.clone()
            return
        old_count, old_mean, old_scatter = self._moments
        shift, total = mean - old_mean, old_count + count
        old_scatter += scatter
        old_scatter.addr_(shift, shift, alpha=old_count * count / total)
        self._moments = total, old_mean + shift * (count / total), old_scatter

    @property
    def count(self) -> int:
        return self._waiting + (0 if self._moments is None else self._moments[0])

    @property
    def mean(self) -> torch.Tensor:
        """(D,) float64."""
        if self._moments is None and self._waiting:
            return self._waiting_rows().mean(0)
        return self._complete()[1]

    @property
    def covariance(self) -> torch.Tensor:
        """(D, D) float64. Raises ValueError below two samples."""
        count, _, scatter = self._complete()
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {count}")
        return scatter / (count - 1)

    def _complete(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Count, mean and scatter matrix of all samples; the stored rows stay rows."""
        if self._moments is not None and not self._waiting:
            return self._moments
        whole = GaussianStatistics(self.dim, self.device)
        empty = torch.zeros(self.dim, dtype=torch.float64, device=self.device)
        whole._moments = 0, empty, torch.diag(empty)
        if self._waiting:
            whole._rows = self._rows
            whole._collapse()
        if self._moments is not None:
            whole._add(*self._moments)
        return whole._moments

    @property
    def factor(self) -> torch.Tensor | None:
        """F (N, D) float64 with covariance F^T F, while there are fewer samples than dimensions; else None."""
        if self._moments is not None:
            return None
        if self._waiting < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self._waiting}")
        rows = self._waiting_rows()
        return (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5

    @property
    def root(self) -> torch.Tensor:
        """R (D, D) with covariance = R R^T, cached: the Cholesky factor, or from eigenvectors if it is singular.

        Zero eigenvalues come out as rounding noise, about ±1e-16 of the largest. Their roots, 1e-8 each, would add up
        over thousands of dimensions, so they are set to zero, with the threshold of `torch.linalg.matrix_rank`.
        """
        if self._root is None:
            covariance = self.covariance
            self._root, failed = torch.linalg.cholesky_ex(covariance)
            if failed:
                eigenvalues, vectors = torch.linalg.eigh(covariance)
                noise = eigenvalues <= eigenvalues.max() * self.dim * torch.finfo(torch.float64).eps
                self._root = vectors * eigenvalues.masked_fill(noise, 0).sqrt()
        return self._root


def _sum_of_roots(product: torch.Tensor, scale: torch.Tensor) -> float:
    """Sum of the square roots of the eigenvalues of a symmetric product of covariances, without its rounding noise.

    Args: `scale`: eigenvalues that are tiny beside it are noise. Where the covariances themselves are multiplied it is
        the product of their Frobenius norms: the largest eigenvalue is noise itself if their ranges are orthogonal.
    """
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    noise = eigenvalues <= 4 * torch.finfo(torch.float64).eps * scale
    return eigenvalues.masked_fill(noise, 0).sqrt().sum().item()


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    r"""Squared Fréchet distance of two Gaussians (Dowson and Landau, 1982; Heusel et al., arXiv:1706.08500):

    .. math:: |\mu_a - \mu_b|^2 + \mathrm{tr}(S_a + S_b) - 2\,\mathrm{tr}\,(S_a^{1/2} S_b S_a^{1/2})^{1/2}

    The usual `sqrtm(S_a S_b)` is unstable when there are fewer samples than features. Here the last trace is a sum of
    square roots of eigenvalues of symmetric matrices, which are real: with S_a = R R^T those of R^T S_b R. With fewer
    samples than features S_a = F_a^T F_a, and the small F_a S_b F_a^T has the same ones; if both sets are that small,
    S_b = F_b^T F_b is not formed. `a` caches R: pass what is compared several times first. Only with features of the
    Inception weights of 2015 is the result an FID.

    Raises: ValueError: statistics of different dimensions, or of fewer than 2 samples.
    """
    if a.dim != b.dim:
        raise ValueError(f"statistics of {a.dim} and of {b.dim} features cannot be compared")
    shift = (a.mean - b.mean.to(a.device)).square().sum().item()
    (factor_a, trace_a), (factor_b, trace_b) = _factor_and_trace(a), _factor_and_trace(b)
    if factor_a is None and factor_b is None:
        covariance = b.covariance.to(a.device)
        scale = torch.linalg.matrix_norm(a.covariance) * torch.linalg.matrix_norm(covariance)
        overlap = _sum_of_roots(a.root.T @ covariance @ a.root, scale)
    elif factor_a is not None and factor_b is not None:
        small, large = sorted((factor_a, factor_b.to(a.device)), key=len)
        product = small @ large.T
        # rounding in `product` itself has roots of 1e-16 beside the traces: only its square has noise worth removing
        overlap = _sum_of_roots(product @ product.T, product.square().sum())
    else:
        factor, covariance = (factor_a, b.covariance) if factor_b is None else (factor_b, a.covariance)
        covariance = covariance.to(factor.device)
        scale = torch.linalg.matrix_norm(factor @ factor.T) * torch.linalg.matrix_norm(covariance)
        overlap = _sum_of_roots(factor @ covariance @ factor.T, scale)
    return max(shift + trace_a + trace_b - 2 * overlap, 0.0)  # rounding leaves equal statistics at about -1e-12


def _factor_and_trace(statistics: GaussianStatistics) -> tuple[torch.Tensor | None, float]:
    factor = statistics.factor
    return factor, (statistics.covariance.trace() if factor is None else factor.square().sum()).item()


def jackknife_group(count: int, groups: int, seed: int) -> np.ndarray:
    """The group (count,) of every image for `jackknife_deviation`: random groups of equal size.

    Groups of every G-th image would go wrong with balanced labels, where image k has class k mod C: a group would hold
    some of the classes only, and leaving it out would change what is measured. That gave 2.1 times (1000 classes,
    5,000 images) to 12.5 times (10 classes) the true spread.
    """
    return random_stream("jackknife groups", seed).permutation(count) % groups


def jackknife_deviation(
    groups: Sequence[GaussianStatistics], reference: GaussianStatistics | Sequence[GaussianStatistics]
) -> float:
    """Standard error of the distance between the samples of all groups and a fixed reference: how much it depends on
    which samples were drawn. Delete-one-group jackknife (Efron and Tibshirani, 1993, chapter 11) with random groups,
    see `jackknife_group`. It is conservative: about 1.25 times the true spread with random labels, more with balanced
    ones, since random groups do not have the lower variance of equal numbers of every class.

    A reference given in groups is paired with the samples: group k of both is left out together.

    It is no bootstrap, since that draws images twice, which by itself raises a Fréchet distance.

    Raises: ValueError: fewer than 2 groups, pairs of unequal sizes, or only 1 sample left without one of the groups.
    """
    paired = not isinstance(reference, GaussianStatistics)
    if len(groups) < 2:
        raise ValueError(f"a jackknife needs at least 2 groups, got {len(groups)}")
    if paired and [group.count for group in groups] != [group.count for group in reference]:
        sizes = [[group.count for group in side] for side in (groups, reference)]
        raise ValueError(f"paired groups must have equal sizes, got {sizes[0]} and {sizes[1]}")
    without = [
        frechet_distance(_merged_without(reference, k) if paired else reference, _merged_without(groups, k))
        for k in range(len(groups))
    ]
    return float(np.sqrt((len(groups) - 1) * np.var(without)))


def _merged_without(groups: Sequence[GaussianStatistics], left_out: int) -> GaussianStatistics:
    return GaussianStatistics.merged([*groups[:left_out], *groups[left_out + 1 :]])


@dataclass
class Floor:
    """A distance of generated images, and the real-vs-real baseline at the same numbers of images.

    A Fréchet distance of finitely many samples is biased upwards, the more the fewer they are (Chong and Forsyth,
    arXiv:1911.07023), so a distance only has a meaning beside that of real images *at the same sizes*.

    Attributes:
        kind: "halves" or "held-out", see `floor_of_halves` and `floor_of_images`.
        sizes: numbers of images on the two sides, the same for `real` and `generated`.
        real, real_deviation: real against real, mean and standard deviation over repetitions; None if all repetitions
            use the same images, since their deviation would be rounding noise.
        generated, generated_deviation: generated against real, likewise.
    """

    kind: str
    sizes: tuple[int, int]
    repetitions: int
    real: float
    real_deviation: float | None
    generated: float
    generated_deviation: float | None


def _floor(
    kind: str, sizes: tuple[int, int], distances: Iterable[tuple[float, float]], whole: tuple[bool, bool]
) -> Floor:
    """`distances`: (real, generated) of every repetition; `whole`: whether all repetitions used the same real images,
    and the same generated ones."""
    values, sides = list(distances), []
    for side, always in zip(zip(*values, strict=True), whole, strict=True):
        sides += [float(np.mean(side)), None if always else float(np.std(side))]
    return Floor(kind, sizes, len(values), *sides)


def floor_of_halves(
    generated: torch.Tensor,
    reference: torch.Tensor,
    seed: int,
    repetitions: int = 5,
    prepare: Callable = GaussianStatistics.of,
    distance: Callable = frechet_distance,
) -> Floor:
    """Floor from the reference alone: two disjoint random parts A and B of it, with
    n = min(N_generated, N_reference // 2) images each.

    `real` is the distance between A and B, `generated` that between n random generated images and the same B: both
    have n samples on either side, hence the same bias. Neither may be compared with the distance to the whole
    reference, which has more samples. `generated` below `real` means that generated images lie closer to the reference
    than other real images do: that happens with copies, not with good new samples.

    Args:
        generated, reference: features (N, D).
        seed: decides the parts.
        prepare, distance: `distance(prepare(real features), prepare(features))`; the Fréchet distance if not given.
    """
    n = min(len(generated), len(reference) // 2)
    if n < 2:
        raise ValueError(f"a floor needs 2 generated and 4 reference images, got {len(generated)}, {len(reference)}")
    generator = random_stream("floor", seed)

    def repetition() -> tuple[float, float]:
        order = generator.permutation(len(reference))
        half, subset = prepare(reference[order[n : 2 * n]]), generated[generator.permutation(len(generated))[:n]]
        return distance(half, prepare(reference[order[:n]])), distance(half, prepare(subset))

    return _floor("halves", (n, n), (repetition() for _ in range(repetitions)), (False, False))


def floor_of_images(
    generated: torch.Tensor,
    reference: torch.Tensor,
    held_out: torch.Tensor,
    seed: int,
    repetitions: int = 5,
    prepare: Callable = GaussianStatistics.of,
    distance: Callable = frechet_distance,
) -> Floor:
    """Floor from real images outside the reference: n = min(N_generated, N_held_out) against the whole reference.

    `real` is the distance of n held-out images to the reference: what a sampler of new images from the same
    distribution would get. `generated` is that of n random generated images to the same reference. The smaller of the
    two sets is used whole and therefore has no deviation.
    Arguments as for `floor_of_halves`.
    """
    n = min(len(generated), len(held_out))
    if n < 2:
        raise ValueError(f"a floor needs 2 generated and 2 held-out images, got {len(generated)} and {len(held_out)}")
    generator, whole, sides = random_stream("floor", seed), prepare(reference), (held_out, generated)
    distances = (
        tuple(distance(whole, prepare(side[generator.permutation(len(side))[:n]])) for side in sides)
        for _ in range(repetitions)
    )
    return _floor("held-out", (n, len(reference)), distances, (len(held_out) == n, len(generated) == n))
