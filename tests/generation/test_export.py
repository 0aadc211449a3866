import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from vtp_diffusion import AutoencoderVTP, LightningDiTPipeline, LightningDiTTransformer2DModel
from vtp_diffusion.generation import export
from vtp_diffusion.generation.export import export_pipeline, self_contained_source
from vtp_diffusion.models.loading import load_autoencoder


def tiny_pipeline() -> LightningDiTPipeline:
    torch.manual_seed(0)
    parts = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
    vae = AutoencoderVTP(
        sample_size=32,
        patch_size=8,
        latent_channels=4,
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 2.0, 3.0, 4.0],
        **{f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in parts.items()},
    )
    transformer = LightningDiTTransformer2DModel(
        sample_size=4, in_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=3
    )
    pipeline = LightningDiTPipeline(
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        id2label={0: "cat", 1: "dog", 2: "bird"},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: DiffusionPipeline) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    arguments = {"num_inference_steps": 2, "guidance_scale": 2.0, "generator": generators, "output_type": "pt"}
    return pipeline([0, "dog"], **arguments).images


# What every isolated script starts with. An editable installation would make the package importable from anywhere.
PRELUDE = """
import sys

import torch
from diffusers import DiffusionPipeline

class Refuse:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "vtp_diffusion":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse)
try:
    import vtp_diffusion
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("vtp_diffusion can be imported")

def load(folder):
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe

"""


def run_without_the_package(script: str, folder: Path) -> None:
    """Run Python in `folder`, isolated: this repository is not on the path, and importing the package is refused."""
    script = PRELUDE + inspect.getsource(sample) + textwrap.dedent(script)
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_loads_samples_and_is_saved_again_without_the_package(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "saved")
    export_pipeline(tmp_path / "saved", tmp_path / "exported")
    torch.save(sample(pipeline), tmp_path / "expected.pt")
    # diffusers keeps one copy of every local pipeline.py, which the next load replaces: saving must not take that one
    code = export_pipeline(pipeline, tmp_path / "other") / "pipeline.py"
    code.write_text(code.read_text() + "# other\n")
    run_without_the_package(
        """
        pipe = load("exported")
        assert type(pipe).__module__.startswith("diffusers_modules")
        assert torch.equal(sample(pipe), torch.load("expected.pt"))
        load("other")
        pipe.save_pretrained("saved_again")
        assert torch.equal(sample(load("saved_again")), torch.load("expected.pt"))
        """,
        tmp_path,
    )
    assert (tmp_path / "saved_again/pipeline.py").read_text() == (tmp_path / "exported/pipeline.py").read_text()


def test_an_exported_folder_also_loads_with_the_package_alone(tmp_path):
    pipeline = tiny_pipeline()
    export_pipeline(pipeline, tmp_path / "exported")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "exported")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is LightningDiTPipeline and type(loaded.vae) is AutoencoderVTP
    assert torch.equal(sample(loaded), sample(pipeline))
    loaded.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/pipeline.py").exists()


def test_remote_code_leaves_the_package_its_classes(tmp_path):
    pipeline = tiny_pipeline()
    export_pipeline(pipeline, tmp_path / "exported")
    remote = DiffusionPipeline.from_pretrained(
        tmp_path / "exported", custom_pipeline="pipeline", trust_remote_code=True
    )
    remote.set_progress_bar_config(disable=True)
    assert type(remote).__module__.startswith("diffusers_modules")
    assert torch.equal(sample(remote), sample(pipeline))
    assert type(load_autoencoder(tmp_path / "exported" / "vae")) is AutoencoderVTP
    remote.save_pretrained(tmp_path / "saved")
    for folder in ("exported", "saved"):
        loaded = DiffusionPipeline.from_pretrained(tmp_path / folder)
        assert type(loaded) is LightningDiTPipeline and type(loaded.vae) is AutoencoderVTP


def test_files_are_copied_as_they_are(tmp_path):
    pipeline = tiny_pipeline().to(torch.bfloat16)
    pipeline.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text("a model card")
    export_pipeline(tmp_path / "saved", tmp_path / "exported")
    for file in ("README.md", "vae/diffusion_pytorch_model.safetensors", "vae/config.json"):
        assert (tmp_path / "exported" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()


def test_components_of_diffusers_stay_theirs(tmp_path):
    vae = AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=4)
    pipeline = tiny_pipeline()
    components = {**pipeline.components, "vae": vae, "guidance_transformer": pipeline.transformer}
    export_pipeline(LightningDiTPipeline(**components), tmp_path / "exported")
    index = json.loads((tmp_path / "exported" / "model_index.json").read_text())
    assert index["_class_name"] == "LightningDiTPipeline"
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["transformer"] == index["guidance_transformer"] == ["diffusers", "LightningDiTTransformer2DModel"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]


