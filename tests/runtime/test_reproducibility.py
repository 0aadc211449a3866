"""Streams of random numbers, each of its own use and place."""

import numpy as np
import pytest
import torch

from vtp_diffusion.runtime.reproducibility import exact_float32, random_stream, stream_seed


def test_every_use_and_every_key_has_a_stream_of_its_own():
    plain = [np.random.default_rng(keys).random() for keys in ([7, 3], [7, 3, 0, 0])]
    assert plain[0] == plain[1]  # what the names are for
    keys = [(7, 3), (7, 3, 0), (7, 3, 0, 0), (73,), (7,), (0, 7), (2**32, 5), (0, 1, 5)]
    seeds = [stream_seed(use, *key) for use in ("noise", "labels") for key in keys]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed("noise", 7, 3) == 5737607149363330005, "saved samples depend on it"
    assert random_stream("noise", 7, 3).random() == random_stream("noise", 7, 3).random()


def test_neighbouring_seeds_share_no_image():
    seeds = [{stream_seed("noise", seed, image) for image in range(100)} for seed in (0, 1)]
    assert seeds[0].isdisjoint(seeds[1])


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_exact_float32_is_exact_inside_and_as_before_after(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with exact_float32():
            assert torch.get_float32_matmul_precision() == "highest", "which torch.compile asks for, too"
            assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == precision and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
