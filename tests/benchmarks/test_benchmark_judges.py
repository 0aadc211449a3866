"""benchmarks/mind_spread.py and benchmarks/six_networks.py at their smallest."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def test_blurred_copies_are_told_from_a_folder_of_images(tmp_path, capsys):
    generator = np.random.default_rng(0)
    (tmp_path / "real").mkdir()
    for k in range(24):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "real" / f"{k}.png")
    output = tmp_path / "x.json"
    words = ("--reference", tmp_path / "real", "--resolution", 32, "--sizes", 8, 50, "--repetitions", 3)
    load("mind_spread").main([*map(str, words), "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [(row["distance"], row["N"]) for row in rows] == [("MIND", 8), ("FD", 8)], "50 are more than the half holds"
    assert all(row["images"] > row["real"] > 0 and row["separation"] > 1 for row in rows)
    assert "left out: N of 50, more than 3/4 of half" in capsys.readouterr().out


def test_separation_is_known_for_shifted_gaussians():
    real = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    mind, frechet = load("mind_spread").measure(real, real + 3, True, [100], 8)
    assert frechet["images"] == pytest.approx(27, rel=0.15) and mind["images"] == pytest.approx(81, rel=0.15)
    assert min(mind["separation"], frechet["separation"]) > 5


def test_six_networks_are_timed_together_and_alone(tmp_path):
    pytest.importorskip("torch_fidelity")
    output = tmp_path / "x.json"
    words = ["--tiny", "--device", "cpu", "--size", "32", "--num_images", "2", "--batch_size", "1", "--modes", "exact"]
    load("six_networks").main([*words, "--output", str(output)])
    (row,) = json.loads(output.read_text())["rows"]
    rates = row["images_per_second"]
    assert len(rates) == 7 and min(rates.values()) > 0
    alone = [rate for name, rate in rates.items() if name != "all six"]
    assert row["ratio_to_slowest"] == pytest.approx(rates["all six"] / min(alone), rel=0.05)
    assert row["ratio_to_one_by_one"] == pytest.approx(rates["all six"] * sum(1 / r for r in alone), rel=0.05)
