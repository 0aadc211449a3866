"""The files of a collection: those that are named like held-out ones, and what tells that they are the same."""

import io
import json
import os
import shutil
from types import SimpleNamespace

import pyarrow
import pytest
from PIL import Image

from vtp_diffusion.data.collection_columns import images_outside
from vtp_diffusion.data.image_datasets import DataConfig, open_dataset
from vtp_diffusion.data.shard_files import DIGESTS, held_out_note


@pytest.mark.parametrize("held_out", ["test-00000-of-00001.parquet", "validation/1.parquet", "Val.1.parquet"])
def test_files_that_are_named_like_held_out_ones_are_told(held_out, tmp_path):
    for name in ("train-00000-of-00001.parquet", "testament.parquet", held_out):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def files(pattern):
        return [str(path) for path in tmp_path.rglob(pattern)]

    note = held_out_note(files("*.parquet"))
    assert f"1 of the 3 data_files are named like held-out ones, such as {tmp_path / held_out}, and are" in note
    assert held_out_note(files("t*a*.parquet")) is None
    assert held_out_note(files(held_out)) is None, "asked for"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Folder in which `datasets` prepares tables."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def write_parquet(file, red, label="cat", path=None):
    import datasets

    png = io.BytesIO()
    Image.new("RGB", (16, 16), (red, 0, 0)).save(png, "PNG")
    image = {"bytes": None if path else png.getvalue(), "path": path}
    rows = {"image": [image] * 3, "mask": [image] * 3, "label": [label] * 3}
    features = {"image": datasets.Image(), "mask": datasets.Image(), "label": datasets.Value("string")}
    file.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(file)


def opened(file, split="train", **settings):
    settings = {"source": "parquet", "label_column": "label", "resolution": 16} | settings
    return open_dataset(DataConfig(data_files=str(file), **settings), split)


def test_a_collection_is_known_by_the_content_of_its_files(tmp_path, cache):
    first, again = tmp_path / "a" / "images.parquet", tmp_path / "b" / "images.parquet"
    write_parquet(first, red=1)
    shutil.copytree(first.parent, again.parent)
    os.utime(again, (0, 0))
    one, two = opened(first), opened(again)
    assert one.training_fingerprint == two.training_fingerprint
    assert one.older_fingerprints != two.older_fingerprints, "`datasets` tells paths and times"
    assert opened(first, image_column="mask").fingerprint != one.fingerprint
    write_parquet(again, red=2)
    other = opened(again)
    assert other.fingerprint != one.fingerprint
    write_parquet(again, red=1, label="dog")
    assert opened(again).fingerprint not in (one.fingerprint, other.fingerprint)
    (kept, *_), new = cache.rglob(DIGESTS), json.dumps({"train": "0"})
    assert len(list(cache.rglob(DIGESTS))) == 4 and len(kept.read_text()) > 40
    for path in cache.rglob(DIGESTS):
        path.write_text(new)
    assert opened(first).fingerprint != one.fingerprint, "files are read once"


def test_names_of_folders_are_labels(tmp_path, cache):
    for name in ("cat", "dog", "zebra"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / name / "0.png")
    sets = []
    for name in ("cat", "zebra"):
        held_out = {"source": "imagefolder", "validation_files": str(tmp_path / name / "*.png")}
        sets.append(opened(tmp_path / "dog" / "*.png", "validation", **held_out))
    assert [images.labels for images in sets] == [[0], [1]]
    assert len({images.fingerprint for images in sets}) == 1, "the same pixels"
    assert len({images.training_fingerprint for images in sets}) == 2


def test_images_outside_of_the_files_are_not_known_by_their_content(tmp_path, cache):
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    write_parquet(tmp_path / "images.parquet", red=1, path=str(tmp_path / "0.png"))
    images = opened(tmp_path / "images.parquet")
    assert images.older_fingerprints == () and images.training_fingerprint == images.fingerprint
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,cat\n")
    for pattern, known in (("metadata.csv", False), ("*[gv]", True)):
        images = opened(tmp_path / pattern, source="imagefolder")
        assert bool(images.older_fingerprints) == known and len(images) == 1


@pytest.mark.parametrize(
    ("images", "outside"),
    [
        ([{"bytes": b"1"}], set()),
        ([{"path": "a/0.png"}], {"a/0.png"}),
        ([{"bytes": b"1", "path": "0.png"}, {"bytes": None, "path": "zip://1.png::b.zip"}, None], {"b.zip"}),
        ([b"1"], set()),
        (["0.png"], {"0.png"}),
    ],
)
def test_images_that_are_only_named_are_found_however_they_are_stored(images, outside):
    table = SimpleNamespace(data=pyarrow.table({"image": images}))
    assert images_outside(table, "image") == outside
