"""Bad data as a user meets it: one row a case, a program's `main` in this process, one message that names the cause.

Every message is a ValueError or an OSError, which the programs print as `error: ...` (tests/runtime/test_cli.py). The
same kinds are tested closer to the code in tests/data, tests/evaluation and tests/training.
"""

import importlib.util
import io
import json
import os
import resource
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vtp_diffusion import AutoencoderVTP, LightningDiTTransformer2DModel
from vtp_diffusion.data.latent_shards import write_metadata, write_shard
from vtp_diffusion.models.latent_space import autoencoder_identity

ROOT = Path(__file__).parents[2]


def load(program):
    name = "program_" + program.replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{program}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """In an empty folder, on a CPU."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """vae/, plain/ (the same without latent statistics) and dit/."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sides = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
             (("hidden_size", 16), ("num_layers", 1), ("num_attention_heads", 2))}  # fmt: skip
    vae = AutoencoderVTP(sample_size=16, patch_size=8, latent_channels=3, rope_dtype="float32", **sides)
    vae.save_pretrained(folder / "plain")
    vae.with_latent_statistics([1.0, 2.0, 3.0], [0.5, 1.0, 2.0]).save_pretrained(folder / "vae")
    size = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 2}
    LightningDiTTransformer2DModel(sample_size=2, in_channels=3, **size).save_pretrained(folder / "dit")
    return folder


@pytest.fixture
def run(models, monkeypatch):
    """Starts a program with the words of a command line, in which VAE, PLAIN and DIT are those of `models`."""
    known = {name.upper(): str(models / name) for name in ("vae", "plain", "dit")}

    def start(line):
        program, *words = line.split()
        words = [known.get(word, word) for word in words]
        monkeypatch.setattr(sys, "argv", [program, *words])
        main = load(program).main
        main(words) if main.__code__.co_argcount else main()

    return start


def picture(path, mode="RGB", size=(16, 16)):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(len(str(path))).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def classes():
    for name in ("a", "b"):
        picture(f"photos/{name}/0.png")


def tar(cut):
    with tarfile.open("shard.tar", "w") as file:
        for k in range(3):
            content = io.BytesIO()
            Image.new("RGB", (16, 16), (k, 0, 0)).save(content, "BMP")
            entry = tarfile.TarInfo(f"{k}.bmp")
            entry.size = content.tell()
            file.addfile(entry, io.BytesIO(content.getvalue()))
    Path("shard.tar").write_bytes(Path("shard.tar").read_bytes()[:cut])


def parquet(labels):
    import datasets

    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "PNG")
    rows = {"image": [{"bytes": content.getvalue(), "path": None}] * len(labels), "kind": labels}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet("rows.parquet")


def deep(name, dtype):
    classes()
    Image.fromarray(np.ones((16, 16), dtype)).save(name)


def damaged(models, spoil):
    import shutil

    shutil.copytree(models / "vae", "vae")
    spoil(Path("vae/config.json"), Path("vae/diffusion_pytorch_model.safetensors"))


def latents(models, value=0.0, flip=False):
    """A finished folder of latents of the autoencoder."""
    values = torch.full((4, 3, 2, 2), value)
    path = Path("latents/latents_00000.safetensors")
    path.parent.mkdir()
    write_shard(path, torch.zeros_like(values), torch.zeros_like(values), torch.arange(4) % 2, first=0)
    if value != 0:
        from safetensors.torch import save_file

        save_file({"latents": values, "latents_flip": values.clone(), "labels": torch.arange(4) % 2}, path)
    if flip:
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    vae = AutoencoderVTP.from_pretrained(models / "vae")
    names = {"label_names": ["a", "b"], "mean": [0.0] * 3, "std": [1.0] * 3}
    write_metadata(path.parent, {"autoencoder": autoencoder_identity(vae), "num_samples": 4} | names)


EXTRACT = "train_dit/extract_latents --vae VAE --output_dir out --data.resolution 16 --data.source "
RECONSTRUCT = "pipelines/reconstruct --vae VAE --output out.png --device cpu --images "
TRAIN = "train_dit/train --vae VAE --output_dir run --report_to none --train_batch_size 2 --latents latents "
JOIN = "pipelines/convert pipeline --transformer DIT --output out "
HUGE = "9" * 400

