"""benchmarks/decoder_finetuning.py at its smallest, as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def benchmark(folder, *words):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, ROOT / "benchmarks" / "decoder_finetuning.py", f"--run_dir={folder / 'run'}"]
    command += ["--training_config", ROOT / "train_vtp" / "configs" / "finetune_decoder_tiny.yaml", "--device=cpu"]
    command += ["--num_images=3", "--feature_network=vgg16", f"--output={folder / 'results.json'}", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_both_autoencoders_are_measured_on_the_same_images(tmp_path):
    done = benchmark(tmp_path, "--", "--max_train_steps=3", "--data.limit=16", "--evaluation_images=4")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    before, after = results["before"], results["after"]
    assert before["fingerprint"] == after["fingerprint"] and before["settings"]["data"]["limit"] == 16
    assert before["autoencoder"]["weights"] != after["autoencoder"]["weights"]
    assert results["training"]["steps"] == 3 and results["training"]["encoder_unchanged"]
    assert results["summary"]["after"]["psnr"] == after["psnr"] != before["psnr"]
    assert set(results["seconds"]) == {"before", "training", "after"}


def test_what_the_evaluation_lacks_is_named_before_anything_is_trained(tmp_path):
    done = benchmark(tmp_path, "--lpips_trunk=nowhere.safetensors")
    assert done.returncode == 2 and "error: trunk 'nowhere.safetensors' is neither" in done.stderr
    assert not (tmp_path / "run").exists()
