"""What version 0.1 wrote, before the library had rooms: run folders go on, the exported folder and the latents load.

fixtures/version_0_1 was made by that version on a CPU: runs of four steps, of which the checkpoint after the second
and the whole log are kept, and an exported pipeline with the images that it made.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny_training import TIMING, log_of

import vtp_diffusion

ROOT = Path(__file__).parents[2]
OLD = ROOT / "tests" / "fixtures" / "version_0_1"


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def as_numbers(value) -> list:
    """A number, or a list in which nothing stands where nothing was counted."""
    return [0.0 if number is None else number for number in (value if isinstance(value, list) else [value])]


def resume(program: str, run: str, tmp_path: Path, **settings) -> None:
    """Start the program in a copy of the old run, with its own configuration."""
    folder = tmp_path / run
    shutil.copytree(OLD / run, folder)
    lines = [line for line in (OLD / run / "log.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 2]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    spec = importlib.util.spec_from_file_location("program_" + program.replace("/", "_"), ROOT / f"{program}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    changes = [f"--{name}={value}" for name, value in ({"output_dir": folder} | settings).items()]
    module.main(["--config", str(OLD / run / "config.yaml"), *changes])
    for new, old in zip(log_of(folder), log_of(OLD / run), strict=True):
        assert new.keys() - {"epochs", "flops", "processes"} == old.keys(), "what the log has said since"
        for name in old.keys() - TIMING:
            pairs = zip(as_numbers(new[name]), as_numbers(old[name]), strict=True)
            assert all(x == pytest.approx(y, rel=1e-4, abs=1e-6) for x, y in pairs), (new["step"], name)


def test_a_tokenizer_run_goes_on_with_the_losses_it_had(tmp_path):
    resume("train_vtp/train", "tokenizer_run", tmp_path)
    vtp_diffusion.AutoencoderVTP.from_pretrained(tmp_path / "tokenizer_run" / "vae")


def test_a_generator_run_goes_on_with_the_losses_it_had(tmp_path):
    vae = OLD / "exported" / "vae"
    resume("train_dit/train", "generator_run", tmp_path, vae=vae, latents=OLD / "latents")
    DiffusionPipeline.from_pretrained(tmp_path / "generator_run" / "pipeline")


@pytest.fixture
def diffusers_as_it_was():
    """That version's pipeline.py puts its classes into diffusers in place of ours: later tests would find them."""
    names = ("AutoencoderVTP", "LightningDiTTransformer2DModel", "LightningDiTPipeline")
    before = {name: vars(diffusers)[name] for name in names if name in vars(diffusers)}
    yield
    for name in names:
        vars(diffusers).pop(name, None)
    vars(diffusers).update(before)


@pytest.mark.parametrize("flags", [{}, {"custom_pipeline": "pipeline", "trust_remote_code": True}])
def test_an_exported_folder_draws_what_it_drew(flags, diffusers_as_it_was):
    pipeline = DiffusionPipeline.from_pretrained(OLD / "exported", **flags)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
    images = pipeline([0, 1], generator=torch.Generator().manual_seed(0), **settings).images
    expected = load_file(OLD / "exported_images.safetensors")["images"]
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
