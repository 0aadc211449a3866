"""Fashion-MNIST in experiments/understanding_drives_generation: its images, and what it is measured on."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from experiment_programs import UNDERSTANDING, fashion_settings, load, option

from vtp_diffusion.data.image_datasets import DataConfig, open_dataset


def test_fashion_is_never_trained_on_what_it_is_measured_on(understanding, tmp_path):
    settings = fashion_settings(tmp_path) | {"output_dir": str(tmp_path)}
    plan = understanding.Plan(understanding.Config(**settings), tmp_path / "fashion")
    program, (training, measuring) = load(understanding.MEASURE), plan.generator("all", 0).programs
    assert option(training, "--config").endswith("fashion_generator.yaml")
    for step in settings["generator_steps"]:
        (tmp_path / "generator-all-0" / f"checkpoint-{step}" / "transformer_ema").mkdir(parents=True)
    given = program.parse_config(program.Config, measuring[1:])
    assert (given.reference, given.split, given.data.limit) == ("parquet", "validation", settings["num_reference"])
    assert given.data.validation_files == str(tmp_path / "fashion" / "test.parquet")
    assert given.data.limit >= 2 * given.num_images, "the baseline has as many images as there are samples"
    with pytest.raises(ValueError, match="tokenizers are all_third, expected some of reconstruction, all, rec"):
        understanding.Config(**settings | {"tokenizers": ["all_third"]})


def write_idx(file: Path, values: np.ndarray) -> None:
    header = np.array([0x800 + values.ndim, *values.shape], ">u4").tobytes()
    file.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def test_fashion_images_get_a_black_border_and_the_name_of_their_class(understanding, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    program, words = load(f"{UNDERSTANDING}/fashion.py"), [f"--idx={tmp_path}", f"--output={tmp_path}/out"]
    for part, labels in (("train", range(10)), ("t10k", [9, 1])):
        images = np.arange(len(labels))[:, None, None] + np.full((1, 28, 28), 100)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.array(labels))
    program.main(words)
    train, test = (str(tmp_path / "out" / f"{part}.parquet") for part in ("train", "test"))
    config_of_files = DataConfig(source="parquet", data_files=train, validation_files=test, resolution=32,
                        label_column="label", caption_column="caption")  # fmt: skip
    images = open_dataset(config_of_files, "validation")
    assert images.captions == ["a photo of an ankle boot", "a photo of trousers"]
    assert [images.label_names[label] for label in images.labels] == ["ankle boot", "trousers"]
    assert len(images.label_names) == 10 and "MIT License" in (tmp_path / "out" / "ATTRIBUTION.txt").read_text()
    pixels = images[1]["image"]
    assert pixels[:, 2:30, 2:30].unique().tolist() == [101] and pixels.sum() == 101 * 3 * 28 * 28
    with pytest.raises(ValueError, match="is there already"):
        program.main(words)
    plan = understanding.Plan(
        understanding.Config(data=f"{tmp_path}/out", output_dir=f"{tmp_path}/runs"), tmp_path / "out"
    )
    understanding.write_fewer(plan.config, tmp_path / "out", tmp_path / "runs" / "half", 0.5)
    fewer = [str(tmp_path / "runs" / "half" / f"{part}.parquet") for part in ("train", "test")]
    config = replace(config_of_files, data_files=fewer[0], validation_files=fewer[1])
    kept = open_dataset(config, "train")
    assert 2 <= len(kept) <= 8 and set(kept.label_names) < set(images.label_names)
    assert len(open_dataset(config, "validation")) == 2
    words = plan.training("all_half")
    assert option(words, "--data.data_files") == fewer[0]


def test_what_is_not_fashion_is_refused_by_name(tmp_path):
    program = load(f"{UNDERSTANDING}/fashion.py")
    images, labels = (tmp_path / f"train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    images.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=f"{images} cannot be read"):
        program.read_part(tmp_path, "train")
    write_idx(images, np.zeros((2, 28, 28)))
    write_idx(labels, np.zeros((2, 1)))
    with pytest.raises(ValueError, match=f"{labels} is no IDX file of 1 dimensions"):
        program.read_part(tmp_path, "train")
    write_idx(labels, np.array([3, 10]))
    with pytest.raises(ValueError, match=r"\(2, 28, 28\) with 2 labels up to 10, expected .* labels below 10"):
        program.read_part(tmp_path, "train")
