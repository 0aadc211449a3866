"""Shards read as a stream: nothing lost, nothing repeated, on any number of streams, and after a restart."""

import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vtp_diffusion.data.image_datasets import DataConfig, open_dataset
from vtp_diffusion.data.image_files import UnreadableImageError
from vtp_diffusion.data.images import to_uint8
from vtp_diffusion.data.streaming import (
    StreamBatches,
    StreamingImages,
    StreamPosition,
    _Rows,
    first_batches,
)

SIZES = (5, 3, 4)  # samples a shard, unequal on purpose
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def as_bytes(value):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_shards(datasets, folder, damaged=(), silent=(), sizes=SIZES):
    """Parquet files; sample n is the grey n with the caption "text n" and the class n."""
    folder.mkdir(exist_ok=True)
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "kind": datasets.Value("int64")}
    first = 0
    for shard, size in enumerate(sizes):
        numbers = range(first, first + size)
        images = [{"bytes": b"no picture" if n in damaged else as_bytes(n), "path": None} for n in numbers]
        texts = ["  " if n in silent else f"text {n}" for n in numbers]
        table = datasets.Dataset.from_dict(
            {"image": images, "text": texts, "kind": list(numbers)}, datasets.Features(features)
        )
        table.to_parquet(str(folder / f"{shard}.parquet"))
        first += size
    return folder


def config(folder, **changes):
    columns = {"caption_column": "text", "label_column": "kind"}
    settings = {"source": "parquet", "data_files": str(folder / "*.parquet"), "resolution": 8, "streaming": True}
    return DataConfig(**(settings | {"shuffle_buffer": 4} | columns | changes))


def captions(images, count, position=None, stream=0, num_streams=1, seed=0):
    samples = images.samples(position or StreamPosition(), seed, stream, num_streams)
    return [item["caption"] for item, _ in islice(samples, count)]


def collate(items):
    return {"image": torch.stack([item["image"] for item in items]), "caption": [item["caption"] for item in items]}


def everything(total=12):
    return sorted(f"text {n}" for n in range(total))


# --- order ---


def test_items_are_those_of_an_indexed_data_set(tmp_path, offline):
    folder = write_shards(offline, tmp_path / "shards")
    indexed = {item["caption"]: item for item in open_dataset(config(folder, streaming=False))}
    for item, _ in islice(StreamingImages(config(folder)).samples(StreamPosition(), 0), 12):
        expected = indexed[item["caption"]]
        assert torch.equal(item["image"], expected["image"]) and item["label"] == expected["label"]
        assert item.keys() == expected.keys() and isinstance(item["caption"], str)


@pytest.mark.parametrize("buffer", [2, 4, 100])
def test_an_epoch_is_every_sample_once_and_the_next_has_another_order(tmp_path, offline, buffer):
    images = StreamingImages(config(write_shards(offline, tmp_path / "shards"), shuffle_buffer=buffer))
    read = captions(images, 36)
    epochs = [read[:12], read[12:24], read[24:]]
    assert [sorted(epoch) for epoch in epochs] == [everything()] * 3
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != everything()
    assert read == captions(images, 36) and read != captions(images, 36, seed=1)


@pytest.mark.parametrize("num_streams", [2, 3, 5, 8])
def test_streams_share_an_epoch_without_overlap_even_when_they_outnumber_the_shards(tmp_path, offline, num_streams):
    images = StreamingImages(config(write_shards(offline, tmp_path / "shards")))
    first_epoch = []
    for stream in range(num_streams):
        samples = images.samples(StreamPosition(), 0, stream, num_streams)
        items = islice(samples, 20)  # each delivers as many as are asked of it, in whatever epochs
        found = [(item["caption"], position.epoch) for item, position in items]
        assert len(found) == 20
        first_epoch += [caption for caption, epoch in found if epoch == 0]
    assert sorted(first_epoch) == everything()


