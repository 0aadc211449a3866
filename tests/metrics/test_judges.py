"""MIND, FDr6 and the memorised share: closed forms, known answers, bad input."""

import math

import numpy as np
import pytest
import torch

from vtp_diffusion.metrics.fdr6 import PUBLISHED_CONSTANTS, SIX, check_counts, fdr6
from vtp_diffusion.metrics.frechet import jackknife_group
from vtp_diffusion.metrics.mind import sliced_distance
from vtp_diffusion.metrics.neighbours import memorised


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mind_of_a_shift_is_three_times_its_square():
    # a shift s moves projection u by u·s, whose square is |s|² / D on average: 3 D times that is 3 |s|²
    x, shift = draw(50, 4), torch.tensor([1.0, -2.0, 0.5, 0.0])
    found = sliced_distance(x + shift, x, seed=0, projections=20_000)
    assert found.value == pytest.approx(3 * shift.square().sum().item(), rel=0.03)
    assert found.deviation == pytest.approx(0, abs=1e-4) and (found.num_images, found.groups) == (50, 10)
    assert sliced_distance(x[torch.randperm(50)], x, seed=0).value == pytest.approx(0, abs=1e-10)


def test_mind_of_one_feature_is_its_wasserstein_distance():
    stats = pytest.importorskip("scipy.stats")
    x, y = draw(60, 1), draw(60, 1, seed=1) * 2 + 1
    by_quantiles = np.square(np.sort(x[:, 0]) - np.sort(y[:, 0])).mean()
    assert sliced_distance(x, y, seed=0, projections=3).value == pytest.approx(3 * by_quantiles, rel=1e-5)
    assert by_quantiles > stats.wasserstein_distance(x[:, 0], y[:, 0]) ** 2


def test_mind_takes_equal_numbers_and_its_jackknife_is_that_of_recomputed_parts():
    x, y = draw(40, 5), draw(90, 5, seed=1) + 0.5
    assert sliced_distance(x, y, seed=3).num_images == 40
    y = y[:40]
    whole = sliced_distance(x, y, seed=3, groups=4)
    group = torch.from_numpy(jackknife_group(40, 4, 3))
    parts = [sliced_distance(x[group != k], y[group != k], seed=3, groups=0).value for k in range(4)]
    assert whole.deviation == pytest.approx(math.sqrt(3 * np.var(parts)), rel=1e-4)
    assert math.isnan(sliced_distance(x, y, seed=3, groups=0).deviation)


def test_the_jackknife_of_mind_is_about_its_spread():
    found = [sliced_distance(draw(60, 6, seed=k) + 1, draw(60, 6, seed=1000 + k), 0, 50) for k in range(60)]
    spread = np.std([distance.value for distance in found])
    assert 0.7 < np.mean([distance.deviation for distance in found]) / spread < 1.5


def test_mind_refuses_what_is_no_pair():
    for x, y in ((draw(2, 3), draw(5, 3)), (draw(5, 3), draw(5, 4)), (draw(5, 3) * math.nan, draw(5, 3))):
        with pytest.raises(ValueError, match="features"):
            sliced_distance(x, y, seed=0)


def test_fdr6_is_the_mean_of_six_ratios():
    found = fdr6({name: 2 * constant for name, constant in PUBLISHED_CONSTANTS.items()} | {"vgg16": 9.0})
    assert found.value == pytest.approx(2) and list(found.ratios) == list(found.distances) == list(SIX)
    own = dict.fromkeys(SIX, 4.0)
    assert fdr6(dict.fromkeys(SIX, 1.0) | {"mae_l": 13.0}, own).value == pytest.approx(0.75)


def test_there_is_no_mean_over_five():
    distances = dict.fromkeys(SIX, 1.0)
    del distances["clip_l"]
    with pytest.raises(ValueError, match="FDr6 is the mean over .*: the distances lack clip_l, expected all six"):
        fdr6(distances)
    with pytest.raises(ValueError, match="the constants lack clip_l"):
        fdr6(dict.fromkeys(SIX, 1.0), distances)
    with pytest.raises(ValueError, match="above 0, got mae_l 0.0"):
        fdr6(dict.fromkeys(SIX, 1.0), dict.fromkeys(SIX, 1.0) | {"mae_l": 0.0})


def test_fdr6_refuses_fewer_images_than_features():
    dims = {"clip_l": 1024, "inception": 2048}
    check_counts({"generated": 2049}, dims)
    with pytest.raises(ValueError, match="the floor images are 2048, inception has 2048 features"):
        check_counts({"generated": 2049, "floor": 2048}, dims)


def test_copies_are_memorised_and_new_images_are_at_the_quantile():
    training, held_out, new = draw(400, 8), draw(400, 8, seed=1), draw(400, 8, seed=2)
    assert memorised(held_out, held_out, training).share == pytest.approx(0.05, abs=0.003)
    assert memorised(new, held_out, training).share == pytest.approx(0.05, abs=0.04)
    mixed = torch.cat([new[:300], training[:100] * 1.001 + 1e-4])
    found = memorised(mixed, held_out, training)
    assert found.share == pytest.approx(0.25 + 0.75 * 0.05, abs=0.04)
    assert (found.quantile, found.num_images, found.num_held_out, found.num_training) == (0.05, 400, 400, 400)
    with pytest.raises(ValueError, match="nearest 5% of held-out images: there are 19, expected at least 20"):
        memorised(new, held_out[:19], training)


def test_the_share_of_copies_says_whether_copies_would_be_found():
    training, held_out, new = draw(400, 8), draw(400, 8, seed=1), draw(400, 8, seed=2)
    found = memorised(new, held_out, training, training[:50] + 1e-3)
    assert found.share_of_copies == 1 and found.share < 0.1
    changed = memorised(new, held_out, training, training[:50] + draw(50, 8, seed=3))
    assert changed.share_of_copies < 0.2, "copies that a decoder changed so much are found no more often than others"
    assert memorised(new, held_out, training).share_of_copies is None
