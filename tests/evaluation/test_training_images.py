"""The nearest training image of generated ones."""

import numpy as np
import pytest
import torch
from PIL import Image

from vtp_diffusion import AutoencoderVTP
from vtp_diffusion.evaluation.training_images import TrainingImages


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> str:
    torch.manual_seed(0)
    parts = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
    sizes = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in parts.items()}
    folder = tmp_path_factory.mktemp("network")
    AutoencoderVTP(sample_size=32, patch_size=8, latent_channels=4, **sizes).save_pretrained(folder)
    return f"vtp:{folder}"


def test_a_training_image_finds_itself(network, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{k}.png")
    training = TrainingImages(str(tmp_path), (32, 32), "cpu", network)
    queries = torch.from_numpy(pixels[[3, 1]]).permute(0, 3, 1, 2)
    found, distances = training.nearest(queries)
    assert torch.equal(found, queries) and max(distances) < 1e-6


def test_statistics_have_no_neighbours(network, tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="statistics.npz holds statistics only, expected images"):
        TrainingImages(str(tmp_path / "statistics.npz"), (32, 32), "cpu", network)
