"""Gaussian statistics of features, the Fréchet distance between two of them, and its real-against-real floor."""

from dataclasses import dataclass

import numpy as np
import torch


class GaussianStatistics:
    """Mean and covariance of features that arrive in batches, in float64, without keeping the features.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979), which does not cancel when the mean is
    large beside the spread. The covariance is divided by N - 1, as in the FID implementations of TTUR and ADM.

    Args:
        dim: number of features, D.
    """

    def __init__(self, dim: int):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    @classmethod
    def of(cls, features: torch.Tensor, batch_size: int = 4096) -> "GaussianStatistics":
        """Statistics of features (N, D)."""
        statistics = cls(features.shape[1])
        for batch in features.split(batch_size):
            statistics.update(batch)
        return statistics

    def update(self, features: torch.Tensor) -> None:
        """Adds a batch (B, D). Raises ValueError on another width or on values that are not finite."""
        if features.ndim != 2 or features.shape[1] != self.mean.shape[0]:
            raise ValueError(f"features {tuple(features.shape)} given, expected (B, {self.mean.shape[0]})")
        batch = features.to("cpu", torch.float64)
        if not batch.isfinite().all():
            raise ValueError("features are not finite: statistics of them would mean nothing")
        if not len(batch):
            return
        other = GaussianStatistics(batch.shape[1])
        other.count, other.mean = len(batch), batch.mean(0)
        centred = batch - other.mean
        other._scatter = centred.T @ centred
        self.merge(other)

    def merge(self, other: "GaussianStatistics") -> None:
        """Adds the statistics of other features, as if their batches had been given here."""
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"statistics of {len(other.mean)} features given, expected {len(self.mean)}")
        count = self.count + other.count
        if count == 0:
            return
        shift = other.mean - self.mean
        self.mean = self.mean + shift * (other.count / count)
        self._scatter += other._scatter + torch.outer(shift, shift) * (self.count * other.count / count)
        self.count = count

    @property
    def covariance(self) -> torch.Tensor:
        """(D, D) float64. Raises ValueError below two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self._scatter / (self.count - 1)


def _square_roots(eigenvalues: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Square roots of the eigenvalues (D,) of a covariance, those that are rounding noise set to zero.

    A rank-deficient covariance has eigenvalues of about ±1e-16 of the largest where they should be 0; their square
    roots, 1e-8 each, would add up over thousands of dimensions. The threshold is that of `torch.linalg.matrix_rank`.

    Args:
        largest: size of the numbers whose rounding it is. Of a product of matrices that is not its largest eigenvalue,
            which is noise itself where their ranges are orthogonal.
    """
    threshold = largest * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return torch.where(eigenvalues > threshold, eigenvalues, torch.zeros_like(eigenvalues)).sqrt()


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    r"""Squared Fréchet distance of two Gaussians (Dowson and Landau, 1982; Heusel et al., arXiv:1706.08500):

    .. math:: |\mu_a - \mu_b|^2 + \mathrm{tr}(S_a + S_b) - 2\,\mathrm{tr}\,(S_a^{1/2} S_b S_a^{1/2})^{1/2}

    The product is symmetric, so that its eigenvalues are real and come from `eigh`; the usual `sqrtm(S_a S_b)` is
    unstable when there are fewer samples than features. What a number says depends on the network the features come
    from: only with the Inception weights of 2015 is it an FID.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared")
    covariance_a, covariance_b = a.covariance, b.covariance
    eigenvalues, vectors = torch.linalg.eigh(covariance_a)
    largest_a, largest_b = eigenvalues.max(), torch.linalg.eigvalsh(covariance_b).max()
    root = (vectors * _square_roots(eigenvalues, largest_a)) @ vectors.T
    product = root @ covariance_b @ root
    overlap = _square_roots(torch.linalg.eigvalsh((product + product.T) / 2), largest_a * largest_b).sum()
    distance = (a.mean - b.mean).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * overlap
    return max(distance.item(), 0.0)  # rounding can leave equal statistics at about -1e-12


@dataclass
class Floor:
    """A distance at a sample size at which real images can be compared with real images.

    A Fréchet distance of finitely many samples is biased upwards, the more the fewer they are (Chong and Forsyth,
    arXiv:1911.07023), so that a distance says something only beside what real images get *at the same sizes*.

    Attributes:
        kind: "halves" or "held-out", see `floor_of_halves` and `floor_of_images`.
        sizes: numbers of images on the two sides, of `real` and of `generated` alike.
        real, real_deviation: real against real, mean and standard deviation over repetitions.
        generated, generated_deviation: generated against real, likewise.
    """

    kind: str
    sizes: tuple[int, int]
    repetitions: int
    real: float
    real_deviation: float
    generated: float
    generated_deviation: float


def _summary(kind: str, sizes: tuple[int, int], real: list[float], generated: list[float]) -> Floor:
    return Floor(
        kind,
        sizes,
        len(real),
        float(np.mean(real)),
        float(np.std(real)),
        float(np.mean(generated)),
        float(np.std(generated)),
    )


def floor_of_halves(generated: torch.Tensor, reference: torch.Tensor, seed: int, repetitions: int = 5) -> Floor:
    """Floor from the reference alone: disjoint random parts A and B of it, of n = min(N_generated, N_reference // 2).

    `real` is the distance of A and B, `generated` that of n random generated images and the same B: both have n
    samples on either side, hence the same bias. Neither compares with the distance to the whole reference, which has
    more. `generated` below `real` means that generated images lie closer to the reference than other real images do:
    copies of it do, good new samples don't.

    Args:
        generated, reference: features (N, D).
        seed: decides the parts.
    """
    n = min(len(generated), len(reference) // 2)
    if n < 2:
        raise ValueError(f"a floor needs 2 generated and 4 reference images, got {len(generated)}, {len(reference)}")
    generator = np.random.default_rng(seed)
    real_distances, generated_distances = [], []
    for _ in range(repetitions):
        order = generator.permutation(len(reference))
        half = GaussianStatistics.of(reference[order[n : 2 * n]])
        subset = generated[generator.permutation(len(generated))[:n]]
        real_distances.append(frechet_distance(GaussianStatistics.of(reference[order[:n]]), half))
        generated_distances.append(frechet_distance(GaussianStatistics.of(subset), half))
    return _summary("halves", (n, n), real_distances, generated_distances)


def floor_of_images(
    generated: torch.Tensor, reference: torch.Tensor, held_out: torch.Tensor, seed: int, repetitions: int = 5
) -> Floor:
    """Floor from real images outside the reference: n = min(N_generated, N_held_out) against the whole reference.

    `real` is the distance of n held-out images to the reference: what a sampler of new images from the same
    distribution would get. `generated` is that of n random generated images to the same reference.
    """
    n = min(len(generated), len(held_out))
    if n < 2:
        raise ValueError(f"a floor needs 2 generated and 2 held-out images, got {len(generated)} and {len(held_out)}")
    generator = np.random.default_rng(seed)
    whole = GaussianStatistics.of(reference)
    real_distances, generated_distances = [], []
    for _ in range(repetitions):
        for features, distances in ((held_out, real_distances), (generated, generated_distances)):
            subset = features[generator.permutation(len(features))[:n]]
            distances.append(frechet_distance(GaussianStatistics.of(subset), whole))
    return _summary("held-out", (n, len(reference)), real_distances, generated_distances)
