"""Signs of collapse in a log."""

import math

import pytest

from vtp_diffusion.pretraining.collapse import collapse_signs, harmful, has_fallen


def lines(accuracy, weight=1.0, first=1):
    pairs = zip(accuracy, [weight] * len(accuracy), strict=True)
    return [{"step": first + k, "discriminator/accuracy": a, "adaptive_weight": w} for k, (a, w) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("log", "found"),
    [
        (lines([0.7, 0.99, 1.0, 0.98, 0.99, 0.99]), []),
        (lines([0.7, 0.99, 1.0, 1.0, 1.0]), [(4, "discriminator wins")]),
        (lines([0.5, 0.495, 0.505, 0.7, 0.5, 0.5, 0.5]), [(3, "discriminator guesses"), (7, "discriminator guesses")]),
        (lines([0.7] * 4, weight=2000.0), [(3, "adaptive weight explodes")]),
        (lines([0.7] * 2, weight=2000.0), []),
        (lines([None, 1.0, 1.0, None, 1.0]), [(5, "discriminator wins")]),
        ([{"step": 0, "psnr": 20.0}, {"step": 5, "psnr": float("nan")}], [(5, "PSNR falls")]),
        ([{"step": 0, "psnr": 20.0}, {"step": 5, "psnr": 17.5}, {"step": 9, "psnr": 16.9}, {"step": 12, "psnr": 16.0}],
         [(9, "PSNR falls")]),
    ],
)  # fmt: skip
def test_signs_of_collapse(log, found):
    signs = collapse_signs(log, 0, "psnr")
    assert [(sign["step"], sign["sign"]) for sign in signs] == found
    assert has_fallen(log, "psnr") == any(sign["sign"] == "PSNR falls" for sign in signs)
    assert harmful(signs) == [sign for sign in signs if sign["sign"] != "discriminator guesses"]


@pytest.mark.parametrize(
    ("psnrs", "fallen"),
    [
        ([math.inf, math.inf], []),
        ([math.inf, 20.0, 18.0, 16.0, None], [3]),
        ([None, 20.0, math.inf, 16.0, math.nan], [3]),
        ([None, math.nan], [1]),
    ],
)
def test_images_that_equal_their_reconstructions_are_no_sign(psnrs, fallen):
    log = [{"step": k, "psnr": value} for k, value in enumerate(psnrs)]
    assert [sign["step"] for sign in collapse_signs(log, 0, "psnr")] == fallen
    assert has_fallen(log, "psnr") == (bool(fallen) and psnrs[-1] is not None)


def test_a_psnr_that_comes_back_has_not_fallen():
    assert not has_fallen([{"step": k, "psnr": value} for k, value in enumerate([20.0, 16.0, 18.0])], "psnr")


def test_what_happens_before_the_start_is_no_sign():
    assert collapse_signs(lines([1.0] * 6), 6, "psnr") == []
    assert [sign["step"] for sign in collapse_signs(lines([1.0] * 6), 2, "psnr")] == [5]
