"""eval/generation.py with the six networks, MIND and memorisation; one pass over the images for all of it."""

import json
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small_timm import make_small, save_weights

from vtp_diffusion.data.npz import NpzImages
from vtp_diffusion.evaluation.comparison import compare_files
from vtp_diffusion.evaluation.report import read_result, table_rows
from vtp_diffusion.metrics import networks, timm_networks
from vtp_diffusion.metrics.fdr6 import PUBLISHED_CONSTANTS, SIX
from vtp_diffusion.metrics.timm_networks import TimmFeatures, open_timm

PROGRAM = Path(__file__).parents[2] / "eval" / "generation.py"
COUNT = 24


@pytest.fixture
def files(tmp_path, monkeypatch):
    """NETWORK=FILE of all six: small ones of timm, another MAE in the place of Inception."""
    pytest.importorskip("timm")
    make_small(monkeypatch)
    table = timm_networks.TIMM_NETWORKS
    monkeypatch.setitem(table, "inception", table["mae_l"])
    monkeypatch.setitem(networks.FEATURE_NETWORKS, "inception", partial(open_timm, "inception"))
    return [f"{name}={save_weights(tmp_path, name)}" for name in SIX]


@pytest.fixture
def sets(tmp_path):
    """Three npz of smooth images of one distribution; the generated ones begin with five training images."""
    images = {}
    for seed, name in enumerate(("train", "validation", "generated")):
        noise = torch.randn(COUNT, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 60 + 128
        smooth = torch.nn.functional.interpolate(noise, (32, 32), mode="bilinear").clamp(0, 255).to(torch.uint8)
        images[name] = smooth.permute(0, 2, 3, 1).numpy()
    images["generated"][:5] = images["train"][:5]
    for name, pixels in images.items():
        np.savez(tmp_path / f"{name}.npz", pixels)
    return {name: tmp_path / f"{name}.npz" for name in images}


@pytest.fixture
def evaluate(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), *map(str, words), "--device", "cpu"])
        monkeypatch.setenv("VTP_DIFFUSION_TRACEBACK", "1")
        runpy.run_path(sys.argv[0], run_name="__main__")
        return capsys.readouterr().out

    return run


def test_six_networks_mind_and_memorisation_in_one_pass(files, sets, evaluate, tmp_path, monkeypatch):
    reads, resizes = [], []
    read, resized = NpzImages.read, TimmFeatures.resized
    monkeypatch.setattr(NpzImages, "read", lambda self, indices: reads.extend(indices) or read(self, indices))
    monkeypatch.setattr(TimmFeatures, "resized", lambda self, x: resizes.append(len(x)) or resized(self, x))
    output = tmp_path / "r.json"
    printed = evaluate(
        "--images", sets["generated"], "--reference", sets["train"], "--floor_images", sets["validation"],
        "--feature_network", "fdr6", "--weights", *files, "--metrics", "mind", "memorisation",
        "--fdr6_constants", "computed", "--feature_batch_size", 8, "--output", output,
    )  # fmt: skip
    assert len(reads) == 3 * COUNT, "every image is decoded once, whatever the number of networks"
    assert resizes == [8] * (3 * 3 * 2), "and resized once a size: three sets of three batches, 224 and 256 pixels"
    results = json.loads(output.read_text())
    assert [n["name"] for n in results["networks"]] == list(SIX) == results["settings"]["feature_network"]
    six = results["fdr6"]["generated"]
    assert six["value"] == pytest.approx(np.mean([six["distances"][n] / six["constants"][n] for n in SIX]))
    assert results["fdr6"]["constants_from"] == f"computed of {COUNT} floor images"
    by_network = {row["network"]: row for row in results["distances"] if row["distance"].startswith("FD-")}
    for name in SIX:
        row = by_network[name]
        assert row["value"] == six["distances"][name]
        assert f"{row['value']:.4g} / {six['constants'][name]:.4g} = " in printed
        assert six["constants"][name] == pytest.approx(row["floor"]["real"]), "held-out images against the reference"
    minds = [row for row in results["distances"] if row["distance"].startswith("MIND")]
    assert [row["distance"] for row in minds[:2]] == ["MIND", "MIND (ConvNeXtV2-B)"] and len(minds) == 6
    assert minds[0]["num_images"] == COUNT and minds[0]["projections"] == 1000
    assert minds[0]["floor"]["kind"] == "held-out" and 0 < minds[0]["spread"]["value"] < minds[0]["value"]
    shares = {row["network"]: row["share"] for row in results["memorisation"]}
    assert min(shares.values()) >= 5 / COUNT and f"{COUNT} training images" in printed
    assert any(row.what == "FDr6" and "clip_l" in row.details for row in table_rows([read_result(output)]))


