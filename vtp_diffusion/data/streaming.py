"""Image-text shards that are too large to be indexed: webdataset or parquet files read as a stream by `datasets`.

A stream is what one worker of one process reads. In every epoch the shards are shuffled and dealt to the streams, and
a stream reads its shards block by block, each block in a random order. `datasets` can shuffle and resume too, but its
state does not include the shuffle buffer: those samples would be lost. Here the position is a few numbers, the start
of the block and how many of its samples were delivered, so that nothing is lost or repeated.

A stream never ends: after its last shard it starts its next epoch. So every process always has a batch, however
unequal the shards are, and none waits for one that has finished.
"""

import hashlib
import itertools
import json
import math
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..runtime.optional_packages import require
from ..runtime.processes import local_processes
from ..runtime.reproducibility import random_stream
from .batches import PLAIN_BATCH, Columns, columns_to_device, training_loader
from .image_datasets import DataConfig, ImageDataset
from .image_files import SKIP_HINT, UnreadableImageError, center_crop, decode_image
from .images import from_uint8, pil_to_uint8
from .row_values import check_caption, check_label
from .shard_files import check_columns, collection_builder, split_files

READ_ROWS = 32  # rows read from `datasets` at a time
EMPTY_EPOCHS = 3  # after so many epochs in a row without a usable sample, a stream raises an error

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class StreamPosition:
    """Position of a stream: the start of its block, the samples taken from it, and counts of what samples lacked."""

    epoch: int = 0
    shard: int = 0  # index into this epoch's list of the stream's shards
    row: int = 0  # of that shard
    block: int = 0  # of the epoch
    taken: int = 0  # samples of the block, including those left out
    delivered: int = 0  # samples of the epoch
    unreadable: int = 0  # samples left out since the beginning of the run
    without_caption: int = 0  # delivered with "", or left out with `skip_empty_captions`
    named_streams: bool = True  # orders come from `random_stream`; False in a run begun with version 0.1