@pytest.mark.parametrize("cut", [1, 4, 7, 12, 13])
def test_going_on_from_a_position_neither_repeats_nor_loses(tmp_path, offline, cut):
    images = StreamingImages(config(write_shards(offline, tmp_path / "shards", damaged=(2, 9)), skip_unreadable=True))
    samples = list(islice(images.samples(StreamPosition(), 0), 25))
    item, position = samples[cut - 1]
    again = list(islice(StreamingImages(images.config).samples(position, 0), 25 - cut))
    assert [i["caption"] for i, _ in again] == [i["caption"] for i, _ in samples[cut:]]
    assert [p for _, p in again] == [p for _, p in samples[cut:]]  # what was left out is counted on


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_with_the_next_batch(tmp_path, offline, workers):
    images = StreamingImages(config(write_shards(offline, tmp_path / "shards")))
    arguments = {"batch_size": 2, "seed": 3, "device": CPU, "collate": collate, "num_workers": workers}
    before = torch.get_rng_state()
    straight = [batch["caption"] for batch in islice(StreamBatches(images, **arguments), 9)]
    first = StreamBatches(images, **arguments)
    read = [batch["caption"] for batch in islice(first, 3)]  # the workers have read further: that is not lost
    state = json.loads(json.dumps(first.state_dict()))
    read += [batch["caption"] for batch in islice(StreamBatches(images, **arguments, state=state), 6)]
    assert read == straight
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="read by 1 processes with . workers each, now there are 2"):
        StreamBatches(images, **arguments, world_size=2, state=state)
    (tmp_path / "shards" / "1.parquet").rename(tmp_path / "shards" / "1b.parquet")
    with pytest.raises(ValueError, match="other names or sizes than those that the run was reading"):
        StreamBatches(StreamingImages(images.config), **arguments, state=state)
    del state["files"]  # version 0.1 kept no hash of them
    assert StreamBatches(StreamingImages(images.config), **arguments, state=state).next_worker == 3 % max(1, workers)


def test_a_node_holds_no_more_bytes_than_it_may_and_resumes_with_blocks_of_the_same_size(
    tmp_path, offline, monkeypatch
):
    shards = config(write_shards(offline, tmp_path / "shards"), shuffle_buffer=12)
    size = len(as_bytes(0))
    bounded = StreamingImages(replace(shards, shuffle_gib=6 * size / 2**30))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    arguments = {"batch_size": 1, "seed": 3, "device": CPU, "collate": collate}
    begun = StreamBatches(bounded, **arguments)
    assert begun.block_bytes == 3 * size, "half of the node's"
    block, _ = _Rows(bounded, 3, 0, 1).read_block(StreamPosition(), 12, begun.block_bytes)
    sizes = [len(row["image"]["bytes"]) for _, row in block]
    assert sum(sizes[:-1]) < begun.block_bytes <= sum(sizes), "the last sample filled it"
    straight = [batch["caption"] for batch in islice(begun, 24)]
    assert sorted(sum(straight[:12], [])) == everything()
    first = StreamBatches(bounded, **arguments)
    read = [batch["caption"] for batch in islice(first, 5)]
    state = json.loads(json.dumps(first.state_dict()))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # nodes of another size: the blocks stay as they are
    assert (
        read + [batch["caption"] for batch in islice(StreamBatches(bounded, **arguments, state=state), 19)] == straight
    )
    state.pop("block_bytes")  # version 0.1 knew no bound
    assert StreamBatches(bounded, **arguments, state=state).block_bytes is None


def test_a_run_begun_with_version_0_1_keeps_its_orders(tmp_path, offline):
    """Drawn from lists of numbers; its checkpoints do not say how."""
    images = StreamingImages(config(write_shards(offline, tmp_path / "shards"), shuffle_buffer=12))
    position = StreamPosition(named_streams=False)
    rows = _Rows(images, 3, 0, 1)
    shards = np.random.default_rng([3, 0]).permutation(images.num_shards).tolist()
    assert [shard for shard, _ in rows.dealt(position)] == shards
    texts = [values["text"] for _, values in rows.read_block(position, 12)[0]]
    old = [texts[k] for k in np.random.default_rng([3, 0, 0, 0]).permutation(12)]
    assert captions(images, 12, position, seed=3) == old != captions(images, 12, seed=3)
    arguments = {"batch_size": 2, "seed": 3, "device": CPU, "collate": collate}
    state = StreamBatches(images, **arguments).state_dict()
    del state["positions"][0]["named_streams"]
    resumed = islice(StreamBatches(images, **arguments, state=state), 6)
    assert [text for batch in resumed for text in batch["caption"]] == old


