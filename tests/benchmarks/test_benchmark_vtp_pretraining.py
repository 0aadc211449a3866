"""The benchmarks of pre-training at a tiny size, as a user starts them."""

import json
import os
import runpy
import subprocess
import sys

import pytest
import torch
from test_joint import arguments, load_program
from test_train_vtp import ROOT, fresh_accelerate  # noqa: F401

from vtp_diffusion.runtime.config import config_to_dict, load_config


def start(name, folder, *words):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "benchmarks" / name, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_speed_of_every_objective_is_reported(tmp_path):
    words = ["--size=tiny", "--batch=8", "--steps=1", "--lpips_trunk=none", "--bfloat16_stream"]
    done = start("vtp_pretraining.py", tmp_path, *words, "--output=speed.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "speed.json").read_text())
    assert results["batches"] == [8, 2, 1] and results["images_per_second"] > 0
    assert results["mfu_of_989_tflops"] is None  # of a GPU only
    parts = results["objectives"].values()
    for name in ("share_of_time", "share_of_operations"):
        assert abs(sum(part[name] for part in parts) - 1) < 1e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_recording_is_for_a_gpu(tmp_path):
    done = start("vtp_pretraining.py", tmp_path, "--size=tiny", "--cuda_graphs")
    assert done.returncode == 1 and "--cuda_graphs with --steps 20 on a cpu, expected a GPU" in done.stderr


def test_twins_are_compared_and_others_refused(tmp_path, monkeypatch):
    program = load_program("train_vtp")
    program.main(arguments(tmp_path / "joint", "--max_train_steps=2"))
    alone = {"objectives": ["reconstruction"]}
    program.main(arguments(tmp_path / "twin", "--max_train_steps=2", **alone))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--joint=joint", "--twin=twin", "--output=out/compared.json"])
    runpy.run_path(str(ROOT / "benchmarks" / "vtp_objectives.py"), run_name="__main__")
    results = json.loads((tmp_path / "out" / "compared.json").read_text())
    held_out = {
        run: json.loads((tmp_path / run / "results.json").read_text())["held_out"] for run in ("joint", "twin")
    }
    assert results["psnr_loss_db"] == held_out["twin"]["psnr"] - held_out["joint"]["psnr"]
    assert results["held_out"]["knn_accuracy"] == {run: held_out[run]["knn_accuracy"] for run in held_out}
    assert (tmp_path / "out" / "compared.svg").read_text().count("<polyline") >= 4
    program.main(arguments(tmp_path / "other", "--max_train_steps=2", "--seed=1", **alone))
    monkeypatch.setattr(sys, "argv", ["x", "--joint=joint", "--twin=other", "--output=x.json"])
    with pytest.raises(SystemExit, match="seed: 0 and 1"):
        runpy.run_path(str(ROOT / "benchmarks" / "vtp_objectives.py"), run_name="__main__")


def test_the_configurations_of_the_twins_differ_in_nothing_else():
    check = runpy.run_path(str(ROOT / "benchmarks" / "vtp_objectives.py"))["check_twins"]
    program, folder = load_program("train_vtp"), ROOT / "train_vtp" / "configs"
    runs = [
        {"configuration": config_to_dict(load_config(program.Config, folder / name)), "held_out": {"data": "emoji"}}
        for name in ("openmoji.yaml", "openmoji_twin.yaml")
    ]
    check(*runs)
    runs[1]["configuration"]["model"]["latent_channels"] += 1
    with pytest.raises(SystemExit, match="model.latent_channels"):
        check(*runs)
