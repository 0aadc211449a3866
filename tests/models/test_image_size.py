"""The resolution of images for a trained autoencoder."""

from functools import partial

import pytest
from test_latent_shards import dc, kl, rae

from vtp_diffusion.data.image_datasets import DataConfig
from vtp_diffusion.models.image_size import EncodedDataConfig, settle_resolution


@pytest.mark.parametrize(
    ("make", "given", "settled", "line"),
    [
        (partial(kl, sample_size=32), None, 256, "the usual one: no image size of the AutoencoderKL is known"),
        (partial(kl, sample_size=[16, 24]), None, 256, "the usual one: no image size of the AutoencoderKL is known"),
        (kl, None, 16, "data.resolution is 16, which the AutoencoderKL was saved with (sample_size)"),
        (rae, None, 16, "which the AutoencoderRAE was saved with (image_size)"),
        (dc, None, 256, "is 256, the usual one: no image size of the AutoencoderDC is known"),
        (kl, 64, 64, "data.resolution is 64, but the AutoencoderKL was saved with 16 (sample_size)"),
        (kl, 16, 16, ""),
        (dc, 64, 64, ""),
    ],
)
def test_a_resolution_that_is_not_given_is_the_autoencoder_s(make, given, settled, line, capsys):
    model, data = make(**{"image_size": 16} if make is rae else {}), EncodedDataConfig(resolution=given)
    settle_resolution(data, model)
    assert data.resolution == settled
    printed = capsys.readouterr().out
    assert line in printed and (line or not printed)


def test_a_resolution_that_has_a_default_is_kept(capsys):
    data = DataConfig()
    settle_resolution(data, kl())
    assert data.resolution == 256 and "is 256, but the AutoencoderKL was saved with 16" in capsys.readouterr().out
