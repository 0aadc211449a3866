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
    compile = lambda function, **options: compiled.append(function.__name__) or function  # noqa: E731
    monkeypatch.setattr(torch, "compile", compile)  # a minute on a CPU
    size = ("--size", "tiny", "--resolution", 32, "--batch_size", 2, "--repeats", 1, "--device", "cpu")
    results = run("latent_extraction", tmp_path, *size)
    # two blocks of a VTP five times, then three encoders and two decoders
    assert compiled == ["forward"] * 10 + ["encode_raw"] * 3 + ["decode_to_images"] * 2
    rates = results["images_per_second"]
    assert len(rates) == 15 and {"autocast, compiled", "decode, bfloat16, whole compiled"} < set(rates)
    assert all(rate > 0 for rate in rates.values()) and results["first_batch_seconds"].keys() == rates.keys()
    assert all(0 < results["latent_error"][kind] < 0.1 for kind in ("autocast", "bfloat16 stream", "bfloat16"))
    assert results["ratio_to_peer"] == {} and results["device"] == "CPU"
    assert "not comparable with the peer's" in capsys.readouterr().out


def test_rehearsal(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # as of a program that lies there
    size = ("--images", 20, "--latents", 32, "--npz_images", 4, "--side", 16, "--folder", tmp_path)
    results = run("imagenet_rehearsal", tmp_path, *size)
    assert results["minutes_for_all"]["hash"] == pytest.approx(1_281_167 / results["a_second"]["hash"] / 60)
    output = capsys.readouterr().out
    assert all(f"{name:13}" in output and rate > 0 for name, rate in results["a_second"].items())
    assert len(results["a_second"]) == 9 and results["peak_memory_gib"] > 0
    with pytest.raises(ValueError, match="--latents is 9, expected an even number"):
        run("imagenet_rehearsal", tmp_path, "--latents", 9)


def test_the_table_of_costs_in_the_readme_is_that_of_the_committed_rates(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("rehearsal", ROOT / "benchmarks" / "imagenet_rehearsal.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    assert program.costs() in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
