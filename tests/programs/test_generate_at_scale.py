"""Evaluation-scale sampling: the same images for any batch size and any number of processes, and after a kill."""

import contextlib
import copy
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from vtp_diffusion import AutoencoderVTP, LightningDiTPipeline, LightningDiTTransformer2DModel
from vtp_diffusion.data.npz import NpzImages
from vtp_diffusion.evaluation.sources import FolderImages
from vtp_diffusion.generation.sample_files import PART_IMAGES
from vtp_diffusion.generation.sampling import initial_noise, sample_numbers

ROOT = Path(__file__).parents[2]
PROGRAM = str(ROOT / "pipelines" / "generate.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
    sizes = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in size.items()}
    pipe = LightningDiTPipeline(
        vae=AutoencoderVTP(sample_size=16, patch_size=8, latent_channels=4, rope_dtype="float32", **sizes),
        transformer=LightningDiTTransformer2DModel(
            sample_size=2, in_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=3
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
    )
    with torch.no_grad():  # pictures that differ from each other by more than a level
        for parameter in pipe.vae.decoder.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.eval()  # in training mode it drops labels
    return pipe


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    pipe.save_pretrained(folder)
    return folder


def words(folder, output, *more):
    common = ("--pipeline", folder, "--output", output, "--num_inference_steps", 2, "--device", "cpu")
    return [PROGRAM, *map(str, (*common, *more))]


@pytest.fixture
def generate(monkeypatch, capsys, folder):
    def start(output, *more):
        monkeypatch.setattr(sys, "argv", words(folder, output, *more))
        monkeypatch.setenv("VTP_DIFFUSION_TRACEBACK", "1")
        runpy.run_path(PROGRAM, run_name="__main__")
        return capsys.readouterr().out

    return start


def difference(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


def test_noise_is_keyed_by_the_number(pipe):
    together = initial_noise(pipe, range(5), seed=3)
    assert all(torch.equal(together[k], initial_noise(pipe, [k], seed=3)[0]) for k in range(5))
    assert torch.equal(initial_noise(pipe, [4, 2], 3), together[[4, 2]]) and not torch.equal(together[0], together[1])
    assert not torch.equal(together[1], initial_noise(pipe, [0], seed=4)[0])  # the same sum of seed and image
    labels, settings = [0, 1, 2, 1, 0], {"num_inference_steps": 2, "guidance_scale": 2.0}
    broken = copy.deepcopy(pipe.vae)
    torch.nn.init.constant_(broken.decoder.proj_out.bias, float("nan"))
    with pytest.raises(ValueError, match="pixels of image 1, 3 are not finite"):
        sample_numbers(LightningDiTPipeline(**pipe.components | {"vae": broken}), labels, [1, 3], 3, **settings)
    images = sample_numbers(pipe, labels, range(5), 3, **settings)
    alone = torch.cat([sample_numbers(pipe, labels, [k], 3, **settings) for k in range(5)])
    assert images.dtype == torch.uint8 and difference(images.numpy(), alone.numpy()) <= 1
    assert difference(images[0].numpy(), images[1].numpy()) > 20


def test_two_processes_make_what_one_makes(generate, folder, tmp_path, monkeypatch):
    count = PART_IMAGES + 10
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, *words(folder, tmp_path / "two.npz", "--num_images", count, "--batch_size", 100)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{count} images made") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["two.npz"]
    printed = generate(tmp_path / "one.npz", "--num_images", count, "--batch_size", 64)
    assert f"{count} images made, 0 were there" in printed
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert one["arr_0"].dtype == np.uint8 and one["arr_0"].shape == (count, 16, 16, 3)
        assert difference(one["arr_0"], two["arr_0"]) <= 1
        assert np.array_equal(one["arr_1"], two["arr_1"]) and set(one["arr_1"]) == {0, 1, 2}
        settings = json.loads(str(one["settings"]))
        assert settings == json.loads(str(two["settings"])) and settings["labels"] == "random"
    assert f"0 images made, {count} were there" in generate(tmp_path / "one.npz", "--num_images", count)
    parts = tmp_path / "one.npz.parts"
    parts.mkdir()
    (parts / "settings.json").write_text(json.dumps(settings))
    (parts / "000000.npy").touch()
    with monkeypatch.context() as killed, contextlib.suppress(BaseException):  # while the parts are removed
        killed.setattr("shutil.rmtree", lambda *folder, **options: 1 / 0)
        generate(tmp_path / "one.npz", "--num_images", count)
    assert [path.name for path in parts.iterdir()] == ["settings.json"], "last: the same command knows the rest"
    assert f"0 images made, {count} were there" in generate(tmp_path / "one.npz", "--num_images", count)
    assert not parts.exists()
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        generate(tmp_path / "one.npz", "--num_images", count, "--seed", 1)


def test_a_killed_run_is_continued(generate, folder, tmp_path):
    count, more = 3 * PART_IMAGES, ("--num_images", 3 * PART_IMAGES, "--num_inference_steps", 20)
    output, parts = tmp_path / "killed.npz", tmp_path / "killed.npz.parts"
    process = subprocess.Popen(
        [sys.executable, *words(folder, output, *more, "--batch_size", 8)], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while not (parts / "000000.npy").is_file() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists() and (parts / "000000.npy").is_file()
    there = len(list(parts.glob("0*.npy"))) * PART_IMAGES
    printed = generate(output, *more, "--batch_size", 48)
    assert f"{count - there} images made, {there} were there" in printed and not parts.exists()
    generate(tmp_path / "whole.npz", *more, "--batch_size", 256)
    killed, whole = (NpzImages(tmp_path / name).read(range(count)).numpy() for name in ("killed.npz", "whole.npz"))
    assert difference(killed, whole) <= 1


@pytest.mark.parametrize("signal_sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_all_finished_images(generate, tmp_path, monkeypatch, signal_sent):
    output, more = tmp_path / "a.npz", ("--num_images", PART_IMAGES + 20, "--batch_size", 50)
    batches = []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it

    def interrupted(pipe, labels, numbers, *arguments, **settings):
        batches.append(len(numbers))
        if len(batches) == 4:
            signal.raise_signal(signal_sent)
        return sample_numbers(pipe, labels, numbers, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr("vtp_diffusion.generation.sampling.sample_numbers", interrupted)
        with pytest.raises(KeyboardInterrupt, match="Finished images are kept: the same command continues"):
            generate(output, *more)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert f"{PART_IMAGES - 130} images made, 150 were there" in generate(output, *more)
    generate(tmp_path / "whole.npz", *more)
    two = [NpzImages(path).read(range(PART_IMAGES + 20)).numpy() for path in (output, tmp_path / "whole.npz")]
    assert difference(*two) <= 1


def test_a_pipeline_of_other_settings_does_not_go_on(generate, folder, tmp_path):
    """The same weights, and other latent statistics or another kind of step."""
    output, file = tmp_path / "samples", tmp_path / "samples" / "settings.json"
    generate(output, "--num_images", 2)
    (output / "000001.png").unlink()
    for part, change in (
        ("vae", {"latents_mean": [0.0] * 4, "latents_std": [2.0] * 4}),
        ("scheduler", {"stochastic_sampling": True}),
    ):
        config = next((folder / part).glob("*config.json"))
        known = config.read_text()
        config.write_text(json.dumps(json.loads(known) | change))
        try:
            with pytest.raises(
                ValueError, match=rf"another run's images:\n  configurations.{part}: \w+ there, \w+ now"
            ):
                generate(output, "--num_images", 2)
        finally:
            config.write_text(known)
    settings = json.loads(file.read_text())
    del settings["configurations"]  # as before they were compared
    file.write_text(json.dumps(settings))
    assert "1 images made, 1 were there" in generate(output, "--num_images", 2)


@pytest.mark.parametrize(("solver", "shown"), [("euler", (6, 6)), ("heun", (9, 9)), ("dopri5", (None, "many"))])
def test_progress_counts_evaluations(generate, tmp_path, monkeypatch, solver, shown):
    from tqdm import tqdm

    seen = []

    class Recorded(tqdm):
        def close(self):
            if self.desc == "network evaluations" and not self.disable:
                seen.append((self.total, self.n if self.total else "many"))
            self.desc = ""  # `close` is called again at the end
            super().close()

    monkeypatch.setattr("tqdm.auto.tqdm", Recorded)
    generate(tmp_path / "s.npz", "--num_images", 3, "--solver", solver)  # 2 steps
    assert seen == [shown]


def test_balanced_labels_and_a_folder_that_is_not_complete(generate, tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / ".settings.json.host-17-0a.unfinished").write_text(
        "{"
    )  # all that a kill at the first image may leave
    generate(tmp_path / "samples", "--num_images", 6, "--label_rule", "balanced")
    images = FolderImages(tmp_path / "samples")
    assert len(images) == 6 and images.settings["labels"] == "balanced" and images.settings["num_images"] == 6
    (tmp_path / "samples" / "000004.png").unlink()
    with pytest.raises(ValueError, match="holds 5 images, its settings.json says 6"):
        FolderImages(tmp_path / "samples")
    assert "1 images made, 5 were there" in generate(
        tmp_path / "samples", "--num_images", 6, "--label_rule", "balanced"
    )
    generate(tmp_path / "b.npz", "--num_images", 6, "--label_rule", "balanced")
    with np.load(tmp_path / "b.npz") as file:
        assert file["arr_1"].tolist() == [0, 1, 2, 0, 1, 2]
        assert difference(file["arr_0"], images.read(range(6)).permute(0, 2, 3, 1).numpy()) <= 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "give either labels, or num_images"),
        (("--labels", 1, "--num_images", 4), "give either labels, or num_images"),
        (("--num_images", 0), "num_images is 0, expected a positive number"),
        (("--num_images", 2000, "--output", "grid.png"), "one picture holds 1024 images at most"),
    ],
)
def test_bad_input(generate, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        generate("out.npz", *more)
    np.savez("out.npz", arr_0=np.zeros((2, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="another run's images"):
        generate("out.npz", "--num_images", 2)
