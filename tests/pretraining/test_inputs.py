"""What is trained on and what is measured, and streams of a run that is resumed by other numbers of processes."""

import io
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_streaming import captions, config, everything, write_shards

from vtp_diffusion.data.batches import collate_images
from vtp_diffusion.data.image_datasets import DataConfig
from vtp_diffusion.data.streaming import StreamingImages
from vtp_diffusion.pretraining.feature_evaluation import unmeasured
from vtp_diffusion.pretraining.inputs import open_splits, stream_batches

CPU = torch.device("cpu")


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return module


def collate(items):
    return collate_images(items, ("image", "key"))


def images(datasets, folder, **changes):
    """Six samples in two shards."""
    for shard in range(2):
        contents = []
        for k in range(3):
            file = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), 3 * shard + k, np.uint8)).save(file, "PNG")
            contents.append({"bytes": file.getvalue(), "path": None})
        table = datasets.Dataset.from_dict({"image": contents}, datasets.Features({"image": datasets.Image()}))
        table.to_parquet(folder / f"{shard}.parquet")
    files = str(folder / "*.parquet")
    return StreamingImages(DataConfig(source="parquet", data_files=files, resolution=8, streaming=True, **changes))


def run_of(processes, first_step, state):
    """As much of a `TrainingRun` as a stream looks at."""
    return SimpleNamespace(
        state=SimpleNamespace(resumed_data_state=state, data_state=None),
        config=SimpleNamespace(seed=0),
        folder=SimpleNamespace(path=Path("run")),
        accelerator=SimpleNamespace(print=print),
        first_step=first_step, world_size=processes, rank=0, is_main=True, micro_batch_size=3, device=CPU,
    )  # fmt: skip


def test_without_held_out_images_those_trained_on_are_measured_and_that_is_said(tmp_path):
    for split, count in (("train", 3), ("validation", 2)):
        for k in range(count):
            for kind in "ab":
                (tmp_path / split / kind).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / split / kind / f"{k}.png")
    splits = open_splits(DataConfig(source=str(tmp_path), resolution=8), None, 6)
    assert {name: len(images) for name, images in splits.measured.items()} == {"train": 6, "held_out": 4}
    assert splits.train is splits.training and splits.validated == ("held_out", splits.held_out)
    assert unmeasured(splits, contrastive=True) == []
    alone = open_splits(DataConfig(source=str(tmp_path / "train"), resolution=8), None, 6)
    assert alone.measured == {"train": alone.training} and alone.validated == ("train", alone.training)
    assert "training images are measured, and no k-NN accuracy" in unmeasured(alone, contrastive=True)[0]
    with pytest.raises(ValueError, match="has 6 training images, expected at least train_batch_size, 7"):
        open_splits(DataConfig(source=str(tmp_path), resolution=8), None, 7)


def test_a_collection_without_held_out_images_is_measured_on_those_trained_on(tmp_path, datasets):
    folder = write_shards(datasets, tmp_path / "shards")
    splits = open_splits(config(folder, streaming=False), None, 4)
    assert splits.held_out is None and splits.validated == ("train", splits.training)


def test_held_out_shards_are_those_that_are_measured_and_not_those_that_are_trained_on(tmp_path, datasets):
    folder = write_shards(datasets, tmp_path / "shards")
    plain = config(folder, data_files=str(folder / "[01].parquet"))
    splits = open_splits(replace(plain, validation_files=str(folder / "2.parquet")), 100, 4)
    assert sorted(splits.held_out.captions) == [f"text {n}" for n in (10, 11, 8, 9)]
    assert sorted(captions(splits.training, 8)) == sorted(splits.train.captions) == everything(8)
    alone = open_splits(plain, 100, 4)
    assert alone.training.fingerprint == splits.training.fingerprint and alone.held_out is None


def test_only_the_main_process_holds_what_of_a_stream_is_measured_and_its_pixels_alone(
    tmp_path, datasets, monkeypatch
):
    folder = write_shards(datasets, tmp_path / "shards")
    main = open_splits(config(folder), 6, 4).train
    assert torch.equal(main[2]["image"], StreamingImages(config(folder)).take(3)[2]["image"])
    assert len(main) == 6 and list(main.references) == list(range(6)), "no second copy as pictures"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(open_splits(config(folder), 6, 4).train) == 1


def test_other_numbers_go_on_at_the_start_of_the_next_epoch_if_asked(tmp_path, datasets, capsys):
    strict, restarting = images(datasets, tmp_path), images(datasets, tmp_path, stream_restart=True)
    begun = stream_batches(run_of(1, 0, None), strict, collate, 0)
    straight = [batch["key"] for batch in islice(begun, 1)]
    said = "streams hold up to 1,000 encoded samples on each node: data.shuffle_buffer, 1,000, in each of 1 workers"
    said += ", and no more than data.shuffle_gib, 16 GiB"
    assert said in capsys.readouterr().out
    state = begun.state_dict()
    other = {**state, "processes": 2}  # as if two processes had read so far
    with pytest.raises(ValueError, match="read by 2 processes .* now there are 1 .*or with data.stream_restart true"):
        stream_batches(run_of(1, 1, other), strict, collate, 0)
    with pytest.raises(ValueError, match="no stream position for process 0: .* or with data.stream_restart true"):
        stream_batches(run_of(1, 1, None), strict, collate, 0)
    for lost in (other, None):
        resumed = stream_batches(run_of(1, 1, lost), restarting, collate, 0)
        assert "it goes on at the start of epoch 1" in capsys.readouterr().out
        assert len({key for batch in islice(resumed, 2) for key in batch["key"]}) == 6, "a whole epoch"
        assert resumed.positions[0].epoch >= 1
    same = stream_batches(run_of(1, 1, state), restarting, collate, 0)
    rest = next(iter(same))["key"]
    assert "goes on" not in capsys.readouterr().out
    assert len({*straight[0], *rest}) == 6, "equal numbers go on where they were"


def test_restarting_what_is_no_stream_is_refused(tmp_path):
    with pytest.raises(ValueError, match="stream_restart is true without streaming, expected false"):
        DataConfig(source=str(tmp_path), stream_restart=True)
