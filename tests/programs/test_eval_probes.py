"""eval/linear_probe.py and eval/zero_shot.py, run as a user runs them, on images whose classes are colours."""

import json
import pickle
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import vtp_diffusion.data.image_datasets
from vtp_diffusion import AutoencoderVTP, VTPModel
from vtp_diffusion.data.image_datasets import DataConfig, open_dataset
from vtp_diffusion.evaluation import probe_features
from vtp_diffusion.evaluation.probe_features import cached_features, random_views
from vtp_diffusion.models.loading import load_autoencoder
from vtp_diffusion.runtime.reproducibility import stream_seed

ROOT = Path(__file__).parents[2]
COLOURS = {"blue": (0, 60, 200), "green": (0, 180, 0), "red": (220, 0, 30)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with images/, split and labelled by folders, and a random VTPModel, vtp/."""
    folder, generator = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 6)):
        for name, colour in COLOURS.items():
            (folder / "images" / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = np.clip(np.array(colour) + generator.integers(-40, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{k}.png")
    torch.manual_seed(0)
    parts = ("encoder", "decoder", "text")
    sizes = {f"{part}_hidden_size": 16 for part in parts} | {f"{part}_num_attention_heads": 2 for part in parts}
    sizes |= {f"{part}_num_layers": 2 for part in parts}
    model = VTPModel(sample_size=16, patch_size=8, latent_channels=4, projection_dim=8, **sizes)
    with torch.no_grad():  # a random encoder whose class token sees the image
        for parameter in model.autoencoder.encoder.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder / "vtp")
    model.autoencoder.save_pretrained(folder / "vae")
    return folder


@pytest.fixture
def evaluate(made, tmp_path, monkeypatch, capsys):
    """Runs eval/PROGRAM in this process and returns what it printed."""

    def start(program, *words):
        defaults = {"--device": "cpu", "--data.source": made / "images", "--data.resolution": 16}
        defaults |= {"--output": tmp_path / "r.json", "--model": made / "vtp"} | dict(
            zip(words[::2], words[1::2], strict=True)
        )
        command = [str(ROOT / "eval" / program)]
        for option, value in defaults.items():
            command += [option, *map(str, value)] if isinstance(value, list) else [option, str(value)]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setenv("VTP_DIFFUSION_TRACEBACK", "1")
        runpy.run_path(command[0], run_name="__main__")
        return capsys.readouterr().out

    return start


PROBE = ("--num_layers", 2, "--steps", 60, "--learning_rates", [0.01, 0.1], "--neighbours", [3])


def test_probe_and_its_cached_features(evaluate, made, tmp_path):
    printed = evaluate("linear_probe.py", *PROBE)
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["evaluation"] == "linear_probe" and results["counts"] == {"train": 36, "validation": 18}
    assert results["linear"]["top1"] > 0.9 and results["linear"] == results["heads"][0] and len(results["heads"]) == 8
    assert printed.count("3 classes, 36 train images, 18 validation images") == 1, "one line for both splits"
    assert all(row["top1"] > 0.6 for row in results["neighbours"]) and len(results["neighbours"]) == 3
    assert results["chance"]["uniform"] == pytest.approx(1 / 3) and "chance" in printed
    assert (
        results["settings"]["steps"] == 60
        and results["fingerprints"]["train"] != results["fingerprints"]["validation"]
    )
    assert results["head_chosen_on"] == "4 training images, held out" and "chosen on 4 training images" in printed
    assert results["linear"]["choice_top1"] == max(row["choice_top1"] for row in results["heads"])
    folder = tmp_path / "r-features"
    changed = (folder / "train" / "class_tokens.npy").stat().st_mtime_ns
    evaluate("linear_probe.py", *PROBE, "--model", made / "vae", "--features", folder, "--output", tmp_path / "2.json")
    again = json.loads((tmp_path / "2.json").read_text())
    assert str(folder) not in (tmp_path / "2.json").read_text(), "where a machine keeps its caches decides no number"
    assert "cache_dir" not in again["settings"]["data"] and again["settings"]["data"]["holdout"] == 0.1
    assert again["heads"] == results["heads"], "the autoencoder in a VTPModel is the same one"
    assert (folder / "train" / "class_tokens.npy").stat().st_mtime_ns == changed
    evaluate("linear_probe.py", *PROBE, "--num_workers", 2, "--features", tmp_path / "by-processes")
    for file in sorted(folder.glob("*/*.npy")):
        by_processes = tmp_path / "by-processes" / file.relative_to(folder)
        assert by_processes.read_bytes() == file.read_bytes(), "read by processes or by the program itself"
    with pytest.raises(ValueError, match="num_layers: 2 there, 1 now"):
        evaluate("linear_probe.py", *PROBE, "--num_layers", 1)
    with pytest.raises(ValueError, match="num_images: 36 there, 9 now"):
        evaluate("linear_probe.py", *PROBE, "--data.limit", 9)
    with pytest.raises(ValueError, match="holds no features"):
        evaluate("linear_probe.py", *PROBE, "--features", made / "images")


def test_the_probe_by_the_protocol_of_published_numbers(evaluate, tmp_path):
    evaluate("linear_probe.py", *PROBE, "--protocol", "vtp", "--crops", 2, "--head_choice", 0)
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["counts"] == {"train": 36, "validation": 18, "crops": 72}
    assert all(head["patches"] for head in results["heads"]) and len(results["heads"]) == 4
    assert results["head_chosen_on"] == "the validation images" and "choice_top1" not in results["linear"]
    assert results["linear"]["top1"] == max(row["top1"] for row in results["heads"]) > 0.9
    assert results["fingerprints"]["crops"].endswith("resized_center_crop-2 random crops of seed 0")
    with pytest.raises(ValueError, match="head_choice is 0.01 of 36 training images, expected one at least, or 0"):
        evaluate("linear_probe.py", *PROBE, "--head_choice", 0.01, "--features", tmp_path / "others")


def test_crops_of_the_probe_are_torchvisions(made):
    folder = made / "images" / "train"
    dataset = open_dataset(DataConfig(source=str(folder), resolution=8))
    views, k = random_views(dataset, 3, seed=5), 7
    views.read = pickle.loads(pickle.dumps(views.read))  # as for a worker process that is not forked
    change = transforms.Compose(
        [
            transforms.RandomResizedCrop(8, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
        ]
    )
    before = torch.get_rng_state()
    for view in range(3):
        item = views[3 * k + view]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed("probe crops", 5, k, view))
            expected = np.array(change(Image.open(dataset.references[k]).convert("RGB")))
        assert np.array_equal(item["image"].permute(1, 2, 0).numpy(), expected)
        assert (item["label"], item["key"]) == (dataset.labels[k], f"{dataset.keys[k]}, view {view}")
    assert torch.equal(torch.get_rng_state(), before) and len(views) == 3 * len(dataset)


def test_features_are_without_images_that_cannot_be_read(made, tmp_path, monkeypatch):
    monkeypatch.setattr(vtp_diffusion.data.image_datasets, "IN_MEMORY_BYTES", 0)
    vae, folder = AutoencoderVTP.from_pretrained(made / "vae"), tmp_path / "images"
    shutil.copytree(made / "images" / "validation", folder)
    config = DataConfig(source=str(folder), resolution=16, skip_unreadable=True)
    whole = cached_features(tmp_path / "whole", vae, open_dataset(config), 2, 4, "cpu")
    for name in ("blue/2.png", *(f"green/{k}.png" for k in range(2, 6))):  # one of a batch, and the third batch
        (folder / name).write_bytes(b"no image")
    rest = cached_features(tmp_path / "rest", vae, open_dataset(config), 2, 4, "cpu")
    rows = [0, 1, 3, 4, 5, 6, 7, *range(12, 18)]
    assert np.allclose(rest.class_tokens, whole.class_tokens[rows], atol=1e-5)
    assert torch.equal(rest.labels, whole.labels[rows])


def test_zero_shot(evaluate, made, tmp_path):
    printed = evaluate("zero_shot.py", "--templates", ["a {} square.", "{}"])
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["num_images"] == 18 and results["num_classes"] == 3 and results["chance"] == pytest.approx(1 / 3)
    assert results["templates"] == ["a {} square.", "{}"] and 0 <= results["top1"] <= 1 == results["top5"]
    assert "18 images, 3 classes, 2 templates" in printed
    assert len(results["fingerprint"]) == 16
    with pytest.raises(ValueError, match="classes is imagenet, but in .*'blue', one of 3 classes, is not one of"):
        evaluate("zero_shot.py", "--classes", "imagenet")
    for colour, name in (("blue", "n02099601"), ("red", "goldfish")):
        shutil.copytree(made / "images/validation" / colour, tmp_path / "known/validation" / name)
    more = ("--templates", ["{}"], "--protocol", "vtp", "--data.source", tmp_path / "known")
    evaluate("zero_shot.py", "--classes", "imagenet", *more)
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["num_classes"] == 1000 and results["templates"] == ["{}"]
    assert results["fingerprint"].endswith("-squash")


def test_zero_shot_counts_what_is_unreadable_or_too_small(evaluate, made, tmp_path, monkeypatch):
    monkeypatch.setattr(vtp_diffusion.data.image_datasets, "IN_MEMORY_BYTES", 0)
    shutil.copytree(made / "images" / "validation", tmp_path / "images" / "validation")
    (tmp_path / "images" / "validation" / "green" / "1.png").write_bytes(b"no image")
    Image.new("RGB", (9, 20), "red").save(tmp_path / "images" / "validation" / "red" / "2.png")
    printed = evaluate("zero_shot.py", "--data.source", tmp_path / "images", "--data.skip_unreadable", "true")
    results = json.loads((tmp_path / "r.json").read_text())
    assert (results["num_images"], results["enlarged"]) == (17, 1)
    assert results["skipped"] == ["validation/green/1.png"] and "1 more cannot be read and are left out" in printed
    assert "1 of them are smaller than 16 px and were enlarged" in printed


@pytest.mark.parametrize("program", ["linear_probe.py", "zero_shot.py"])
def test_a_program_that_does_not_share_its_work_is_not_started_several_times(program, evaluate, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"2 processes of eval/{program} were launched, expected 1"):
        evaluate(program)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("linear_probe.py", "--output", "r.txt"), "output must be a FILE.json, got r.txt"),
        (
            ("linear_probe.py", "--num_layers", 2, "--neighbours", [10, 40]),
            r"neighbours are \[10, 40\], expected at most the 36",
        ),
        (("linear_probe.py", "--learning_rates", [0]), "expected positive numbers"),
        (("zero_shot.py", "--templates", ["a photo"]), "no {} for the name"),
        (("linear_probe.py", "--num_workers", -1), "num_workers is -1, expected 0 or a positive number"),
        (("zero_shot.py", "--batch_size", 0), "batch_size is 0, expected a positive number"),
    ],
)
def test_bad_input(words, message, evaluate, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate(*words)
    assert not (tmp_path / "r.json").exists()


def test_models_and_data_that_do_not_suit(evaluate, made, tmp_path):
    with pytest.raises(ValueError, match="without a text tower"):
        evaluate("zero_shot.py", "--model", made / "vae")
    with pytest.raises(ValueError, match="holds no model"):
        evaluate("zero_shot.py", "--model", made / "images")
    with pytest.raises(ValueError, match="data.resolution is 18, which AutoencoderVTP cannot encode"):
        evaluate("linear_probe.py", "--data.resolution", 18, "--data.source", made / "vae")  # no images at all
    with pytest.raises(ValueError, match="has no validation split: its images are not split.* no others$"):
        evaluate("linear_probe.py", "--num_layers", 2, "--data.source", made / "images" / "train")
    with pytest.raises(ValueError, match="no validation split: .*. --split all takes all images$"):
        evaluate("zero_shot.py", "--data.source", made / "images" / "train")
    for split in ("train", "validation"):
        shutil.copytree(made / "images" / split / "red", tmp_path / "one" / split / "red")
    for program, more in (("zero_shot.py", ()), ("linear_probe.py", ("--num_layers", 2))):
        with pytest.raises(ValueError, match="have one class"):
            evaluate(program, "--data.source", tmp_path / "one", *more)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="holds a AutoencoderKL, expected AutoencoderVTP or VTPModel"):
        evaluate("linear_probe.py", "--model", tmp_path)


def test_more_layers_than_the_encoder_has_are_those_it_has(evaluate, capsys):
    with pytest.raises(ValueError, match="neighbours are .40., expected at most the 36"):
        evaluate("linear_probe.py", "--num_layers", 3, "--neighbours", [40])
    assert "num_layers is 3, the encoder has 2: heads read those 2" in capsys.readouterr().out


def test_prompts_are_not_made_of_indices(evaluate, made, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = [{"bytes": path.read_bytes(), "path": None} for path in (made / "images/train/red").glob("[01].png")]
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": images, "kind": [0, 1]}, features).to_parquet(str(tmp_path / "a.parquet"))
    more = ("--data.data_files", tmp_path / "a.parquet", "--data.label_column", "kind", "--split", "train")
    with pytest.raises(ValueError, match="the classes of parquet have indices, but prompts need names"):
        evaluate("zero_shot.py", "--data.source", "parquet", *more)


def test_features_that_another_process_finished_first_are_taken(made, tmp_path, monkeypatch):
    images, model = (
        open_dataset(DataConfig(source=str(made / "images"), resolution=16)),
        load_autoencoder(made / "vae"),
    )
    read = probe_features._read

    def slower(folder, *settings):
        read(folder, *settings)
        shutil.copytree(folder, tmp_path / "features")

    monkeypatch.setattr(probe_features, "_read", slower)
    features = cached_features(tmp_path / "features", model, images, 1, 8, "cpu")
    assert len(features.labels) == 36 and [path.name for path in tmp_path.iterdir()] == ["features"]
    shutil.rmtree(tmp_path / "features")
    monkeypatch.setattr(probe_features, "_read", lambda *settings: (tmp_path / "features" / "x").mkdir(parents=True))
    with pytest.raises(OSError, match="features could not be written"):
        cached_features(tmp_path / "features", model, images, 1, 8, "cpu")