ROWS = {
    "a class without images": (
        lambda m: [classes(), Path("photos/c").mkdir()], EXTRACT + "photos", "class 'c' of photos holds no images"),
    "a class of folders": (
        lambda m: [classes(), picture("photos/c/d/0.png")], EXTRACT + "photos", r"class 'c' .* but folders \(d\)"),
    "images beside classes": (
        lambda m: [classes(), picture("photos/0.png")], EXTRACT + "photos", "holds classes .a, b. and, beside them"),
    "two names of one split": (
        lambda m: [picture(f"photos/{n}/0.png") for n in ("train", "val", "validation")], EXTRACT + "photos",
        "validation and val, two names of the validation split"),
    "metadata beside a folder": (
        lambda m: [classes(), Path("photos/metadata.jsonl").write_text("{}")], EXTRACT + "photos",
        "metadata.jsonl would be ignored"),
    "labels of EDM": (
        lambda m: [classes(), Path("photos/dataset.json").write_text("{}")], EXTRACT + "photos", "dataset.json would"),
    "a column of a folder": (
        lambda m: classes(), EXTRACT + "photos --data.label_column kind", "label_column is 'kind'.* no effect"),
    "a pipe": (lambda m: [classes(), os.mkfifo("photos/a/1.png")], EXTRACT + "photos", "a/1.png cannot be read"),
    "a link to nothing": (
        lambda m: [classes(), Path("photos/a/1.png").symlink_to("gone")], EXTRACT + "photos", "a/1.png cannot be"),
    "a float TIFF, trained on": (
        lambda m: deep("photos/a/1.tif", np.float32), EXTRACT + "photos", "1.tif cannot be read .* mode 'F'"),
    "a 32-bit TIFF, reconstructed": (
        lambda m: deep("photos/a/1.tif", np.int32), RECONSTRUCT + "photos/a/1.tif", "1.tif cannot .* mode 'I'"),
    "a folder without splits, held out": (
        lambda m: classes(), "eval/reconstruction --vae VAE --data.source photos --data.resolution 16 --output o.json "
        "--device cpu --feature_network efficientnet_lite0", "photos has no validation split: its images are not"),
    "a label of 10**15": (
        lambda m: parquet([0, 10**15]), EXTRACT + "parquet --data.data_files rows.parquet --data.label_column kind",
        "kind is 1000000000000000, expected class indices or names, below"),
    "a class without a name": (
        lambda m: parquet(["cat", "", "dog"]),
        EXTRACT + "parquet --data.data_files rows.parquet --data.label_column kind",
        "data.source parquet names class 0 '', expected a text"),
    "two classes of one name": (
        lambda m: [picture("photos/cat/0.png"), picture("photos/cat /0.png")], EXTRACT + "photos",
        "data.source photos calls both 0 and 1 'cat ', expected two names"),
    "a shard cut within a member": (
        lambda m: tar(1500), EXTRACT + "webdataset --data.data_files shard.tar --data.image_column bmp",
        "shard.tar is truncated"),
    "weights that are cut": (
        lambda m: [classes(), damaged(m, lambda c, w: w.write_bytes(w.read_bytes()[:-9]))],
        EXTRACT.replace("VAE", "vae") + "photos", "vae/diffusion_pytorch_model.safetensors"),
    "a configuration that is no object": (
        lambda m: [classes(), damaged(m, lambda c, w: c.write_text("[]"))], EXTRACT.replace("VAE", "vae") + "photos",
        "vae/config.json holds '..', expected a JSON object"),
    "a configuration of endless layers": (
        lambda m: [classes(), damaged(m, lambda c, w: c.write_text(json.dumps({"encoder_num_layers": 10**300})))],
        EXTRACT.replace("VAE", "vae") + "photos", "config.json: encoder_num_layers is 10+, expected at most"),
    "a configuration of words": (
        lambda m: [classes(), damaged(m, lambda c, w: c.write_text(
            json.dumps(json.loads(c.read_text()) | {"patch_size": "x"})))],
        EXTRACT.replace("VAE", "vae") + "photos", "vae (cannot be loaded|does not fit)"),
    "latents of nan": (lambda m: latents(m, float("nan")), TRAIN, "latents hold values that are not"),
    "a flipped byte": (
        lambda m: latents(m, flip=True), TRAIN + "--verify_latents", "latents_00000.safetensors is damaged"),
    "no steps of validation": (
        lambda m: latents(m), TRAIN + "--validation.num_inference_steps 0", "num_inference_steps is 0, expected"),
    "a seed of 400 digits": (lambda m: latents(m), TRAIN + f"--seed {HUGE}", "--seed is 9+, expected int of at most"),
    "a rate of 400 digits": (lambda m: latents(m), TRAIN + f"--learning_rate {HUGE}", "learning_rate is .*expected"),
    "a pipe for a shard": (
        lambda m: [latents(m), os.mkfifo("latents/z.safetensors")], TRAIN, "z.safetensors is a broken link, a"),
    "a pipe for statistics": (
        lambda m: os.mkfifo("s.pt"), "pipelines/convert vtp --source x --output out --latent-statistics s.pt",
        "s.pt is not a file"),
    "a pipe for a table": (
        lambda m: os.mkfifo("a.tar"), EXTRACT + "webdataset --data.data_files a.tar", "a.tar is a broken link, a"),
    "nested YAML": (
        lambda m: Path("c.yaml").write_text("a: " + "[" * 20_000), TRAIN + "--config c.yaml", "c.yaml cannot be read"),
    "a list of settings": (
        lambda m: Path("c.yaml").write_text("- 1"), TRAIN + "--config c.yaml", "c.yaml must hold a mapping"),
    "a pipeline without statistics": (lambda m: None, JOIN + "--vae PLAIN", "autoencoder has no latent statistics"),
    "a negative shift": (lambda m: None, JOIN + "--vae VAE --shift -1", "the shift is -1.0, expected a positive"),
    "no shift": (lambda m: None, JOIN + "--vae VAE --time-shift 0", "the shift is 0.0, expected a positive, finite"),
    "a shift of nan": (lambda m: None, JOIN + "--vae VAE --shift nan", "the shift is nan, expected a positive"),
    "statistics of words": (
        lambda m: Path("s.json").write_text('{"mean": ["x"], "std": [1]}'),
        "pipelines/convert vtp --source x --output out --latent-statistics s.json",
        "s.json: 'mean' and 'std' must be lists of numbers"),
    "statistics that run code": (
        lambda m: torch.save({"mean": Path("x")}, "s.pt"),
        "pipelines/convert vtp --source x --output out --latent-statistics s.pt",
        "s.pt cannot be read as a PyTorch file of tensors: it is damaged, or holds other objects"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_one_message_before_any_work(case, run, models, tmp_path):
    prepare, line, message = ROWS[case]
    prepare(models)
    with pytest.raises((ValueError, OSError), match=message):
        run(line)
    assert not list(tmp_path.glob("out*"))


def test_real_images_that_are_their_own_floor_are_refused(run):
    classes()
    images = "--images photos/a --reference photos --floor_images photos --output o.json --device cpu "
    with pytest.raises(ValueError, match="floor_images photos and reference photos are the same images"):
        run("eval/generation " + images + "--feature_network efficientnet_lite0")


def test_a_disk_that_is_full_leaves_nothing_of_a_conversion(run):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    source = ROOT / "tests" / "fixtures" / "golden" / "vtp_released"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        with pytest.raises(OSError, match="out could not be written: .*File too large"):
            run(f"pipelines/convert vtp --source {source} --output out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(Path().iterdir())


def test_other_pixels_of_equal_size_are_no_resumed_extraction(run, tmp_path):
    for k in range(2):
        Image.new("RGB", (16, 16), (k, 0, 0)).save(f"{k}.bmp")
    (tmp_path / "photos").mkdir()
    (tmp_path / "0.bmp").rename("photos/0.bmp")
    run(EXTRACT + "photos")
    (tmp_path / "1.bmp").rename("photos/0.bmp")
    with pytest.raises(ValueError, match="(?s)out holds other latents:.*fingerprint"):
        run(EXTRACT + "photos")


def test_the_layout_that_was_found_is_printed(run, capsys):
    for name in ("bus", "car", "train", "truck"):
        for k in range(2):
            picture(f"photos/{name}/{k}.png")
    picture("photos/.ipynb_checkpoints/0.png")
    run(EXTRACT + "photos")
    assert "photos: 4 classes, 8 images, no held-out split" in capsys.readouterr().out
    assert json.loads(Path("out/latents.json").read_text())["label_names"] == ["bus", "car", "train", "truck"]
    assert json.loads(Path("out/latents.json").read_text())["data"]["exif_orientation"] is True


def test_the_shift_has_one_convention_and_the_scheduler_its_inverse(run):
    for option in ("--time-shift 0.25", "--shift 4"):
        run(JOIN.replace(" out ", f" {option[2]} ") + f"--vae VAE {option}")
        assert json.loads(Path(option[2], "scheduler/scheduler_config.json").read_text())["shift"] == 4.0
