"""Inception score, precision, recall, density, coverage, kernel distance: definitions, torch-fidelity, bad input."""

import pytest
import torch

from vtp_diffusion.metrics.scores import density_coverage, inception_score, kernel_distance, precision_recall


def draw(*shape, seed=0, shift=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + shift


def test_the_inception_score_of_certain_predictions_is_the_number_of_classes():
    certain = torch.full((60, 5), -100.0)
    certain[torch.arange(60), torch.arange(60) % 5] = 100.0
    score = inception_score(certain, splits=1)
    assert score.value == pytest.approx(5) and score.deviation == pytest.approx(0, abs=1e-9)
    assert inception_score(torch.zeros(20, 5)).value == pytest.approx(1)


def test_the_inception_score_is_torch_fidelitys_shuffled_one():
    isc = pytest.importorskip("torch_fidelity.metric_isc").isc_features_to_metric
    logits = draw(1003, 30) * 2
    logits[torch.arange(1003), torch.arange(1003) * 30 // 1003] += 4  # sorted by class
    found, shuffled = inception_score(logits), isc(logits, shuffle=True, rng_seed=2020)
    assert found.value == pytest.approx(shuffled["inception_score_mean"], rel=1e-9)
    assert found.deviation == pytest.approx(shuffled["inception_score_std"], rel=1e-9)
    assert found.value > 1.2 * isc(logits, shuffle=False)["inception_score_mean"]
    assert found.adm_value is None and found.images_per_split == 100


def test_adms_score_is_that_of_50000_images_in_the_order_of_their_files():
    logits = draw(50_000, 4) * torch.linspace(0.5, 3, 50_000)[:, None]
    p = logits.double().softmax(1)
    expected = [(part * (part / part.mean(0)).log()).sum(1).mean().exp() for part in p.split(5000)]
    score = inception_score(logits)
    assert score.adm_value == pytest.approx(sum(expected).item() / 10, rel=1e-12) != pytest.approx(score.value)


def brute_force(generated, reference, k, k_density):
    def radius(points, index, neighbours):
        return sorted((points[index] - p).norm() for p in points)[neighbours]

    inside = [[(g - r).norm() for r in reference] for g in generated]
    radii, own = ([radius(p, i, k) for i in range(len(p))] for p in (reference, generated))
    wide = [radius(reference, i, k_density) for i in range(len(reference))]
    precision = sum(any(d <= r for d, r in zip(row, radii, strict=True)) for row in inside) / len(generated)
    columns = list(zip(*inside, strict=True))
    recall = sum(any(d <= r for d, r in zip(column, own, strict=True)) for column in columns) / len(reference)
    counts = sum(sum(d < r for d, r in zip(row, wide, strict=True)) for row in inside)
    covered = sum(any(d < r for d in column) for column, r in zip(columns, wide, strict=True))
    return precision, recall, counts / (k_density * len(generated)), covered / len(reference)


def test_neighbour_scores_by_their_definitions():
    generated, reference = draw(25, 3, shift=0.7) * 0.8, draw(31, 3, seed=1)
    expected = brute_force(generated, reference, 3, 5)
    assert all(0.1 < value for value in expected) and expected[1] < 1
    found = (*precision_recall(generated, reference, chunk=7), *density_coverage(generated, reference, chunk=7))
    assert found == pytest.approx(tuple(float(value) for value in expected))


def test_distances_survive_a_common_offset():
    generated, reference = draw(40, 6), draw(50, 6, seed=1)
    expected = precision_recall(generated.double(), reference.double())
    assert precision_recall(generated + 3000, reference + 3000) == expected


def test_the_kernel_distance_is_zero_on_average_and_sees_a_shift():
    kid = pytest.importorskip("torch_fidelity.metric_kid").kid_features_to_metric
    x, y = draw(300, 8), draw(280, 8, seed=1)
    same = kernel_distance(x, y, subsets=40, subset_size=100)
    assert (same.subsets, same.subset_size) == (40, 100) and abs(same.value) < same.deviation
    moved = kernel_distance(x + 1, y, subsets=40, subset_size=100)
    assert moved.value > 5 * moved.deviation
    expected = kid(x + 1, y, kid_subsets=40, kid_subset_size=100, verbose=False)
    assert moved.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    small = kernel_distance(x[:9], y)  # not 9: every subset would be the set itself
    assert small.subset_size == 4 and small.deviation > 0


def test_bad_scores():
    with pytest.raises(ValueError, match="at least 10 images"):
        inception_score(torch.zeros(9, 5))
    with pytest.raises(ValueError, match="logits are not finite"):
        inception_score(torch.full((10, 5), float("nan")))
    with pytest.raises(ValueError, match="4 rows or more"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match=r"\(9, 2\) and \(9, 3\)"):
        density_coverage(torch.zeros(9, 2), torch.zeros(9, 3))
    with pytest.raises(ValueError, match="4 rows or more"):
        kernel_distance(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match="features are not finite"):
        kernel_distance(torch.full((9, 2), float("inf")), torch.zeros(9, 2))
