"""The benchmarks of latents run at a tiny size, and say what they measured."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(name, folder, *words):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.main([*map(str, words), "--output", str(folder / "results" / "x.json")])
    return json.loads((folder / "results" / "x.json").read_text())


def test_loading(tmp_path, capsys):
    size = ("--num_samples", 32, "--num_shards", 2, "--batch_size", 8, "--num_batches", 3)
    results = run("latent_loading", tmp_path, *size, "--peer_batches", 2, "--repeats", 1, "--workers", 1)
    rates = results["latents_per_second"]
    output = capsys.readouterr().out
    for case in ("warm", "cold"):
        assert results["ratio_to_peer"][case] == rates[f"ours_{case}"] / rates[f"peer_{case}"] > 0
        assert results["ratio_to_target"][case] == rates[f"ours_{case}"] / 20_000
        assert f"{results['ratio_to_target'][case]:.2f} x the target of 20,000" in output
    assert results["read_from_disk_per_byte_used"] >= 0
    with pytest.raises(ValueError, match="do not fit into --num_samples 32"):
        run("latent_loading", tmp_path, *size)


def test_extraction(tmp_path, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)  # a minute on a CPU
    size = ("--size", "tiny", "--resolution", 32, "--batch_size", 2, "--repeats", 1, "--device", "cpu")
    results = run("latent_extraction", tmp_path, *size)
    assert len(compiled) == 3 and len(results["images_per_second"]) == 6
    assert all(0 < results["latent_error"][kind] < 0.1 for kind in ("autocast", "bfloat16 stream", "bfloat16"))
    assert results["ratio_to_peer"] == {} and results["device"] == "CPU"
    assert "not comparable with the peer's" in capsys.readouterr().out
