"""What importing the package brings in, and how its classes reach diffusers, in fresh processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "weights" / "openmoji-128"

OURS_FIRST = f"""
import importlib.util, sys
import vtp_diffusion
assert importlib.util.find_spec("diffusers") is not None  # as packages do that can go with it
assert "torch" not in sys.modules and "diffusers" not in sys.modules
from diffusers import AutoModel, DiffusionPipeline
assert "vtp_diffusion.models.vtp_model" not in sys.modules
pipeline = DiffusionPipeline.from_pretrained({str(SHIPPED)!r})
assert type(pipeline) is vtp_diffusion.LightningDiTPipeline
assert type(AutoModel.from_pretrained({str(SHIPPED)!r}, subfolder="vae")) is vtp_diffusion.AutoencoderVTP
import diffusers
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
assert "vtp_diffusion" in LOADABLE_CLASSES and diffusers.VTPModel is vtp_diffusion.VTPModel
assert not any(finder.__module__ == "vtp_diffusion" for finder in sys.meta_path), "asked at every import"
assert not hasattr(diffusers, "SomethingElse") and not hasattr(vtp_diffusion, "SomethingElse")
"""
THEIRS_FIRST = """
import diffusers
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
diffusers.VTPModel = "a class of that name in a later diffusers"
from vtp_diffusion.generation.pipeline_lightning_dit import LightningDiTPipeline
import vtp_diffusion
assert "vtp_diffusion" in LOADABLE_CLASSES
assert diffusers.LightningDiTPipeline is vtp_diffusion.LightningDiTPipeline is LightningDiTPipeline
assert diffusers.VTPModel.startswith("a class") and vtp_diffusion.ModelMixin is diffusers.ModelMixin
"""
A_MODULE_FIRST = """
from vtp_diffusion.models.autoencoder_vtp import AutoencoderVTP
import diffusers
assert diffusers.AutoencoderVTP is AutoencoderVTP
"""

PROGRAMS = """
import runpy, sys
from vtp_diffusion.runtime.programs import programs
slow = {"datasets", "diffusers", "matplotlib", "scipy", "tensorboard", "timm", "torchvision", "transformers"}
slow |= {"torch._dynamo", "triton"}
for file in sorted(programs().values(), key=lambda file: file.parent.name == "train_vtp"):
    if file.parent.name == "train_vtp":
        slow -= {"torch._dynamo", "triton"}  # torch.compiler.disable imports the compiler
    runpy.run_path(str(file))
    found = sorted(slow & sys.modules.keys())
    assert not found, f"{file} imports {found} before it has read its options"
"""


@pytest.mark.parametrize(
    "script", [OURS_FIRST, THEIRS_FIRST, A_MODULE_FIRST, PROGRAMS], ids=["ours", "theirs", "a module", "programs"]
)
def test_what_is_imported_and_when(script):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
