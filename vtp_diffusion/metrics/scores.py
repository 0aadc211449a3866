"""Scores beside the Fréchet distance: Inception score, precision, recall, density, coverage, and the kernel distance.
Features are float32 (N, D); everything is computed on their device, and callers turn TensorFloat-32 off.
"""

import itertools
from dataclasses import asdict, dataclass

import numpy as np
import torch

INCEPTION_SPLITS = 10
ADM_IMAGES = 50_000  # as many as ADM's evaluator scores, in 10 parts in file order
SMALL_SPLIT = 100  # with fewer images in a part, a score says more about the size of the parts than about the images
LARGEST_PRODUCT = 2**24  # distances held at once, 64 MB, however many images there are
PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5
KERNEL_SUBSETS = 100
KERNEL_SUBSET_SIZE = 1000
KERNEL_MINIMUM = 4  # images of a set: a subset is half of it, and the unbiased estimate needs 2 images
SUBSET_RULE = f"{KERNEL_SUBSET_SIZE} images, at most half of the smaller set"
SHUFFLE_SEED = 2020  # torch-fidelity's


@dataclass
class InceptionScore:
    """Inception score (Salimans et al., arXiv:1606.03498) of images in a random order, as torch-fidelity reads them.

    Attributes:
        value, deviation: mean and standard deviation over the splits.
        splits: number of parts of equal size.
        images_per_split: images in the smallest part. Fewer images give a lower score: compare only at equal sizes.
        adm_value: for 50,000 images, the mean over ten parts in the order of the files, as in ADM's evaluator; far too
            low if files are sorted by class. None for other numbers of images.
    """

    value: float
    deviation: float
    splits: int
    images_per_split: int
    adm_value: float | None

    def settings(self) -> dict:
        """Everything but value and deviation, for result files."""
        rows = {"order": f"shuffled (numpy RandomState({SHUFFLE_SEED}))"} | asdict(self)
        return {key: value for key, value in rows.items() if key not in ("value", "deviation") and value is not None}


