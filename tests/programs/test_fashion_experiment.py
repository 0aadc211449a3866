"""Fashion-MNIST in experiments/understanding_drives_generation: its images, and what it is measured on."""

import gzip
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


def test_fashion_images_get_a_black_border_and_the_name_of_their_class(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    program, words = load(f"{UNDERSTANDING}/fashion.py"), [f"--idx={tmp_path}", f"--output={tmp_path}/out"]
    for part, labels in (("train", range(10)), ("t10k", [9, 1])):
        images = np.arange(len(labels))[:, None, None] + np.full((1, 28, 28), 100)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.array(labels))
    program.main(words)
    train, test = (str(tmp_path / "out" / f"{part}.parquet") for part in ("train", "test"))
    config = DataConfig(source="parquet", data_files=train, validation_files=test, resolution=32,
                        label_column="label", caption_column="caption")  # fmt: skip
    images = open_dataset(config, "validation")
    assert images.captions == ["a photo of an ankle boot", "a photo of trousers"]
    assert [images.label_names[label] for label in images.labels] == ["ankle boot", "trousers"]
    assert len(images.label_names) == 10 and "MIT License" in (tmp_path / "out" / "ATTRIBUTION.txt").read_text()
    pixels = images[1]["image"]
    assert pixels[:, 2:30, 2:30].unique().tolist() == [101] and pixels.sum() == 101 * 3 * 28 * 28
    with pytest.raises(ValueError, match="is there already"):
        program.main(words)


def test_a_tenth_of_the_training_images_and_all_test_images(understanding, tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (tmp_path / "fashion").mkdir()
    for part, count in (("train", 500), ("test", 20)):
        table = arrow.table({"number": list(range(count))}).replace_schema_metadata({"huggingface": "features"})
        parquet.write_table(table, tmp_path / "fashion" / f"{part}.parquet")
    understanding.write_fewer(tmp_path / "fashion", tmp_path / "tenth", 0.1, resolution=32)
    kept, test = (parquet.read_table(tmp_path / "tenth" / f"{part}.parquet") for part in ("train", "test"))
    numbers = kept["number"].to_pylist()
    assert 30 < len(numbers) < 70 and numbers == sorted(set(numbers)) and len(test) == 20
    assert kept.schema.metadata[b"huggingface"] == b"features", "how `datasets` reads the columns"


def test_fashion_needs_its_own_settings(understanding, tmp_path):
    settings = fashion_settings(tmp_path)
    with pytest.raises(ValueError, match="is Fashion-MNIST, expected its settings: --config .*fashion.yaml"):
        understanding.Config(**settings | {"decoder": "decoder.yaml"})
    assert understanding.Config(**settings | {"decoder": None}).fashion


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
