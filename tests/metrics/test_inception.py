"""Inception's three outputs and every number made of them, against torch-fidelity on the same random weights."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vtp_diffusion.evaluation.references import read_statistics
from vtp_diffusion.metrics import inception
from vtp_diffusion.metrics.features import Extractor
from vtp_diffusion.metrics.frechet import GaussianStatistics, frechet_distance
from vtp_diffusion.metrics.inception import (
    InceptionFeatures,
    flatten_spatial,
    resize_like_tensorflow1,
    save_random_inception,
)
from vtp_diffusion.metrics.networks import feature_network

torch_fidelity = pytest.importorskip("torch_fidelity")
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x  # noqa: E402
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric  # noqa: E402

PROGRAM = Path(__file__).parents[2] / "eval" / "generation.py"
COUNT = 12


def textures(count, seed):
    """uint8 (N, 3, 48, 40), smooth, of a contrast that depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, 5, 5, generator=generator) * (40 + 15 * seed) + 128
    return torch.nn.functional.interpolate(noise, (48, 40), mode="bilinear").clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_random_inception(tmp_path_factory.mktemp("weights") / "random.pth", seed=0)


@pytest.fixture(scope="module")
def images():
    return textures(4, 0)


@pytest.fixture(scope="module")
def theirs(weights, images):
    """torch-fidelity's outputs, and the input of the block that sFID's features come from."""
    layers = ["2048", "logits_unbiased"]
    model = FeatureExtractorInceptionV3("theirs", layers, feature_extractor_weights_path=str(weights))
    inputs = []
    model.Mixed_6d.register_forward_hook(lambda module, given, output: inputs.append(given[0]))
    features, logits = model(images)
    return {"model": model, "features": features, "logits": logits, "mixed_6c": inputs[0]}


@pytest.fixture(scope="module")
def ours(weights, images):
    return Extractor(InceptionFeatures(weights), "cpu")(images)