def test_published_constants_and_statistics_of_files(files, sets, evaluate, tmp_path):
    words = ("--reference", sets["train"], "--weights", *files)
    printed = evaluate(
        "reference", "--reference", sets["train"], "--feature_network", "dinov2_l", "mae_l", "--weights", *files[2:4],
        "--resolution", 32, "--output", tmp_path / "made.npz",
    )  # fmt: skip
    statistics = tmp_path / "made-dinov2_l.npz"
    assert f"on dinov2_l and {COUNT} of the images\n" in printed and f"written: {statistics}, " in printed
    assert (tmp_path / "made-mae_l.npz").is_file()
    outputs = [tmp_path / "a.json", tmp_path / "b.json"]
    common = ("--images", sets["generated"], *words, "--feature_network", "fdr6")
    evaluate(*common, "--output", outputs[0])
    evaluate(*common, "--reference_statistics", f"dinov2_l={statistics}", "--output", outputs[1])
    first, second = (json.loads(output.read_text()) for output in outputs)
    assert first["fdr6"]["generated"]["constants"] == PUBLISHED_CONSTANTS
    assert "published for ImageNet at 256 px" in first["fdr6"]["constants_from"]
    assert first["fdr6"]["generated"]["value"] == pytest.approx(second["fdr6"]["generated"]["value"], rel=1e-6)
    line = compare_files([str(outputs[0])] * 2)[-1]
    assert line.split()[0] == "FDr6" and " 0 ± at most " in line
    first["fdr6"]["generated"]["constants"]["mae_l"] = 1.0
    (tmp_path / "other.json").write_text(json.dumps(first))
    assert "FDr6 does not compare" in compare_files([str(outputs[0]), str(tmp_path / "other.json")])[-1]
    given = ("--reference", sets["validation"], "--reference_statistics", f"dinov2_l={statistics}")
    with pytest.raises(ValueError, match="made-dinov2_l.npz, the statistics .* for dinov2_l, is of other images"):
        evaluate("--images", sets["generated"], *words[2:], *given, *common[-2:], "--output", tmp_path / "c.json")
    with pytest.raises(ValueError, match="the statistics of the reference of FD-DINOv2-L are None in A"):
        compare_files([str(output) for output in outputs])
    with pytest.raises(ValueError, match="statistics of features of dinov2_l .* the feature network is clip_l"):
        evaluate(*common, "--reference_statistics", f"clip_l={statistics}", "--output", outputs[1])
    shutil.copy(sets["train"], tmp_path / "images.npz")
    for file, message in (("images.npz", "images.npz holds no statistics"), ("none.npz", "for clip_l, is not there")):
        with pytest.raises(ValueError, match=message):
            evaluate(*common, "--reference_statistics", f"clip_l={tmp_path / file}", "--output", outputs[1])


def test_floor_images_of_the_reference_are_refused(files, sets, evaluate, tmp_path):
    mixed = np.load(sets["validation"])["arr_0"].copy()
    mixed[:2] = np.load(sets["train"])["arr_0"][:2]
    np.savez(tmp_path / "mixed.npz", mixed)
    with pytest.raises(ValueError, match=f"2 of {COUNT} floor_images are also in the reference, pixel for pixel"):
        evaluate(
            "--images", sets["generated"], "--reference", sets["train"], "--floor_images", tmp_path / "mixed.npz",
            "--feature_network", "mae_l", "--weights", files[3], "--output", tmp_path / "r.json",
        )  # fmt: skip


def test_what_a_judge_lacks_is_named_before_anything_is_read(files, sets, evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("huggingface_hub").constants, "HF_HUB_CACHE", str(tmp_path))
    few = tmp_path / "few.npz"
    np.savez(few, np.load(sets["generated"])["arr_0"][:12])
    fdr6 = ("--feature_network", "fdr6", "--weights", *files)
    memorisation = ("--feature_network", "mae_l", "--weights", files[3], "--metrics", "memorisation")
    refused = [
        ((sets["generated"], *fdr6[:3], *files[:-1]), "the weights of clip_l are not in "),
        ((few, *fdr6), "the generated images are 12, .* has 12 features"),
        ((sets["generated"], *fdr6, "--fdr6_constants", "computed"), "fdr6_constants computed needs floor_images"),
        ((few, "--feature_network", "mae_l", "--fdr6_constants", "computed"), "feature_network lacks inception, "),
        ((few, *memorisation), "metrics memorisation needs floor_images"),
        ((few, *memorisation, "--floor_images", few), "there are 12, expected at least 20"),
        ((few, "--feature_network", "mae_l", "--metrics", "lpips"), "metrics"),
        ((few, "--feature_network", "mae_l", "--reference_statistics", "x.npz"), "must be NETWORK=FILE.npz with one"),
    ]
    monkeypatch.setattr(NpzImages, "read", lambda self, indices: pytest.fail("images were read"))
    for (images, *words), message in refused:
        with pytest.raises((ValueError, SystemExit), match=message):
            evaluate("--images", images, "--reference", sets["train"], *words, "--output", tmp_path / "r.json")
