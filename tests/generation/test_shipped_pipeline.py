"""weights/openmoji-128: the pipeline that comes with the repository."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import vtp_diffusion  # noqa: F401  registers the classes
from vtp_diffusion.data.images import from_uint8, pil_to_uint8, to_uint8
from vtp_diffusion.metrics.pixels import psnr

FOLDER = Path(__file__).parents[2] / "weights" / "openmoji-128"


@pytest.fixture(scope="module")
def pipeline():
    pipe = DiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_licensed_and_free_of_other_machines_paths():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30e6
    assert max(path.stat().st_size for path in files) <= 8 * 2**20
    card = (FOLDER / "README.md").read_text()
    assert "license: cc-by-sa-4.0" in card and "OpenMoji" in card
    assert not any("_name_or_path" in path.read_text() for path in FOLDER.rglob("*.json"))


def test_it_reconstructs_images_it_was_not_trained_on(pipeline):
    images = torch.stack([pil_to_uint8(Image.open(path)) for path in sorted((FOLDER / "examples").glob("*.png"))])
    with torch.inference_mode():
        decoded = pipeline.vae.decode(pipeline.vae.encode(from_uint8(images)).latent).sample
    assert len(images) == 16 and psnr(to_uint8(decoded), images).mean() > 26


def test_flags_are_flat_and_framed_and_faces_are_yellow_discs(pipeline):
    """What classes look like, in numbers: the labels steer the pictures."""
    generator = [torch.Generator().manual_seed(k) for k in range(2)]
    face, flag = pipeline(
        ["face-smiling", "country-flag"],
        generator=generator,
        num_inference_steps=8,
        guidance_scale=2.5,
        output_type="pt",
    ).images
    yellow = (face[0] > 0.8) & (face[1] > 0.7) & (face[2] < 0.5)  # (H, W)
    assert yellow.float().mean() > 0.15 and yellow[40:90, 40:90].float().mean() > 0.5
    assert (flag.min(0).values[:8] > 0.9).all()  # white above the flag
    assert flag[:, 40:90, 4:16].min() < 0.3  # the black frame at its left
