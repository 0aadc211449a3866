"""eval/reconstruction.py on a tiny autoencoder."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vtp_diffusion import AutoencoderVTP

PROGRAM = Path(__file__).parents[1] / "eval" / "reconstruction.py"


@pytest.fixture
def words(tmp_path):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
    sizes = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in size.items()}
    AutoencoderVTP(sample_size=32, patch_size=8, latent_channels=4, **sizes).save_pretrained(tmp_path / "vae")
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for k in range(6):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{k}.png")
    return [
        str(PROGRAM), "--device", "cpu", "--vae", str(tmp_path / "vae"), "--output", str(tmp_path / "r.json"),
        "--data.source", str(tmp_path / "images"), "--data.resolution", "32", "--split", "train",
        "--feature_network", "efficientnet_lite0", "--batch_size", "4",
    ]  # fmt: skip


def test_a_random_autoencoder(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["num_images"] == 6 and 4 < results["psnr"] < 15 and results["lpips"] > 0.3
    assert results["distances"]["FD-EffLite0"] > 10
    assert results["lpips_trunk"]["file"] == "alexnet.ckpt" and len(results["networks"][0]["sha256"]) == 64
    assert "LPIPS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_images", "7"], "num_images is 7, but split train has 6 images"),
        (["--output", "r.txt"], "output must be a FILE.json, got r.txt"),
        (["--lpips_network", "squeeze"], "'squeeze' is unknown; known: vgg, alex"),
        (["--lpips_trunk", "none.safetensors"], "neither"),
    ],
)
def test_bad_input(more, message, words, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", words + more)
    with pytest.raises(ValueError, match=message):
        runpy.run_path(words[0], run_name="__main__")
    assert not (tmp_path / "r.json").exists()
