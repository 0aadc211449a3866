"""Programs on a collection whose file was copied again; what earlier versions began, which knew it by its time."""

import io
import os

import numpy as np
import pytest
import test_finetune_decoder as finetune
import test_train_vtp as vtp
from datasets import Dataset, Features, Image, Value
from experiment_programs import load
from PIL import Image as Pillow
from test_train_dit import arguments, fresh_accelerate, make_autoencoder  # noqa: F401

from vtp_diffusion.data import image_datasets
from vtp_diffusion.data.image_datasets import DataConfig, open_dataset
from vtp_diffusion.evaluation.probe_features import cached_features, random_views
from vtp_diffusion.evaluation.validation import open_real_images
from vtp_diffusion.models.loading import load_autoencoder
from vtp_diffusion.runtime.config import config_to_dict


def write_pictures(file, seed=0):
    random, rows = np.random.default_rng(seed), {"image": [], "label": []}
    for k in range(8):
        png = io.BytesIO()
        Pillow.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(png, "PNG")
        rows["image"].append({"bytes": png.getvalue(), "path": None})
        rows["label"].append(("cat", "dog")[k % 2])
    Dataset.from_dict(rows, Features(image=Image(), label=Value("string"))).to_parquet(file)


@pytest.fixture
def collection(tmp_path, monkeypatch):
    """Words that name a parquet file of pictures."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_pictures(tmp_path / "0.parquet")
    return ["--data.source=parquet", f"--data.data_files={tmp_path / '0.parquet'}", "--data.label_column=label"]


def knew_by_times(monkeypatch):
    monkeypatch.setattr(image_datasets, "known_by_content", lambda *collection: None)


def runs(folder):
    """Program -> words of a run of two steps."""
    vae = f"--vae={folder / 'vae'}"
    short = [
        "--lr_scheduler=constant",
        "--max_train_steps=2",
        "--checkpointing_steps=2",
        "--validation_steps=100",
        "--data.resolution=16",
    ]
    return {
        "train_vtp/train.py": [*vtp.arguments(folder / "run", folder), *short],
        "train_vtp/finetune_decoder.py": [*finetune.arguments(folder / "run", folder), vae, *short],
        "train_dit/train.py": [
            *arguments(folder / "run", folder, "--latents=none", "--validation.labels", "cat"),
            *short,
        ],
        "train_dit/extract_latents.py": [vae, f"--output_dir={folder / 'run'}", "--data.resolution=16"],
    }


@pytest.mark.parametrize("name", ["train_vtp/train.py", "train_vtp/finetune_decoder.py", "train_dit/train.py",
                                  "train_dit/extract_latents.py"])  # fmt: skip
def test_what_an_earlier_version_began_goes_on_and_then_with_a_copied_file(
    name, collection, tmp_path, monkeypatch, capsys
):
    make_autoencoder(tmp_path / "vae")
    program, words = load(name), runs(tmp_path)[name] + collection
    trained = not name.endswith("latents.py")
    with monkeypatch.context() as before:
        knew_by_times(before)
        program.main(words)
    program.main(words + ["--max_train_steps=3"] * trained)
    os.utime(tmp_path / "0.parquet", (0, 0))
    words += ["--max_train_steps=4"] * trained
    program.main(words)
    if trained:
        assert (tmp_path / "run" / "checkpoint-4").is_dir()
    else:
        assert capsys.readouterr().out.count("is finished") == 2
    write_pictures(tmp_path / "0.parquet", seed=1)
    with pytest.raises(ValueError, match="fingerprint"):
        program.main(words)


def test_caches_and_notes_of_earlier_versions_are_taken(collection, tmp_path, monkeypatch):
    make_autoencoder(tmp_path / "vae")
    vae, settings = load_autoencoder(tmp_path / "vae"), dict(word[7:].split("=") for word in collection)
    config = DataConfig(**settings, resolution=16)

    def use():
        images = open_dataset(config, "train", crop=image_datasets.center_crop)
        for folder, wanted in (("plain", images), ("crops", random_views(images, 2, 0))):
            cached_features(tmp_path / folder, vae, wanted, 1, 4, "cpu")
        return images.fingerprint

    with monkeypatch.context() as before:
        knew_by_times(before)
        older = use()
    assert use() != older
    made_of = {"data": config_to_dict(config) | {"split": "train", "fingerprint": older}}
    assert len(open_real_images(None, 16, made_of)[0]) == 8
    with pytest.raises(ValueError, match="holds other images now"):
        open_real_images(None, 16, {"data": made_of["data"] | {"fingerprint": "others"}})
