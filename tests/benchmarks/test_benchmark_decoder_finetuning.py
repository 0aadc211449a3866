"""benchmarks/decoder_finetuning.py at its smallest; the programs that it runs are started as a user starts them."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """Run the benchmark with further words."""

    def run(*words):
        options = [f"--run_dir={tmp_path / 'run'}", f"--output={tmp_path / 'results.json'}", "--device=cpu"]
        options += [f"--training_config={ROOT / 'train_vtp' / 'configs' / 'finetune_decoder_tiny.yaml'}"]
        monkeypatch.setattr(sys, "argv", ["x", *options, "--num_images=3", "--feature_network=vgg16", *words])
        runpy.run_path(str(ROOT / "benchmarks" / "decoder_finetuning.py"), run_name="__main__")

    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return run


def test_both_autoencoders_are_measured_on_the_same_images(tmp_path, benchmark):
    benchmark("--", "--max_train_steps=3", "--data.limit=16", "--evaluation_images=4")
    results = json.loads((tmp_path / "results.json").read_text())
    before, after = results["before"], results["after"]
    assert before["fingerprint"] == after["fingerprint"] and before["settings"]["data"]["limit"] == 16
    assert before["autoencoder"]["weights"] != after["autoencoder"]["weights"]
    assert results["training"]["steps"] == 3 and results["training"]["encoder_unchanged"]
    assert results["summary"]["after"]["psnr"] == after["psnr"] != before["psnr"]
    assert set(results["seconds"]) == {"before", "training", "after"}


def test_what_the_evaluation_lacks_is_named_before_anything_is_trained(tmp_path, benchmark, capfd):
    with pytest.raises(SystemExit) as ended:
        benchmark("--lpips_trunk=nowhere.safetensors")
    assert ended.value.code == 2 and "error: trunk 'nowhere.safetensors' is neither" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
