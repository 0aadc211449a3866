"""train_dit/train.py in two processes, weights whole and sharded: what it looks at and leaves is what one leaves.

Run as a program it is train_dit/train.py with a feature network that needs no weights.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors.torch import load_file
from test_train_dit import ROOT, arguments, fresh_accelerate, load_program, made  # noqa: F401
from tiny_training import shard_on_cpu

from vtp_diffusion import LightningDiTPipeline
from vtp_diffusion.evaluation import validation
from vtp_diffusion.metrics.features import FeatureNetwork

MODES = ("whole", "sharded")


class MeanColour(FeatureNetwork):
    """Red and green of the mean colour."""

    distance_name = "FD-colour"

    def outputs(self, images):
        return {"features": images.float().mean((2, 3))[:, :2]}


def words(folder, made, name):  # noqa: F811
    distance = (f"--validation.distance.reference.source={folder / 'images'}", "--validation.distance.num_images=5")
    return arguments(folder / name, made, "--guide.step=3", "--ema_further_decays", "0.5", *distance)


def online_words(folder, made, name, *more):  # noqa: F811
    source = ("--latents=none", f"--data.source={folder / 'images'}", "--data.resolution=16", "--augmentation.shift=4")
    return arguments(folder / name, made, *source, "--max_train_steps=3", "--validation.labels", "0", *more)


def muon_words(folder, made, name):  # noqa: F811
    muon = ("--optimizer=muon", "--model.num_layers=2", "--model.base_head_layer=1", "--max_train_steps=3")
    return arguments(folder / name, made, *muon)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, made):  # noqa: F811
    """Folders of the same run: in one process, in two with whole weights, in two with shards; of one online, in one
    process and in two with two micro-steps each; and of one with Muon and a base head, in one and in two."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "images" / "grey").mkdir(parents=True)
    for k in range(10):
        Image.new("RGB", (20, 16), (25 * k, 250 - 20 * k, 7 * k)).save(folder / "images" / "grey" / f"{k}.png")
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    online = online_words(folder, made, "online", "--gradient_accumulation_steps=2", "--keep_on_device=false")
    first = {"online": online, "muon": muon_words(folder, made, "muon")}
    command.append(json.dumps(first | {mode: words(folder, made, mode) for mode in MODES}))
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(True)
        patch.setattr(validation, "feature_network", lambda name, weights: MeanColour())
        program = load_program("train_dit")
        program.main(words(folder, made, "one"))
        AcceleratorState._reset_state(True)
        program.main(online_words(folder, made, "online-one"))
        AcceleratorState._reset_state(True)
        program.main(muon_words(folder, made, "muon-one"))
    return folder


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", MODES)
def test_losses_distances_and_pictures_are_those_of_one_process(runs, mode):
    lines = log_of(runs / mode), log_of(runs / "one")
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for name in ("loss", "grad_norm", "FD-colour", "FD-colour_floor"):
        values = [[line[name] for line in log if name in line] for log in lines]
        assert values[0] == pytest.approx(values[1], rel=1e-3) and values[0], name
    for first, second in zip(
        *([x["squared_error_by_time"] for x in log if "loss" in x] for log in lines), strict=True
    ):
        assert [value is None for value in first] == [value is None for value in second]
        assert [v for v in first if v is not None] == pytest.approx([v for v in second if v is not None], rel=1e-3)
    pictures = [
        np.asarray(Image.open(runs / name / "samples" / "step-00000006.png")).astype(int) for name in (mode, "one")
    ]
    assert abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize("mode", MODES)
def test_the_pipeline_and_its_guide_are_those_of_one_process(runs, mode):
    for part in ("transformer", "guidance_transformer"):
        first, second = (
            load_file(runs / name / "pipeline" / part / "diffusion_pytorch_model.safetensors")
            for name in (mode, "one")
        )
        assert first.keys() == second.keys()
        for name, value in first.items():
            torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-5)
    pipeline = LightningDiTPipeline.from_pretrained(runs / mode / "pipeline")
    assert pipeline(class_labels=["dog"], num_inference_steps=2, guidance_scale=2.0).images[0].size == (16, 16)


def test_online_losses_are_those_of_one_process(runs):
    losses, expected = ([x["loss"] for x in log_of(runs / name) if "loss" in x] for name in ("online", "online-one"))
    assert losses == pytest.approx(expected, rel=1e-4) and len(set(expected)) == 3


def test_muon_moves_the_weights_as_in_one_process(runs):
    found, expected = (
        load_file(runs / name / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("muon", "muon-one")
    )
    assert any(name.startswith("base_") for name in expected) and found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_a_distance_that_the_processes_cannot_share_is_refused(runs, monkeypatch):
    config = validation.DistanceConfig(num_images=5, reference=validation.DataConfig(source=str(runs / "images")))
    monkeypatch.setattr(validation, "feature_network", lambda name, weights: MeanColour())
    validation.QuickDistance(config, 0, 16)
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="distance.num_images is 5, which 6 processes cannot share"):
        validation.QuickDistance(config, 0, 16)


def main():
    """Run train_dit/train.py with the words given as JSON: a list for each run, sharded ones last."""
    validation.feature_network = lambda name, weights: MeanColour()
    PartialState.destroy_process_group = lambda *_: None  # all runs are in the same processes
    for mode, given in json.loads(sys.argv[1]).items():
        AcceleratorState._reset_state()
        if mode == "sharded":
            os.environ["ACCELERATE_USE_FSDP"] = "true"
            shard_on_cpu()
        load_program("train_dit").main(given)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