def test_features_and_logits_are_torch_fidelitys(theirs, ours):
    for name in ("features", "logits"):
        difference = (ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()
        assert difference < 1e-5
        assert theirs[name].std(0).mean() / theirs[name].abs().mean() > 1e-2, (
            "images that all look alike prove nothing"
        )


def test_spatial_features_lie_in_tensorflows_order(theirs, ours):
    # branch1x1 by its definition, convolution, batch norm and ReLU one by one, each feature put where TensorFlow's
    # (height, width, channel) has it
    block, x = theirs["model"].Mixed_6d.branch1x1, theirs["mixed_6c"]
    weight, norm = block.conv.weight[:7, :, 0, 0], block.bn
    x = torch.einsum("oc,bcyx->boyx", weight, x)
    mean, deviation = norm.running_mean[:7], (norm.running_var[:7] + norm.eps).sqrt()
    x = (x - mean[:, None, None]) / deviation[:, None, None] * norm.weight[:7, None, None] + norm.bias[:7, None, None]
    expected = torch.empty(4, 2023)
    for row in range(17):
        for column in range(17):
            for channel in range(7):
                expected[:, (row * 17 + column) * 7 + channel] = x[:, channel, row, column].clamp_min(0)
    assert (ours["spatial"] - expected).abs().max() / expected.abs().max() < 1e-5
    assert (ours["spatial"] == 0).any() and (ours["spatial"] > 0).any()
    assert flatten_spatial(torch.arange(192 * 289).view(1, 192, 17, 17))[0, :8].tolist() == [
        0, 289, 578, 867, 1156, 1445, 1734, 1
    ]  # fmt: skip


def test_resizing_is_bit_for_bit_torch_fidelitys(images):
    for x in (images.float(), torch.rand(1, 3, 400, 299)):
        expected = interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
        assert torch.equal(resize_like_tensorflow1(x), expected)


def test_fast_mode_rounds_to_float16(weights, images, theirs):
    fast = Extractor(InceptionFeatures(weights), "cpu", mode="fast")(images[:2])
    spread = (theirs["features"] - theirs["features"].mean(0)).norm(dim=1).mean()
    difference = (fast["features"] - theirs["features"][:2]).norm(dim=1).max()
    assert 0 < difference / spread < 0.05
    assert fast["features"].dtype == fast["spatial"].dtype == torch.float32


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of PNG files."""
    root = tmp_path_factory.mktemp("folders")
    for seed, name in enumerate(("generated", "reference")):
        (root / name).mkdir()
        for k, image in enumerate(textures(COUNT, seed + 1)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / name / f"{k:02d}.png")
    return root


def test_the_program_gives_torch_fidelitys_numbers(weights, folders, tmp_path, monkeypatch, capsys):
    generated, reference = folders / "generated", folders / "reference"
    npz = tmp_path / "reference.npz"
    np.savez(npz, np.stack([np.array(Image.open(path)) for path in sorted(reference.iterdir())]))
    output = tmp_path / "r.json"
    # random weights give no FID: only this test's word lets them pass
    monkeypatch.setattr(inception, "INCEPTION_SHA256_PREFIX", inception.file_sha256(weights)[:8])
    words = ["--images", generated, "--reference", npz, "--feature-network", "inception", "--weights", weights]
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *map(str, words), "--output", str(output), "--device", "cpu"])
    monkeypatch.setenv("VTP_DIFFUSION_TRACEBACK", "1")
    runpy.run_path(str(PROGRAM), run_name="__main__")
    printed = capsys.readouterr().out
    results = json.loads(output.read_text())
    rows = {row["distance"]: row for row in results["distances"] + results["kernel_distances"]}
    scores = {row["score"]: row for row in results["scores"]}
    assert rows.keys() == {"FID", "sFID", "KID"}
    assert scores.keys() == {"Inception score", "precision", "recall", "density", "coverage"}
    assert all(name in printed for name in [*rows, *scores]) and results["not_measured"] == []
    for row in rows.values():
        assert row["spread"]["value"] > 0 and row["floor"]["sizes"] == [6, 6] and row["num_images"] == COUNT

    expected = torch_fidelity.calculate_metrics(
        input1=str(generated), input2=str(reference), cuda=False, kid=True, prc=True, cache=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights), save_cpu_ram=True,
        feature_layer_prc="2048", samples_shuffle=False, kid_subset_size=COUNT // 2, verbose=False,
    )  # fmt: skip
    shuffled = torch_fidelity.calculate_metrics(
        input1=str(generated), cuda=False, isc=True, cache=False, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights), save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    assert (rows["KID"]["subset_size"], rows["KID"]["subsets"]) == (COUNT // 2, 100)
    score = scores["Inception score"]
    assert score["images_per_split"] == 1 and "parts hold 1 images each, and no score exceeds" in printed
    assert "adm_value" not in score  # only 50,000 images have one
    assert score["value"] == pytest.approx(shuffled["inception_score_mean"], rel=1e-4)
    assert rows["KID"]["value"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert scores["precision"]["value"] == pytest.approx(expected["precision"])
    assert scores["recall"]["value"] == pytest.approx(expected["recall"])


def test_the_frechet_distance_is_torch_fidelitys(ours, theirs):
    # 256 of the 2048 features: theirs takes the eigenvalues of an unsymmetric matrix, half a minute at full width
    x = ours["features"][:, :256].double()
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(600, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(600, 256, generator=generator, dtype=torch.float64)
    a, b = mix[:300] @ x + noise[:300], mix[300:] @ x + 1.2 * noise[300:]
    expected = fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), verbose=False)
    distance = frechet_distance(*map(GaussianStatistics.of, (a, b)))
    assert distance == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)


def test_adms_reference_file_is_read_in_full_and_refused_in_part(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "INCEPTION_SHA256_PREFIX", inception.file_sha256(weights)[:8])
    network = feature_network("inception", weights)
    statistics = {"mu": np.arange(2048.0), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((1, 4, 4, 3), np.uint8), **statistics)
    found = read_statistics(tmp_path / "adm.npz", network)
    assert found["features"].mean[5] == 5 and found["spatial"].dim == 2023
    np.savez(tmp_path / "short.npz", **{key: value[..., :2000] for key, value in statistics.items()})
    with pytest.raises(ValueError, match=r"mu and sigma are \(2000,\) and \(2048, 2000\), expected .* 2048 features"):
        read_statistics(tmp_path / "short.npz", network)
    np.savez(tmp_path / "half.npz", mu=np.zeros(2048))
    with pytest.raises(ValueError, match="half.npz holds mu without sigma: expected both"):
        read_statistics(tmp_path / "half.npz", network)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "adm.npz").read_bytes()[:2000])
    with pytest.raises(ValueError, match="cut.npz is not an npz file, or is damaged"):
        read_statistics(tmp_path / "cut.npz", network)
    with pytest.raises(ValueError, match="holds statistics of features of inception .* the feature network is vgg16"):
        read_statistics(tmp_path / "adm.npz", feature_network("vgg16"))
