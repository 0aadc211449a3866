"""eval/reconstruction.py on a tiny autoencoder."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import vtp_diffusion.data.image_datasets
from vtp_diffusion import AutoencoderVTP
from vtp_diffusion.metrics.pixels import ssim

PROGRAM = Path(__file__).parents[2] / "eval" / "reconstruction.py"


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
    monkeypatch.setattr(sys, "argv", [*words, "--worst_cases", str(tmp_path / "worst.png")])
    runpy.run_path(words[0], run_name="__main__")
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["num_images"] == 6 and 4 < results["psnr"] < 15 and results["lpips"] > 0.3
    assert results["distances"]["FD-EffLite0"] > 10
    spread = results["distance_spreads"]["FD-EffLite0"]
    assert spread["kind"] == "jackknife of 6 random groups of pairs" and 0 < spread["value"]
    assert results["lpips_trunk"]["file"] == "alexnet.ckpt" and len(results["networks"][0]["sha256"]) == 64
    assert (
        results["evaluation"] == "reconstruction" and 0 < results["ssim"] < 0.5 and "luma" in results["ssim_settings"]
    )
    worst = results["worst"]
    assert sorted(case["key"] for case in worst) == [f"{k}.png" for k in range(6)]
    assert worst == sorted(worst, key=lambda case: case["psnr"])
    assert np.mean([case["psnr"] for case in worst]) == pytest.approx(results["psnr"])
    with Image.open(tmp_path / "worst.png") as picture:
        assert picture.width >= 8 * 32 and picture.height >= 2 * 32
    printed = capsys.readouterr().out
    assert "LPIPS" in printed and "features: efficientnet_lite0 (6 images, 320 features). Covariances are" in printed


@pytest.mark.parametrize("batch_size", [4, 8])  # the second process has two of the six images, or none
def test_two_processes_measure_what_one_does(batch_size, words, tmp_path, monkeypatch):
    words += ["--batch_size", str(batch_size)]
    for k in (0, 5):
        Image.effect_noise((24, 31), 60).convert("RGB").save(tmp_path / "images" / f"{k}.png")
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")
    one = json.loads((tmp_path / "r.json").read_text())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    variables = {"PYTHONPATH": str(PROGRAM.parents[1]), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launch, *words, "--output", str(tmp_path / "two.json"), "--worst_cases", str(tmp_path / "worst.png")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n6 images\n") == 1, "not two processes but twice one"
    two = json.loads((tmp_path / "two.json").read_text())
    assert [case["key"] for case in one["worst"]] == [case["key"] for case in two["worst"]]
    assert one["enlarged"] == two["enlarged"] == 2
    for name in ("psnr", "ssim", "lpips"):
        assert two[name] == pytest.approx(one[name], rel=1e-6)
    assert two["distances"]["FD-EffLite0"] == pytest.approx(one["distances"]["FD-EffLite0"], rel=1e-5)
    spreads = [result["distance_spreads"]["FD-EffLite0"]["value"] for result in (one, two)]
    assert spreads[1] == pytest.approx(spreads[0], rel=1e-4) and (tmp_path / "worst.png").is_file()


def test_some_images_are_a_random_choice(words, tmp_path, monkeypatch):
    found = []
    for seed in ("0", "0", "1"):
        monkeypatch.setattr(sys, "argv", [*words, "--num_images", "4", "--seed", seed])
        runpy.run_path(words[0], run_name="__main__")
        found.append(json.loads((tmp_path / "r.json").read_text()))
    keys = [sorted(case["key"] for case in results["worst"]) for results in found]
    assert keys[0] == keys[1] != keys[2] and all(len(set(names)) == 4 for names in keys)
    assert ["0.png", "1.png", "2.png", "3.png"] not in keys
    assert found[2]["subset_rule"] == "a random subset of 6, seed 1" and found[0]["num_images"] == 4
    assert found[0]["psnr"] == found[1]["psnr"] != found[2]["psnr"]


def test_an_image_that_cannot_be_read_is_not_measured_as_its_neighbour(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vtp_diffusion.data.image_datasets, "IN_MEMORY_BYTES", 0)
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    Image.new("RGB", (31, 40), "red").save(tmp_path / "images" / "4.png")
    monkeypatch.setattr(sys, "argv", [*words, "--data.skip_unreadable", "true"])
    runpy.run_path(words[0], run_name="__main__")
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["num_images"] == 5 and results["skipped"] == ["2.png"] and results["enlarged"] == 1
    assert sorted(case["key"] for case in results["worst"]) == [f"{k}.png" for k in (0, 1, 3, 4, 5)]
    printed = capsys.readouterr().out
    assert "1 more cannot be read and are left out, the first is 2.png" in printed
    assert "1 of them are smaller than 32 px and were enlarged" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_images", "7"], "num_images is 7, but split train has 6 images"),
        (["--num_images", "2"], "num_images is 2, expected 3 or more"),
        (["--output", "r.txt"], "output must be a FILE.json, got r.txt"),
        (["--output", "/dev/null/r.json"], "output /dev/null/r.json cannot be written"),
        (["--worst_cases", "/dev/null/w.png"], "worst_cases /dev/null/w.png cannot be written"),
        (["--lpips_network", "squeeze"], "'squeeze' is unknown; known: vgg, alex"),
        (["--worst_cases", "worst"], "worst_cases must be a FILE.png"),
        (["--vae", "none"], "none is not the folder of a diffusers autoencoder"),
        (["--data.resolution", "36"], "multiple of the autoencoder's patch 8, got 36"),
        (["--lpips_trunk", "none.safetensors"], "neither"),
        (["--weights", "clip_l=x"], "weights are given for clip_l, measured are efficientnet_lite0"),
    ],
)
def test_bad_input(more, message, words, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", words + more)
    monkeypatch.setenv("VTP_DIFFUSION_TRACEBACK", "1")
    with pytest.raises(ValueError, match=message):
        runpy.run_path(words[0], run_name="__main__")
    assert not (tmp_path / "r.json").exists()


def ssim_of_the_paper(x, y):
    """Another way to the same: scipy's Gaussian filter, cut to 11 taps and to windows inside the image."""
    x, y = (image.astype(float) @ [0.299, 0.587, 0.114] for image in (x, y))

    def mean(z):
        return ndimage.gaussian_filter(z, sigma=1.5, radius=5)[5:-5, 5:-5]

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, covariance = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (numerator / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean()


def test_ssim_is_that_of_the_paper():
    generator = np.random.default_rng(0)
    x = ndimage.zoom(generator.integers(0, 256, (4, 8, 10, 3)), (1, 4, 4, 1), order=1).astype(np.uint8)
    y = np.clip(x + generator.normal(0, [[[[2]]], [[[10]]], [[[40]]], [[[0]]]], x.shape), 0, 255).astype(np.uint8)
    found = ssim(*(torch.from_numpy(images).permute(0, 3, 1, 2) for images in (x, y)))
    expected = [ssim_of_the_paper(a, b) for a, b in zip(x, y, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-10)
    assert found[3] == 1 > found[0] > found[1] > found[2]
    # two constants: no variance, so that only the luminance term is left
    dark, bright = (torch.full((1, 3, 16, 16), value, dtype=torch.uint8) for value in (50, 100))
    assert ssim(dark, bright).item() == pytest.approx((2 * 50 * 100 + 2.55**2) / (50**2 + 100**2 + 2.55**2))
    with pytest.raises(ValueError, match="8x16, SSIM needs at least 11x11"):
        ssim(dark[:, :, :8], bright[:, :, :8])