class StreamingImages:
    """Shards of images with captions, in the item format of `ImageDataset`; without a length.

    Args:
        config: with `streaming`; `shuffle_buffer` is the largest size of a block in samples.
        split: "train" or "validation" (`validation_files` if given, else the validation or test split).
    Attributes:
        has_validation: whether the source has that split.
        files: hash of the shards' names and, on this machine, their sizes: a position is one in these files.
    Raises: ValueError: a source that `datasets` cannot read as a stream, a split or column that does not exist.
    """

    def __init__(self, config: DataConfig, split: str = "train"):
        datasets, files = require("datasets", "train"), split_files(config, split)
        try:
            builder = collection_builder(config, split)
            splits = builder.as_streaming_dataset()
        except (datasets.exceptions.DatasetsError, OSError, ValueError, tarfile.TarError) as error:
            raise ValueError(f"source {config.source!r} cannot be read as a stream: {error}") from error
        found = [name for name in {"train": ("train",)}.get(split, ("validation", "test")) if name in splits]
        if not found:
            raise ValueError(f"{config.source} has no {split} split; it has {', '.join(splits)}")
        table = splits[found[0]]
        self.has_validation = config.validation_files is not None or "validation" in splits or "test" in splits
        known = table.column_names or list(next(iter(table), {}))
        self.config, self.resolution, columns = config, config.resolution, check_columns(config, known)
        self.table = table.cast_column(config.image_column, datasets.Image(decode=False))
        self.num_shards = table.num_shards
        names = list((builder.config.data_files or {}).get(found[0], ()))
        # builders that read files make one shard of each file
        self.shard_names = names if len(names) == self.num_shards else [f"shard {k}" for k in range(self.num_shards)]
        sizes = [Path(name).stat().st_size if Path(name).is_file() else None for name in names]
        shards = json.dumps([[Path(name).name, size] for name, size in zip(names, sizes, strict=True)])
        self.files = hashlib.sha256(shards.encode()).hexdigest()[:16]
        read = files["validation"] if isinstance(files, dict) else files
        self._where = "" if read is None else f"{read}: "  # start of messages about a sample
        feature = (table.features or {}).get(config.label_column) if config.label_column else None
        self.label_names = list(getattr(feature, "names", None) or [])
        described = [config.source, config.name, read, found[0], self.resolution, self.num_shards]
        described += ["EXIF orientation"] if config.exif_orientation else []
        text = json.dumps([*described, *columns])
        self.older_fingerprints = ()
        self.fingerprint = self.training_fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]

    def samples(
        self,
        position: StreamPosition,
        seed: int,
        stream: int = 0,
        num_streams: int = 1,
        block_bytes: int | None = None,
    ) -> Iterator[tuple[dict[str, Any], StreamPosition]]:
        """Endless items of a stream from a position on, each with the position after it.

        A sample without text has the caption "", which the contrastive objective leaves out. With
        `skip_empty_captions` the sample is left out altogether. It is counted either way.

        Args: `block_bytes`: a block ends with the sample that reaches this size; must be the same when resuming.
        Raises: UnreadableImageError: unless `skip_unreadable` is set. ValueError: no usable sample in `EMPTY_EPOCHS`
            epochs.
        """
        rows, empty = _Rows(self, seed, stream, num_streams), 0
        while True:
            block = None  # free the last block before the next is read: memory should hold only one
            block, after = rows.read_block(position, self.config.shuffle_buffer, block_bytes)
            keys = seed, stream, position.epoch, position.block
            order = _permutation("samples of a block", position, len(block), *keys).tolist()
            for place in order[position.taken :]:
                position = replace(position, taken=position.taken + 1)
                item, lacking = self._item(*block[place])
                if lacking:
                    position = replace(position, **{lacking: getattr(position, lacking) + 1})
                if item is not None:
                    position = replace(position, delivered=position.delivered + 1)
                    yield item, position
            counts = {"unreadable": position.unreadable, "without_caption": position.without_caption}
            same_epoch = after.epoch == position.epoch
            if not same_epoch:
                empty = 0 if position.delivered else empty + 1
            if empty == EMPTY_EPOCHS:
                raise ValueError(
                    f"{self.config.source}: {EMPTY_EPOCHS} epochs of stream {stream} of {num_streams} hold no usable "
                    f"sample ({position.unreadable} unreadable, {position.without_caption} without caption)"
                )
            position = replace(after, delivered=position.delivered if same_epoch else 0, **counts)

    def _item(self, key: str, row: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
        """(item, or None if it is left out; the field of `StreamPosition` that counts what it lacks, or "")."""
        config = self.config
        caption = lacking = ""
        if config.caption_column:
            name = f"{self._where}{config.source}: {config.caption_column} of {key}"
            caption = check_caption(row[config.caption_column], name)
            lacking = "" if caption else "without_caption"
        if lacking and config.skip_empty_captions:
            return None, lacking
        try:
            name = f"{self._where}image {key} of {config.source}"
            image = decode_image(row[config.image_column], name, config.exif_orientation, config.max_pixels)
            pixels = pil_to_uint8(center_crop(image, self.resolution))  # (3, R, R)
        except UnreadableImageError as error:
            if not config.skip_unreadable:
                raise UnreadableImageError(f"{error}. {SKIP_HINT}") from error
            return None, "unreadable"
        label = 0
        if config.label_column is not None:
            name = f"{self._where}sample {key} of {config.source}: {config.label_column}"
            expected = "a class index (the names in a stream are not known beforehand)"
            label = check_label(row[config.label_column], name, expected)
        return {"image": pixels, "label": label, "caption": caption, "key": key}, lacking

    def first_epoch(self, stream: int = 0, num_streams: int = 1) -> Iterator[dict[str, Any]]:
        """Items of the first epoch of a stream."""
        samples = self.samples(StreamPosition(), 0, stream, num_streams)
        return (item for item, _ in itertools.takewhile(lambda sample: sample[1].epoch == 0, samples))

    def take(self, count: int) -> ImageDataset:
        """The first usable samples of the first epoch, at most `count`, as a data set in memory."""
        items = list(itertools.islice(self.first_epoch(), count))
        highest = max((item["label"] for item in items), default=0)
        dataset = ImageDataset(
            references=range(len(items)),
            read=None,  # all pixels are there
            resolution=self.resolution,
            keys=[item["key"] for item in items],
            labels=[item["label"] for item in items],
            captions=[item["caption"] for item in items],
            label_names=self.label_names or [str(k) for k in range(highest + 1)],
            weights=torch.ones(len(items)),
            fingerprint=f"{self.fingerprint}-{len(items)}",
            classes_named=bool(self.label_names),
        )
        dataset._pixels = torch.stack([item["image"] for item in items])
        return dataset


def first_batches(
    images: StreamingImages, count: int, device: torch.device, num_workers: int = 0
) -> Iterator[torch.Tensor]:
    """Batches (B, 3, R, R) in [-1, 1] of the first `count` images of the first epoch, or all if it has fewer.

    Args: `num_workers`: reading processes, each with its own stream: another number gives other images.
    """
    workers = min(num_workers, images.num_shards)
    # a generator of its own, so that the loader does not draw from the global one
    loader = DataLoader(_FirstEpoch(images), PLAIN_BATCH, num_workers=workers, generator=torch.Generator())
    for batch in loader:
        batch = batch[:count]
        count -= len(batch)
        yield from_uint8(batch.to(device))
        if count == 0:
            return


class _FirstEpoch(IterableDataset):
    """In each worker: the images (3, R, R) uint8 of the first epoch of its stream."""

    def __init__(self, images: StreamingImages):
        self.images = images

    def __iter__(self):
        info = get_worker_info()
        items = self.images.first_epoch() if info is None else self.images.first_epoch(info.id, info.num_workers)
        return (item["image"] for item in items)


def _permutation(use: str, position: StreamPosition, count: int, *keys: int) -> np.ndarray:
    random = random_stream(use, *keys) if position.named_streams else np.random.default_rng(keys)
    return random.permutation(count)


class _Rows:
    """Undecoded rows of a stream in reading order; keeps its current shard open from block to block."""

    def __init__(self, images: StreamingImages, seed: int, stream: int, num_streams: int):
        self.images, self.seed, self.stream, self.num_streams = images, seed, stream, num_streams
        # with more streams than shards, each shard is read by `stripes` streams, which take its rows in turn
        self.stripes = -(-num_streams // images.num_shards)
        self._at: tuple[int, int, int] | None = None  # epoch, shard, row of the next row in `_open`
        self._open: Iterator[dict[str, Any]] = iter(())

    def dealt(self, position: StreamPosition) -> list[tuple[int, int]]:
        """(shard, stripe) that this stream reads in the position's epoch."""
        parts = [(shard, stripe) for shard in range(self.images.num_shards) for stripe in range(self.stripes)]
        order = _permutation("shards", position, len(parts), self.seed, position.epoch)
        return [parts[k] for k in order[self.stream :: self.num_streams]]

    def read_block(
        self, start: StreamPosition, size: int, num_bytes: int | None = None
    ) -> tuple[list, StreamPosition]:
        """(key, row) of each sample of the block at `start`, and the start of the next block. A block ends after
        `size` samples, when its images reach `num_bytes`, or with the epoch."""
        dealt, shard, row = self.dealt(start), start.shard, start.row
        block: list[tuple[str, dict[str, Any]]] = []
        left, column = math.inf if num_bytes is None else num_bytes, self.images.config.image_column
        while shard < len(dealt) and len(block) < size and left > 0:
            index, stripe = dealt[shard]
            if self._at != (start.epoch, shard, row):
                self._open = self._rows(index, row)
            for values in self._open:
                if row % self.stripes == stripe:
                    name = values.get("__key__")
                    key = f"{index:05d}/{row:08d}" if name is None else f"{index:05d}/{name}"
                    block.append((key, values))
                    left -= len((values[column] or {}).get("bytes") or b"")
                row += 1
                if len(block) == size or left <= 0:
                    break
            else:
                shard, row = shard + 1, 0
            self._at = (start.epoch, shard, row) if row else None
        if shard == len(dealt):
            return block, StreamPosition(epoch=start.epoch + 1, named_streams=start.named_streams)
        return block, StreamPosition(start.epoch, shard, row, start.block + 1, named_streams=start.named_streams)

    def _rows(self, index: int, first: int) -> Iterator[dict[str, Any]]:
        table = self.images.table.shard(self.images.num_shards, index)
        # `iter` and not __iter__, which would divide the shard among the loader's workers once more
        try:
            for batch in (table.skip(first) if first else table).iter(READ_ROWS):
                names = list(batch)
                for values in zip(*batch.values(), strict=True):
                    yield dict(zip(names, values, strict=True))
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:  # pyarrow raises OSError, ValueError
            raise ValueError(
                f"{self.images.shard_names[index]} is damaged, or no {self.images.config.source}: {error}"
            ) from error


def block_bytes(config: DataConfig, workers: int) -> int:
    """One stream's share of `shuffle_gib`, with `workers` streams in each process of this node."""
    return max(1, int(config.shuffle_gib * 2**30) // (workers * local_processes()))


class StreamBatches:
    """Endless batches on the device from the streams of this process; iterate once.

    The workers take turns, each delivering whole batches of its own stream.

    Args:
        images: the shards.
        batch_size: images a batch.
        seed: of the order.
        device: for tensors; captions stay lists of strings.
        collate: items -> columns, in the worker.
        num_workers: processes that read and decode ahead; 0: this process reads.
        rank, world_size: this process and the number of processes.
        state: from `state_dict`, to continue after the last batch that was delivered.
    Raises: ValueError: `state` has another number of processes or workers, or is of other files. While iterating: an
        epoch of a stream is smaller than a batch, and errors of `StreamingImages.samples`.
    """

    def __init__(
        self,
        images: StreamingImages,
        batch_size: int,
        seed: int,
        device: torch.device,
        collate: Collate,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, Any] | None = None,
    ):
        workers = max(1, num_workers)
        if state is not None and (state["workers"], state["processes"]) != (workers, world_size):
            raise ValueError(
                f"the stream was read by {state['processes']} processes with {state['workers']} workers each, now "
                f"there are {world_size} with {workers}: a stream is resumed with the same numbers, or "
                "with data.stream_restart true"
            )
        if state is not None and state.get("files", images.files) != images.files:  # version 0.1 kept no hash
            raise ValueError(
                f"{images.config.source}: the shards have other names or sizes than those that the run was reading: a "
                "stream is resumed with the same files, or with data.stream_restart true"
            )
        self.files = images.files
        self.device, self.num_workers, self.workers, self.world_size = device, num_workers, workers, world_size
        self.next_worker = 0 if state is None else state["next_worker"]
        given = [{}] * workers if state is None else [{"named_streams": False} | part for part in state["positions"]]
        self.positions = [StreamPosition(**position) for position in given]
        streams = [rank * workers + worker for worker in range(workers)]
        # taken from the state, since blocks must stay the same on nodes of other sizes; None before version 0.2
        self.block_bytes = block_bytes(images.config, workers) if state is None else state.get("block_bytes")
        numbers = (workers * world_size, self.block_bytes)
        self._reader = _BatchReader(images, batch_size, seed, collate, streams, *numbers)

    def __iter__(self) -> Iterator[Columns]:
        self._reader.begin(list(self.positions), self.next_worker)
        loader = training_loader(self._reader, self.num_workers, self.device, batch_size=None)
        for entry in loader:
            if entry is None:
                continue
            columns, worker, position = entry
            self.positions[worker], self.next_worker = StreamPosition(**position), (worker + 1) % self.workers
            yield columns_to_device(columns, self.device)

    def state_dict(self) -> dict[str, Any]:
        """Positions of this process's streams after the last batch that was delivered, for JSON."""
        positions = [asdict(position) for position in self.positions]
        counts = {"workers": self.workers, "processes": self.world_size, "next_worker": self.next_worker}
        return counts | {"block_bytes": self.block_bytes, "positions": positions, "files": self.files}

    @property
    def left_out(self) -> dict[str, int]:
        """Numbers of this process's samples so far that were unreadable, and that had no caption: those are left out
        of the contrastive objective, or with `skip_empty_captions` of all."""
        return {name: sum(getattr(p, name) for p in self.positions) for name in ("unreadable", "without_caption")}


class _BatchReader(IterableDataset):
    """In each worker: (batch, worker number, position after it) of its stream."""

    def __init__(self, images, batch_size, seed, collate, streams, num_streams, block_bytes):
        self.images, self.batch_size, self.seed, self.collate = images, batch_size, seed, collate
        self.streams, self.num_streams, self.block_bytes = streams, num_streams, block_bytes

    def begin(self, positions: list[StreamPosition], next_worker: int) -> None:
        self.positions, self.next_worker = positions, next_worker

    def __iter__(self):
        info = get_worker_info()
        worker = 0 if info is None else info.id
        if worker < self.next_worker:
            yield None  # the loader begins with worker 0, but a later worker is next
        last, items = self.positions[worker], []
        stream = (self.streams[worker], self.num_streams, self.block_bytes)
        for item, position in self.images.samples(last, self.seed, *stream):
            if position.epoch > last.epoch and last.delivered < self.batch_size:
                raise ValueError(
                    f"{self.images.config.source}: an epoch of stream {self.streams[worker]} of {self.num_streams} "
                    f"is smaller than a batch of {self.batch_size} images: fewer processes or workers, smaller "
                    "batches, or more data"
                )
            items.append(item)
            last = position
            if len(items) == self.batch_size:
                yield self.collate(items), worker, asdict(position)
                items = []
