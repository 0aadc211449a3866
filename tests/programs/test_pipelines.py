"""The programs of pipelines/, run as a user runs them."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import test_latent_shards
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from golden import GOLDEN, lightning_dit_architecture
from PIL import Image
from safetensors.torch import load_file
from test_distillation import student_pipeline

import vtp_diffusion
from vtp_diffusion import AutoencoderVTP, LightningDiTPipeline, LightningDiTTransformer2DModel

ROOT = Path(__file__).parents[2]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
# Starting Python and importing torch takes longer than what the programs do here, so that one process runs them all.
RUN_ALL = """
import contextlib, io, json, runpy, sys
printed = {}
for program, *arguments in json.loads(sys.argv[1]):
    sys.argv = [program, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(program, run_name="__main__")
    printed[program.rpartition("/")[2]] = output.getvalue()
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def started(pipeline_folder, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder outside the repository where every program was run as a user runs it, and what each printed."""
    folder = tmp_path_factory.mktemp("started")
    write_images(folder / "images")
    options = "--num-images-per-label 3 --num_inference_steps 2 --guidance_scale 2 --batch_size 4"
    options += " --guidance_interval 0.1 0.9 --guidance_channels 3 --dtype bfloat16 --columns 6 --output a/b.png"
    checkpoint = GOLDEN / "lightning_dit_qk_norm" / "0000100.pt"
    words = [
        ["generate.py", "--pipeline", pipeline_folder, "--labels", "0", "golden retriever", *options.split()],
        ["convert.py", "lightning-dit", "--checkpoint", checkpoint, "--output", "dit"],
        ["reconstruct.py", "--vae", pipeline_folder / "vae", "--output", "out.png", "--images", "images"],
        ["export.py", "--pipeline", pipeline_folder, "--output", "exported"],
    ]
    words = [[str(ROOT / "pipelines" / program), *map(str, arguments)] for program, *arguments in words]
    command = [sys.executable, "-c", RUN_ALL, json.dumps(words)]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def load(program: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(program.removesuffix(".py"), ROOT / "pipelines" / program)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def call(program: str, *arguments) -> None:
    """The same in this process, which saves the seconds of importing torch."""
    load(program).main([str(argument) for argument in arguments])


def refused(message: str, program: str, *arguments) -> None:
    with pytest.raises(ValueError, match=message):
        call(program, *arguments)


def test_at_the_shell_a_refusal_is_one_message_and_status_2(tmp_path):
    command = [sys.executable, ROOT / "pipelines" / "generate.py", "--pipeline", "absent", "--labels", "1"]
    command += ["--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    assert "error: expected the folder of a saved pipeline, absent has no model_index.json" in done.stderr


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    parts = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
    pipeline = LightningDiTPipeline(
        vae=AutoencoderVTP(
            sample_size=32,
            patch_size=8,
            latent_channels=4,
            **{f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in parts.items()},
        ),
        transformer=LightningDiTTransformer2DModel(
            sample_size=4, in_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=3
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        id2label={0: "cat", 1: "golden retriever", 2: "bird"},
    )
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture()
def images(tmp_path) -> Path:
    return write_images(tmp_path / "images")


def write_images(folder: Path) -> Path:
    """Two pictures of different sizes."""
    folder.mkdir()
    for index, size in enumerate([(32, 32), (90, 70)]):
        pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def test_convert_released_weights_into_a_pipeline(started, tmp_path):
    (tmp_path / "statistics.json").write_text(json.dumps({"small": {"mean": [0.5] * 16, "std": [2.0] * 16}}))
    (tmp_path / "names.json").write_text(json.dumps([f"class {k}" for k in range(10)]))
    source = ("vtp", "--source", GOLDEN / "vtp_released", "--rope-dtype", "float32")
    call("convert.py", *source, "--latent-statistics", "statistics.json:small", "--output", "vae")
    dit = GOLDEN / "lightning_dit_qk_norm"
    parts = (
        "pipeline",
        "--vae",
        "vae",
        "--transformer",
        started[0] / "dit",
        "--shift",
        3.0,
        "--id2label",
        "names.json",
    )
    call("convert.py", *parts, "--output", "joined")
    pipeline = DiffusionPipeline.from_pretrained("joined")
    assert pipeline.scheduler.config.shift == 3.0 and pipeline.labels["class 7"] == 7
    golden = load_file(dit / "golden.safetensors")
    with torch.no_grad():
        velocity = pipeline.transformer(*(golden[f"forward.{name}"] for name in ("sample", "t", "label"))).sample
        assert torch.allclose(velocity, golden["forward.velocity"], atol=1e-4)
        x = torch.rand(1, 3, 64, 64) * 2 - 1
        raw = AutoencoderVTP.from_released(GOLDEN / "vtp_released", rope_dtype="float32")
        assert torch.allclose(pipeline.vae.encode(x).latent, (raw.encode(x).latent - 0.5) / 2, atol=1e-5)


def test_convert_reads_upstream_statistics():
    torch.save({"mean": torch.arange(16.0).view(1, 16, 1, 1), "std": torch.ones(1, 16, 1, 1)}, "latents_stats.pt")
    source = ("vtp", "--source", GOLDEN / "vtp_released", "--latent_statistics", "latents_stats.pt")
    call("convert.py", *source, "--output", "vae")
    assert AutoencoderVTP.from_pretrained("vae").config.latents_mean == list(range(16))


@pytest.mark.parametrize("name", ["lightning_dit_released", "lightning_dit_qk_norm", "lightning_dit_patch2"])
def test_convert_reads_the_architecture_from_the_weights(name):
    call("convert.py", "lightning-dit", "--checkpoint", GOLDEN / name / "0000100.pt", "--output", "dit")
    found = LightningDiTTransformer2DModel.from_pretrained("dit").config
    upstream = lightning_dit_architecture(name)
    assert {key: found[key] for key in upstream} == upstream


def test_convert_refuses_what_does_not_fit_and_writes_nothing(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "short.json").write_text(json.dumps({"mean": [0.0] * 3, "std": [1.0] * 3}))
    vtp = ("convert.py", "vtp", "--source", GOLDEN / "vtp_released", "--output")
    refused("new or empty folder", *vtp, "full")
    refused("16", *vtp, "out", "--latent-statistics", "short.json")
    refused("no entry 'Large', it has mean, std", *vtp, "out", "--latent-statistics", "short.json:Large")
    dit = ("convert.py", "lightning-dit", "--checkpoint", GOLDEN / "lightning_dit_released" / "0000100.pt", "--output")
    state = {"ema": torch.load(dit[3], weights_only=True)["ema"] | {"cross": torch.zeros(1)}}
    torch.save(state, tmp_path / "cross.pt")
    refused(r"unexpected keys \['cross'\]", *dit[:3], "cross.pt", "--output", "out")
    refused(
        "full is not the folder", "convert.py", "pipeline", "--vae", "full", "--transformer", "x", "--output", "out"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cross.pt", "full", "short.json"]


def test_generate_one_picture(started):
    assert started[1]["generate.py"].splitlines()[-1].startswith("written: a/b.png; next: python pipelines/app.py")
    width, height = Image.open(started[0] / "a" / "b.png").size
    assert width >= 6 * 96 > 2 * 96 > height and "6 images\n" in started[1]["generate.py"]


def test_generate_a_folder_that_can_be_continued(tmp_path, pipeline_folder, capsys):
    common = ("generate.py", "--pipeline", pipeline_folder, "--num_inference_steps", 2, "--num_images_per_label", 3)
    common += ("--labels", "cat", "2", "--output", "samples")
    call(*common, "--batch_size", 6)
    folder, names = tmp_path / "samples", [f"{number:06d}.png" for number in range(6)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "labels.json", "settings.json"]
    written = json.loads((folder / "labels.json").read_text())
    assert list(written) == names and written[names[2]] == {"label": 0, "name": "cat"}
    assert written[names[3]] == {"label": 2, "name": "bird"}
    first = {name: np.array(Image.open(folder / name)).astype(int) for name in names}
    for name in names[2:4]:
        (folder / name).unlink()
    call(*common, "--batch_size", 1)
    assert "2 images made, 4 were there" in capsys.readouterr().out
    for name in names:
        assert np.abs(np.array(Image.open(folder / name)) - first[name]).max() <= 1
    refused("seed: 0 there, 7 now", *common, "--seed", 7)


def test_generate_refuses_before_writing(tmp_path, pipeline_folder):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    common = ("generate.py", "--pipeline", pipeline_folder, "--output")
    refused("unknown label 'cats'", *common, "out", "--labels", "cats")
    refused("class index 3 does not exist: expected 0 to 2", *common, "out", "--labels", 3)
    refused("guidance_interval", *common, "out", "--labels", 1, "--guidance_interval", 0.5, 0.2)
    refused("holds other files, no settings.json", *common, "full", "--labels", 1)
    refused("ending in .png or .npz", *common, "out.jpg", "--labels", 1)
    refused("columns is 2, expected none for out, which is no picture", *common, "out", "--labels", 1, "--columns", 2)
    for name in ("dir.png", "dir.npz"):
        (tmp_path / "full" / name).mkdir()
        refused(f"{name} is a folder", *common, f"full/{name}", "--labels", 1)
    refused("batch_size is 0, expected a positive number", *common, "out", "--labels", 1, "--batch_size", 0)
    refused("model_index.json", "generate.py", "--pipeline", "full", "--labels", 1, "--output", "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_reconstruct_side_by_side(started, tmp_path, pipeline_folder, images):
    printed = started[1]["reconstruct.py"]
    assert printed.count("dB") == 3 and "images/0.png" in printed and "mean of 2" in printed
    assert "--data.source images --split all --data.resolution" in printed.splitlines()[-1]
    assert Image.open(started[0] / "out.png").width >= 4 * 96
    vae = ("reconstruct.py", "--vae", pipeline_folder / "vae", "--output", "out.png", "--images")
    call(*vae, images / "1.png", "--resolution", 64)
    assert 2 * 128 <= Image.open("out.png").width < 3 * 128
    (tmp_path / "out.png").unlink()
    refused("multiple of the autoencoder's patch 8, got 60", *vae, images, "--resolution", 60)
    (tmp_path / "dir.png").mkdir()
    refused("dir.png is a folder", *vae, images, "--output", "dir.png")
    refused("output .*a.png cannot be written", *vae, images, "--output", images / "0.png/a.png")
    refused("absent.png is neither an image file nor a folder", *vae, "absent.png")
    test_latent_shards.dc().save_pretrained("dc")
    test_latent_shards.kl().save_pretrained("kl")
    other = ("reconstruct.py", "--output", "out.png", "--images", images, "--vae")
    refused("no image size of the AutoencoderDC is known: --resolution is needed", *other, "dc")
    refused(r"AutoencoderKL turns images \(2, 3, 31, 31\) into \(2, 3, 30, 30\)", *other, "kl", "--resolution", 31)
    refused("no config.json", "reconstruct.py", "--vae", images, "--images", images, "--output", "out.png")
    assert not (tmp_path / "out.png").exists()


def test_reconstruct_keeps_what_was_done_before_an_unreadable_image(pipeline_folder, images, capsys):
    (images / "0a.png").write_bytes((images / "0.png").read_bytes()[:200])
    vae = ("reconstruct.py", "--vae", pipeline_folder / "vae", "--output", "out.png", "--images", images)
    refused("0a.png cannot be read as an image: .*. --skip_unreadable leaves such files out", *vae)
    itself = ("reconstruct.py", "--vae", pipeline_folder / "vae", "--output", images / "0.png", "--images", images)
    refused("output .*0.png is one of the images, expected another file", *itself)
    one = Image.open("out.png").width
    capsys.readouterr()
    call(*vae, "--skip-unreadable")
    printed = capsys.readouterr().out
    assert "1 of 3 files can't be read" in printed and "mean of 2" in printed
    assert Image.open("out.png").width == 2 * one
    assert printed.splitlines()[-1].endswith(" --output results.json --data.skip_unreadable")


def test_reconstruct_many_draws_some(pipeline_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "many").mkdir()
    for k in range(5):
        Image.new("RGB", (32, 32), (50 * k, 0, 0)).save(tmp_path / "many" / f"{k}.png")
    program = load("reconstruct.py")
    words = ["--vae", str(pipeline_folder / "vae"), "--images", "many", "--output", "out.png"]
    program.main([*words, "--batch_size", "1"])
    alone, whole = capsys.readouterr().out.splitlines(), Image.open("out.png")
    monkeypatch.setattr(program, "PICTURED", 2)
    program.main([*words, "--batch_size", "3"])
    printed = capsys.readouterr().out.splitlines()
    assert "the picture shows 2 of 5 images" in printed and alone == [line for line in printed if "shows" not in line]
    assert 2 * Image.open("out.png").width == whole.width


def test_generate_says_that_a_picture_is_replaced(pipeline_folder, capsys):
    words = [
        "--pipeline",
        str(pipeline_folder),
        "--labels",
        "cat",
        "--num_inference_steps",
        "1",
        "--output",
        "out.png",
    ]
    for line in ("", "out.png is there: its picture will be replaced\n"):
        load("generate.py").main(words)
        printed = capsys.readouterr().out
        assert line in printed and ("replaced" in printed) == bool(line)


def test_export_as_a_program(started):
    assert (started[0] / "exported" / "pipeline.py").is_file()
    first, last = started[1]["export.py"].splitlines()
    assert first == "self-contained pipeline: exported"
    assert last.startswith("written: exported; next: python pipelines/generate.py --pipeline exported")


def test_the_command_after_an_export_fits_a_student(tmp_path, capsys):
    student_pipeline().save_pretrained(tmp_path / "student")
    load("export.py").main(["--pipeline", str(tmp_path / "student"), "--output", str(tmp_path / "exported")])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("--num_images 16 --output samples.png --num_inference_steps 4")


@pytest.mark.parametrize("program", ["convert.py", "export.py", "generate.py", "reconstruct.py"])
def test_help_holds_the_command(program, capsys):
    with pytest.raises(SystemExit):
        call(program, "--help")
    assert f"python pipelines/{program}" in capsys.readouterr().out


def imported_packages(module: str) -> set[str]:
    """Packages that a program needs: those it imports anywhere, and what its modules of ours import at the top."""
    pending, seen, packages = [module], set(), set()
    while pending:
        name = pending.pop()
        path = ROOT / Path(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in seen or not file.is_file():
            continue
        seen.add(name)
        pending.append(name.rpartition(".")[0])
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree) if name == module else tree.body:
            if isinstance(node, ast.Import):
                packages |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = (
                    ".".join(name.split(".")[: len(name.split(".")) - node.level + path.is_dir()])
                    if node.level
                    else ""
                )
                target = ".".join(part for part in (base, node.module) if part)
                packages.add(target.partition(".")[0])
                pending += [target, *(f"{target}.{alias.name}" for alias in node.names)]
                lazy = [vtp_diffusion._CLASSES.get(alias.name) for alias in node.names if target == "vtp_diffusion"]
                pending += [target + found for found in lazy if found]
    return packages


@pytest.mark.parametrize("program", ["convert", "export", "generate", "reconstruct"])
def test_programs_need_core_packages_only(program):
    core = {"torch", "diffusers", "safetensors", "numpy", "PIL", "einops"}
    with_diffusers = {"huggingface_hub", "tqdm", "yaml"}  # what diffusers and its hub client depend on themselves
    needed = imported_packages(f"pipelines.{program}") - sys.stdlib_module_names - {"vtp_diffusion"}
    assert "torch" in needed and needed <= core | with_diffusers