def inception_score(logits: torch.Tensor, splits: int = INCEPTION_SPLITS) -> InceptionScore:
    """exp(E KL(p(y|x) || p(y))) over equal parts of the images, which are shuffled as in torch-fidelity.

    Args:
        logits: (N, C) without bias, in the order of the images.
        splits: number of parts; part i is the rows i·N/splits to (i+1)·N/splits, rounded down.
    Raises: ValueError: fewer images than splits, or logits that are not finite.
    """
    if logits.ndim != 2 or len(logits) < splits:
        raise ValueError(f"logits {tuple(logits.shape)} given, expected (N, C) with at least {splits} images")
    if not logits.isfinite().all():
        raise ValueError("logits are not finite: an Inception score of them would mean nothing")
    count = len(logits)
    order = torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(count)).to(logits.device)
    scores = _scores_of_parts(logits[order], splits)
    adm_value = _scores_of_parts(logits, INCEPTION_SPLITS).mean().item() if count == ADM_IMAGES else None
    return InceptionScore(scores.mean().item(), scores.std(correction=0).item(), splits, count // splits, adm_value)


def _scores_of_parts(logits: torch.Tensor, splits: int) -> torch.Tensor:
    """Scores (splits,) of consecutive parts, float64."""
    bounds, scores = [i * len(logits) // splits for i in range(splits + 1)], []
    for start, end in itertools.pairwise(bounds):
        log_p = logits[start:end].double().log_softmax(1)  # (n, C)
        p = log_p.exp()
        marginal = p.mean(0)  # (C,)
        scores.append(((p * log_p).sum(1).mean() - torch.special.xlogy(marginal, marginal).sum()).exp())
    return torch.stack(scores).cpu()


def _distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")


def check_pair(x: torch.Tensor, y: torch.Tensor, minimum: int) -> None:
    """Raises: ValueError unless two sets of features are finite, (N, D) and (M, D), with `minimum` rows or more."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < minimum:
        raise ValueError(
            f"features {tuple(x.shape)} and {tuple(y.shape)} given, expected (N, D) and (M, D), {minimum} rows or more"
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("features are not finite: neighbours of them would mean nothing")


def _chunk(*sets: torch.Tensor) -> int:
    """How many rows are compared with all others at once."""
    return max(1, min(2048, LARGEST_PRODUCT // max(map(len, sets))))


def neighbour_radii(features: torch.Tensor, neighbours: int, chunk: int | None = None) -> torch.Tensor:
    """Distance (N,) of each feature (N, D) to its `neighbours`-th nearest other one."""
    chunk = chunk or _chunk(features)
    parts = [_distances(part, features).kthvalue(neighbours + 1, dim=1).values for part in features.split(chunk)]
    return torch.cat(parts)  # + 1: the nearest is the feature itself


def _centred(generated: torch.Tensor, reference: torch.Tensor, neighbours: int, chunk: int | None) -> tuple:
    """Both sets minus the reference's mean, since a common offset costs digits in products; and the chunk size."""
    check_pair(generated, reference, neighbours + 1)
    centre = reference.mean(0)
    return generated - centre, reference - centre, chunk or _chunk(generated, reference)


def precision_recall(
    generated: torch.Tensor, reference: torch.Tensor, neighbours: int = PRECISION_NEIGHBOURS, chunk: int | None = None
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., arXiv:1904.06991), as in ADM's evaluator.

    Precision is the share of generated features that lie within the ball of some reference feature, whose radius is
    the distance to its 3rd nearest other reference feature; recall is the same with the sides exchanged.

    Args: `generated`, `reference`: (N, D) and (M, D). ADM takes all generated images and 10,000 reference ones.
    Raises: ValueError: shapes that do not fit, features that are not finite, or no more rows than `neighbours`.
    """
    generated, reference, chunk = _centred(generated, reference, neighbours, chunk)
    radii, other_radii = neighbour_radii(reference, neighbours, chunk), neighbour_radii(generated, neighbours, chunk)
    precise = 0
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for part, part_radii in zip(generated.split(chunk), other_radii.split(chunk), strict=True):
        distances = _distances(part, reference)  # (n, M)
        precise += (distances <= radii).any(1).sum().item()
        recalled |= (distances <= part_radii[:, None]).any(0)
    return precise / len(generated), recalled.double().mean().item()


def density_coverage(
    generated: torch.Tensor, reference: torch.Tensor, neighbours: int = DENSITY_NEIGHBOURS, chunk: int | None = None
) -> tuple[float, float]:
    """Density and coverage (Naeem et al., arXiv:2002.09797, equations 3 and 4, k = 5).

    Density is how many reference balls (radius: 5th nearest other reference feature) a generated feature lies in, over
    k: it can exceed 1. Coverage is the share of reference balls that hold a generated feature.

    Raises: ValueError: as `precision_recall`.
    """
    generated, reference, chunk = _centred(generated, reference, neighbours, chunk)
    radii = neighbour_radii(reference, neighbours, chunk)
    inside = 0
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for part in generated.split(chunk):
        within = _distances(part, reference) < radii  # (n, M)
        inside += within.sum().item()
        covered |= within.any(0)
    return inside / (neighbours * len(generated)), covered.double().mean().item()


@dataclass
class KernelDistance:
    """An unbiased squared maximum mean discrepancy, averaged over subsets: KID on Inception's features.

    Attributes: `value`, `deviation`: mean and standard deviation over the subsets, not multiplied by anything.
    """

    value: float
    deviation: float
    subsets: int
    subset_size: int


def kernel_distance(
    generated: torch.Tensor,
    reference: torch.Tensor,
    subsets: int = KERNEL_SUBSETS,
    subset_size: int = KERNEL_SUBSET_SIZE,
    seed: int = SHUFFLE_SEED,
) -> KernelDistance:
    """Kernel distance (Bińkowski et al., arXiv:1801.01401): unbiased MMD² with the kernel (x·y / D + 1)³.

    The product is divided by the number of features D, as in the paper, so that networks of different widths give
    numbers of the same order; nothing is multiplied by 1000. Subsets are those that torch-fidelity draws with the same
    seed. The estimate is unbiased: between real images it is 0 on average, whatever their number, and may be below 0.

    Args:
        generated, reference: (N, D) and (M, D).
        subset_size: images of a subset, at most half of the smaller set: subsets as large as the set would all be the
            same one, with a spread of 0.
    Raises: ValueError: shapes that do not fit, features that are not finite, or fewer than 4 rows.
    """
    check_pair(generated, reference, KERNEL_MINIMUM)
    size = min(subset_size, len(generated) // 2, len(reference) // 2)
    generator = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = generated[torch.from_numpy(generator.choice(len(generated), size, replace=False))]
        y = reference[torch.from_numpy(generator.choice(len(reference), size, replace=False))]
        (xx, x_self), (yy, y_self), (xy, _) = _kernel_sums(x, x), _kernel_sums(y, y), _kernel_sums(x, y)
        values.append((xx - x_self + yy - y_self) / (size * (size - 1)) - 2 * xy / size**2)
    return KernelDistance(float(np.mean(values)), float(np.std(values)), subsets, size)


def _kernel_sums(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Sum of the kernel over all pairs (i, j), and over the pairs (i, i)."""
    # the distance is a small difference of these sums, so they are added up in float64
    kernel = (x @ y.T / x.shape[1]).double().add_(1).pow_(3)  # (n, n)
    return kernel.sum().item(), kernel.diagonal().sum().item()
