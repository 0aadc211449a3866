"""Reconstructions beside their originals: distances by pairs, worst cases, and the mean without perfect ones."""

import math

import numpy as np
import pytest
import torch

from vtp_diffusion.evaluation.reconstruction import PairedStatistics, WorstCases, mean_psnr
from vtp_diffusion.metrics.features import Extractor, FeatureNetwork
from vtp_diffusion.metrics.frechet import GaussianStatistics, frechet_distance


class Means(FeatureNetwork):
    """Mean colours."""

    name, distance_name, dim, preprocessing = "means", "FD-means", 3, "none"

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(len(images))
        return images.float().mean((2, 3))


def some_images(count, seed):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8))


def test_a_smaller_last_batch_reaches_the_network_padded():
    network, (real, fake) = Means(), (some_images(10, 0), some_images(10, 1))
    with torch.compiler.set_stance("force_eager"):
        pair = PairedStatistics(Extractor(network, "cpu", compile=True, batch_size=4), 10, seed=0)
        for batch in (range(4), range(4, 8), range(8, 10)):
            pair.update(batch, real[batch.start : batch.stop], fake[batch.start : batch.stop])
    assert network.seen == [4] * 6
    pair.gather()
    name, value, spread = pair.distance()
    expected = frechet_distance(*(GaussianStatistics.of(images.float().mean((2, 3))) for images in (real, fake)))
    assert name == "FD-means" and value == pytest.approx(expected) and spread["value"] > 0


def test_the_worst_cases_are_those_of_the_lowest_psnr_whatever_the_batches():
    images, ratios = some_images(9, 0), torch.tensor([5.0, 3.0, 8.0, 3.0, 9.0, 1.0, 7.0, 2.0, 6.0])
    for size in (2, 9):
        worst = WorstCases(4)
        for part in torch.arange(9).split(size):
            worst.update((part + 10).tolist(), ratios[part], images[part], images[part].flip(3))
        worst.gather()
        assert [(index, ratio) for index, ratio, *_ in worst.sorted()] == [(15, 1), (17, 2), (11, 3), (13, 3)]
        assert all(torch.equal(real, images[k - 10]) for k, _, real, _ in worst.sorted())
        assert worst.picture().width >= 8 * 96


def test_images_that_come_back_exactly_are_left_out_of_the_mean():
    assert mean_psnr(torch.tensor([20.0, math.inf, 30.0])) == {"psnr": 25.0, "equal_images": 1}
    assert mean_psnr(torch.tensor([math.inf])) == {"psnr": None, "equal_images": 1}