def test_bad_input_is_refused_and_nothing_is_written(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "saved")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="new or empty folder"):
        export_pipeline(tmp_path / "saved", tmp_path / "full")
    with pytest.raises(ValueError, match="model_index.json"):
        export_pipeline(tmp_path / "saved" / "vae", tmp_path / "exported")
    with pytest.raises(ValueError, match="expected a LightningDiTPipeline, got DiffusionPipeline"):
        export_pipeline(DiffusionPipeline(), tmp_path / "exported")
    weights = tmp_path / "saved" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="transformer.*not a complete safetensors file"):
        export_pipeline(tmp_path / "saved", tmp_path / "exported")
    index = tmp_path / "saved" / "model_index.json"
    index.write_text(index.read_text().replace('"LightningDiTPipeline"', '"DiTPipeline"'))
    with pytest.raises(ValueError, match="'DiTPipeline'"):
        export_pipeline(tmp_path / "saved", tmp_path / "exported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "saved"]


def test_the_code_is_what_a_pipeline_uses(tmp_path):
    source = self_contained_source()
    assert len(source.encode()) < 80_000
    for absent in (
        "from_released",
        "load_strict",
        "initialize_weights",
        "VTP_SIZES",
        "image_grid",
        "load_file",
        "_KeptSamples",
    ):
        assert absent not in source
    file = tmp_path / "pipeline.py"
    file.write_text(source)
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(file)]
    done = subprocess.run(ruff, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout  # no name without its definition, no import without its use


def write_package(folder: Path, **files: str) -> Path:
    names = ("autoencoder_vtp", "transformer_lightning_dit", "pipeline_lightning_dit")
    classes = ("AutoencoderVTP", "LightningDiTTransformer2DModel", "LightningDiTPipeline")
    rooms = (folder / "models", folder / "models", folder / "generation")
    for room, name, class_name in zip(rooms, names, classes, strict=True):
        room.mkdir(exist_ok=True)
        text = files.pop(name, "")
        used = [
            word for word in ("SIX", "SEVEN", "ALSO", "NN", "late", "m", "TEXT") if re.search(rf"\b{word}\b", text)
        ]
        (room / f"{name}.py").write_text(
            f"{text}\nclass {class_name}:\n    uses = ({''.join(f'{u}, ' for u in used)})\n"
        )
    for name, text in files.items():
        (folder / "models" / f"{name}.py").write_text(text)
    return folder


@pytest.fixture
def nothing_left_out(monkeypatch):
    """Of a package that a test writes."""
    monkeypatch.setattr(export, "LEFT_OUT", ())


def test_a_method_left_out_that_no_file_defines_is_named(monkeypatch):
    stale = ("AutoencoderVTP.encode_rough", "VTPBlocks._update_kept")
    monkeypatch.setattr(export, "LEFT_OUT", (*export.LEFT_OUT, *stale))
    with pytest.raises(ValueError, match="LEFT_OUT names AutoencoderVTP.encode_rough, VTPBlocks._update_kept, exp"):
        self_contained_source()


def test_files_become_one_in_the_order_of_dependence(tmp_path, nothing_left_out):
    package = write_package(
        tmp_path,
        autoencoder_vtp=(
            '"""Doc."""\n\nimport torch.nn as nn\n\nfrom .helpers import answer\n\nSIX = 6\nSEVEN = answer() // SIX\n'
        ),
        pipeline_lightning_dit="from ..models.helpers import answer\n\nALSO = answer()\n",
        transformer_lightning_dit=(
            "from fractions import Fraction\n\nfrom torch import nn\n\nHALF = Fraction(1, 2)  # spare\nNN = nn\n"
            "SIX = 6\n\n\ndef late():\n    from .later import (\n        value,\n    )\n\n"
            "    return value\n"
        ),
        helpers="def answer():\n    return 42  # known\n",
        later="value = SEVEN = 7\n",
    )
    with pytest.raises(ValueError, match="autoencoder_vtp.py and later.py define SEVEN differently"):
        self_contained_source(package)
    (package / "models" / "later.py").write_text("value = 8\n")
    source = self_contained_source(package)
    assert source.count("from torch import nn") == source.count("SIX = 6") == 1
    assert "# known" in source
    assert "Doc." not in source and "# spare" not in source and "Fraction" not in source  # nothing uses it
    scope = {"__name__": "pipeline", "__file__": __file__}
    body = source.partition("# Components in model_index.json")[0]
    exec(body, scope)
    assert scope["SEVEN"] == 7 and scope["ALSO"] == 42 and scope["late"]() == 8


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"autoencoder_vtp": "from .a import *\n", "a": "from .b import x\n", "b": "from .a import y\n"},
            "models.a -> models.b -> models.a",
        ),
        ({"autoencoder_vtp": "from . import images\n"}, "from .module import name"),
        ({"autoencoder_vtp": "from .a import x as y\n", "a": "x = 1\n"}, "from .module import name"),
        (
            {"autoencoder_vtp": "import math as m\n", "pipeline_lightning_dit": "import cmath as m\n"},
            "import math as m",
        ),
        ({"autoencoder_vtp": "import math\n", "pipeline_lightning_dit": "math = 1\n"}, "imported in one .*: math"),
        ({"autoencoder_vtp": 'TEXT = """\nfrom .a import b\n"""\n'}, "from .a import b"),
    ],
)
def test_what_cannot_become_one_file_is_refused(tmp_path, nothing_left_out, files, message):
    with pytest.raises(ValueError, match=message):
        self_contained_source(write_package(tmp_path, **files))
