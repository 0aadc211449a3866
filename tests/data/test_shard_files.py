"""The files of a collection: those that are named like held-out ones, and what tells that they are the same."""

import io
import os
import shutil

import pytest
from PIL import Image

from vtp_diffusion.data import shard_files
from vtp_diffusion.data.image_datasets import DataConfig, open_dataset
from vtp_diffusion.data.shard_files import content_of_files, held_out_note


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


def test_a_collection_stays_the_same_when_its_file_is_written_again_elsewhere(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def known_by(folder, red=None):
        file = tmp_path / folder / "images.parquet"
        if red is not None:
            file.parent.mkdir(exist_ok=True)
            png = io.BytesIO()
            Image.new("RGB", (16, 16), (red, 0, 0)).save(png, "PNG")
            rows = datasets.Features({"image": datasets.Image()})
            datasets.Dataset.from_dict({"image": [{"bytes": png.getvalue(), "path": None}] * 3}, rows).to_parquet(file)
        dataset = open_dataset(DataConfig(source="parquet", data_files=str(file), resolution=16))
        return dataset.fingerprint, *dataset.older_fingerprints

    first, older = known_by("a", red=1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / "images.parquet", (0, 0))
    assert known_by("b")[0] == first and known_by("b")[1] != older, "`datasets` tells paths and times"
    assert known_by("a") == (first, older)
    assert known_by("b", red=2)[0] != first


def test_files_are_known_by_names_sizes_and_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "PIECES", 3)
    monkeypatch.setattr(shard_files, "PIECE", 4)
    content = bytes(range(40))  # pieces begin at 0, 18 and 36

    def known_by(content, name="1.tar"):
        for path in (tmp_path / "0.tar", tmp_path / name):
            path.write_bytes(content)
        return tuple(content_of_files([str(tmp_path / "0.tar"), str(tmp_path / name)]))

    changed = [content[:k] + b"x" + content[k + 1 :] for k in (0, 3, 18, 21, 36, 39)]
    others = [known_by(c) for c in (content, *changed, content + b"x", b"", content[:9], content[:8] + b"x")]
    assert len({*others, known_by(content, "2.tar")}) == len(others) + 1
    assert known_by(content[:17] + b"x" + content[18:]) == known_by(content), "between two pieces"
    assert content_of_files([]) is content_of_files(["hf://datasets/owner/name/0.parquet"]) is None
