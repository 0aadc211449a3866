"""Streams of a run that is resumed by other numbers of processes or workers."""

import io
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vtp_diffusion.data.batches import collate_images
from vtp_diffusion.data.image_datasets import DataConfig
from vtp_diffusion.data.streaming import StreamingImages
from vtp_diffusion.pretraining.inputs import stream_batches

CPU = torch.device("cpu")


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


def test_other_numbers_go_on_at_the_start_of_the_next_epoch_if_asked(tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
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