@pytest.mark.parametrize("indexed", [False, True])
def test_webdataset_shards_as_people_pack_them(tmp_path, offline, indexed):
    """Upper case, dots in names, several formats, and other files of a sample, masks among them."""
    names = ["a.JPG", "a.txt", "a.mask.jpg", "b.v1.jpg", "b.v1.txt", "c.png", "c.txt", "c.json", ".d.jpg", "e.jpg"]
    greys = {"a.JPG": 10, "b.v1.jpg": 20, "c.png": 30, "e.jpg": 40}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            content = as_bytes(greys.get(name, 99)) if name[-3:] in ("JPG", "jpg", "png") else name.encode()
            entry = tarfile.TarInfo(f"some.folder/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    columns = {"image_column": "jpg", "caption_column": "txt", "data_files": str(tmp_path / "a.tar")}
    settings = config(tmp_path, source="webdataset", label_column=None, streaming=not indexed, **columns)
    dataset = open_dataset(settings) if indexed else StreamingImages(settings).take(9)
    found = {(item["image"].unique().item(), item["caption"]) for item in dataset}
    assert found == {(10, "a.txt"), (20, "b.v1.txt"), (30, "c.txt"), (40, "")}
    with pytest.raises(ValueError, match="no column 'text': none of the first 5 samples has a file .text"):
        wrong = replace(settings, caption_column="text")
        open_dataset(wrong) if indexed else StreamingImages(wrong)


def test_webdataset_keys_name_the_samples(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for k in range(3):
            for suffix, content in (("png", as_bytes(k)), ("txt", f"text {k}".encode())):
                entry = tarfile.TarInfo(f"s{k}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    columns = {"image_column": "png", "caption_column": "txt", "data_files": str(tmp_path / "a.tar")}
    images = StreamingImages(config(tmp_path, source="webdataset", label_column=None, **columns))
    items = {item["key"]: item for item, _ in islice(images.samples(StreamPosition(), 0), 3)}
    assert sorted(items) == ["00000/s0", "00000/s1", "00000/s2"]
    assert items["00000/s2"]["caption"] == "text 2" and items["00000/s2"]["image"].unique().tolist() == [2]


@pytest.mark.parametrize("source", ["webdataset", "parquet"])
def test_a_shard_that_is_cut_or_damaged_is_named(tmp_path, offline, source):
    folder = write_shards(offline, tmp_path / "shards")
    if source == "webdataset":
        for shard in range(2):
            with tarfile.open(folder / f"{shard}.tar", "w") as tar:
                for k, suffix in itertools.product(range(6), ("png", "txt")):  # five tell the columns
                    content = as_bytes(k) if suffix == "png" else f"text {k}".encode()
                    entry = tarfile.TarInfo(f"{k}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    settings = {"image_column": "png", "caption_column": "txt", "label_column": None} if source == "webdataset" else {}
    suffix = {"webdataset": "tar", "parquet": "parquet"}[source]
    settings |= {"source": source, "data_files": str(folder / f"*.{suffix}")}
    images = StreamingImages(config(folder, **settings))
    path = folder / f"1.{suffix}"
    content = path.read_bytes()
    path.write_bytes(
        content[: 10_760 if source == "webdataset" else len(content) // 2]
    )  # after it was opened, as a disk may do
    with pytest.raises(ValueError, match=f"1.{suffix} is damaged, or no {source}"):
        captions(images, 12)
    with pytest.raises(ValueError, match=f"1.{suffix} is truncated|cannot be read as a stream|is damaged, or no"):
        captions(StreamingImages(images.config), 12)


def test_the_first_samples_as_a_data_set(tmp_path, offline):
    images = StreamingImages(config(write_shards(offline, tmp_path / "shards")))
    few, all_of_them = images.take(5), images.take(100)
    assert len(few) == 5 and few.captions == captions(images, 5)
    assert sorted(all_of_them.captions) == everything() and few.fingerprint != all_of_them.fingerprint


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_images_one_by_one_are_an_epoch_or_less(tmp_path, offline, workers):
    images = StreamingImages(config(write_shards(offline, tmp_path / "shards")))
    before = torch.get_rng_state()
    for count in (5, 12, 100):
        read = torch.cat(list(first_batches(images, count, CPU, workers)))
        greys = to_uint8(read).flatten(1).float()
        assert len(greys) == min(count, 12) == len(greys[:, 0].unique()) and (greys == greys[:, :1]).all()
    assert torch.equal(torch.get_rng_state(), before)


# --- bad input ---


def test_damaged_images_and_empty_captions_are_named_or_counted(tmp_path, offline):
    folder = write_shards(offline, tmp_path / "shards", damaged=(1, 6), silent=(3,))
    with pytest.raises(
        UnreadableImageError,
        match=r"shards/\*.parquet: image 0000./0000000. of parquet cannot be read.*--data.skip_unreadable",
    ):
        captions(StreamingImages(config(folder, skip_empty_captions=True)), 12)
    images = StreamingImages(config(folder, skip_unreadable=True, skip_empty_captions=True))
    batches = StreamBatches(images, 3, 0, CPU, collate)
    read = Counter(caption for batch in islice(batches, 6) for caption in batch["caption"])
    assert set(read) == set(everything()) - {"text 1", "text 6", "text 3"} and set(read.values()) == {2}
    assert batches.left_out["unreadable"] in (3, 4) and batches.left_out["without_caption"] in (1, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_without_a_text_keeps_its_image_and_is_counted(tmp_path, offline, workers):
    folder = write_shards(offline, tmp_path / "shards", damaged=(6,), silent=(3, 6), sizes=(4, 4, 4))
    batches = StreamBatches(StreamingImages(config(folder, skip_unreadable=True)), 1, 0, CPU, collate, workers)
    read = [(batch["image"].unique().tolist(), batch["caption"]) for batch in islice(batches, 11)]
    assert ([3], [""]) in read and ([6], [""]) not in read
    assert batches.left_out["without_caption"] == read.count(([3], [""]))
    assert batches.left_out["unreadable"] >= 1


def test_a_stream_without_one_good_image_ends_with_an_error(tmp_path, offline):
    folder = write_shards(offline, tmp_path / "shards", damaged=range(12))
    with pytest.raises(ValueError, match="3 epochs of stream 0 of 1 hold no usable sample .36 unreadable"):
        captions(StreamingImages(config(folder, skip_unreadable=True)), 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_smaller_than_a_batch_are_refused(tmp_path, offline, workers):
    images = StreamingImages(config(write_shards(offline, tmp_path / "shards")))
    assert len(next(iter(StreamBatches(images, 12, 0, CPU, collate, workers)))["caption"]) == 12
    with pytest.raises(ValueError, match="an epoch of stream 0 of 1 is smaller than a batch of 13 images"):
        next(iter(StreamBatches(images, 13, 0, CPU, collate, workers)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "openmoji"}, "source is 'openmoji' with streaming"),
        ({"limit": 3}, "limit is 3 with streaming, expected none: set max_train_steps"),
        ({"shuffle_buffer": 0}, "shuffle_buffer is 0"),
        ({"caption_column": "words"}, "no column 'words' for the caption; it has .'image', 'text', 'kind'."),
        ({"data_files": "none/*.parquet"}, "data_files is 'none/.*.parquet', which matches no file"),
        ({"source": "webdataset", "data_files": None}, "data_files is none with source 'webdataset', expected files"),
        ({"validation_files": "none/*.parquet"}, "validation_files is 'none/.*.parquet', which matches no file"),
        ({"source": "webdataset"}, "source 'webdataset' cannot be read as a stream"),  # parquet files are no tar files
    ],
)
def test_what_cannot_be_streamed_is_named(tmp_path, offline, changes, message):
    folder = write_shards(offline, tmp_path / "shards")
    with pytest.raises(ValueError, match=message):
        StreamingImages(config(folder, **changes))


def test_where_images_are_read_by_index_a_stream_is_refused(tmp_path):
    with pytest.raises(ValueError, match="streaming is true, expected false"):
        open_dataset(config(tmp_path))


def test_two_processes_with_unequal_shards_both_deliver_and_share_the_epoch(tmp_path, offline):
    """Five samples against seven, more steps than either has, a collective in each: nobody waits for ever."""
    folder = write_shards(offline, tmp_path / "shards", sizes=(9, 3))
    script = tmp_path / "read.py"
    script.write_text(
        "import json, sys, torch, torch.distributed as dist\n"
        "from vtp_diffusion.data.image_datasets import DataConfig\n"
        "from vtp_diffusion.data.streaming import StreamBatches, StreamingImages\n"
        "from itertools import islice\n"
        "dist.init_process_group('gloo')\n"
        "images = StreamingImages(DataConfig(**json.loads(sys.argv[1])))\n"
        "collate = lambda items: {'caption': [item['caption'] for item in items]}\n"
        "rank, world = dist.get_rank(), dist.get_world_size()\n"
        "batches = StreamBatches(images, 3, 0, torch.device('cpu'), collate, 1, rank, world)\n"
        "read = []\n"
        "for batch in islice(batches, 10):\n"
        "    read.append((batch['caption'], batches.positions[0].epoch))\n"
        "    dist.all_reduce(torch.ones(1))\n"
        "gathered = [None] * world\n"
        "dist.all_gather_object(gathered, read)\n"
        "if rank == 0: print(json.dumps(gathered))\n"
        "dist.destroy_process_group()\n"  # its threads would now and then abort a process that ends
    )
    settings = json.dumps(vars(config(folder)))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, settings],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = json.loads(done.stdout.splitlines()[-1])
    assert [len(read) for read in ranks] == [10, 10]
    first = [caption for read in ranks for batch, epoch in read if epoch == 0 for caption in batch]
    assert len(first) == len(set(first)) and set(first) <= set(everything())
