"""The images that pre-training reads and measures, of a data set or a stream, their batches, and how many samples were
left out of them."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset

from ..data.batches import (
    Columns,
    StepBatchSampler,
    all_columns,
    collate_images,
    fits_on_device,
    gathered_batches,
    read_batches,
)
from ..data.captions import tokenize_captions
from ..data.image_datasets import DataConfig, ImageDataset, open_dataset
from ..data.streaming import Collate, StreamBatches, StreamingImages, StreamPosition, block_bytes
from ..runtime.processes import gather_objects, local_processes, this_process
from ..training.loop import TrainingRun


@dataclass(frozen=True)
class Splits:
    """The images of a training program.

    Attributes:
        training: images that are trained on.
        train: those of them that are measured: `training` itself, or the first ones of a stream.
        held_out: images that are measured only; None if the source has none.
    """

    training: ImageDataset | StreamingImages
    train: ImageDataset
    held_out: ImageDataset | None

    @property
    def measured(self) -> dict[str, ImageDataset]:
        """The splits that are measured after training, by the names that logs and results have for them."""
        return {"train": self.train} | ({} if self.held_out is None else {"held_out": self.held_out})

    @property
    def validated(self) -> tuple[str, ImageDataset]:
        """Name and images of the split that is measured during training too: the held-out images if there are any."""
        return ("train", self.train) if self.held_out is None else ("held_out", self.held_out)


def check_streaming(config: Any) -> None:
    """Raises: ValueError for settings of a training program that do not work with `data.streaming`."""
    if config.data.streaming and config.evaluation_images is None:
        raise ValueError("evaluation_images is none with data.streaming, expected the number of images to measure")
    if config.data.streaming and config.keep_on_device:
        raise ValueError("keep_on_device is true with data.streaming, expected none or false: a stream has no end")


def open_splits(config: DataConfig, evaluation_images: int | None, batch_size: int) -> Splits:
    """Images for training and for evaluation.

    Args:
        evaluation_images: for a stream, images of each split that the main process evaluates; the others take one.
        batch_size: images per step, over all processes.
    Raises: ValueError: fewer training images than a step takes. For a stream this shows only while reading.
    """
    if config.streaming:
        training, count = StreamingImages(config), evaluation_images if this_process()[0] == 0 else 1
        held_out = StreamingImages(config, "validation").take(count) if training.has_validation else None
        return Splits(training, training.take(count), held_out)
    training = open_dataset(config, "train")
    if len(training) < batch_size:
        raise ValueError(
            f"{config.source} has {len(training)} training images, expected at least train_batch_size, {batch_size}: "
            "a batch would hold an image twice"
        )
    return Splits(training, training, None if training.whole else open_dataset(config, "validation", quiet=True))


def collate_captioned(items: list[dict], context_length: int) -> Columns:
    """Items -> columns, captions tokenised in the process that reads."""
    token_ids, paired = tokenize_captions([item["caption"] for item in items], context_length)
    return collate_images(items) | {"token_ids": token_ids, "paired": paired}


def training_batches(
    run: TrainingRun, dataset: Dataset | StreamingImages, context_length: int | None = None
) -> Iterable[Columns]:
    """Batches of "image" uint8 (B, 3, R, R) and, with a context length, "token_ids" (B, L) and "paired" (B,) bool;
    one for each of the run's micro-steps; a stream does not end."""
    keep_on_device, num_workers = run.config.keep_on_device, run.config.dataloader_num_workers
    collate = collate_images if context_length is None else partial(collate_captioned, context_length=context_length)
    if isinstance(dataset, StreamingImages):
        return stream_batches(run, dataset, collate, num_workers)
    sampler: StepBatchSampler = run.batch_sampler(len(dataset), dataset.weights)
    if not fits_on_device(len(dataset) * 3 * dataset.resolution**2, run.device, keep_on_device):
        return read_batches(dataset, sampler, collate, run.device, num_workers)
    return gathered_batches(all_columns(dataset, collate), sampler, run.device)


def stream_batches(run: TrainingRun, images: StreamingImages, collate: Collate, num_workers: int) -> StreamBatches:
    """The batches of a run's micro-steps; checkpoints save the position in the stream, from which the run resumes.

    Raises:
        ValueError: the run is resumed with other numbers of processes or workers, and `data.stream_restart` is off.
    """
    state, workers = run.state.resumed_data_state, max(1, num_workers)
    if run.is_main:
        buffered, local = images.config.shuffle_buffer, local_processes()
        print(
            f"streams hold up to {buffered * workers * local:,} encoded samples on each node: data.shuffle_buffer, "
            f"{buffered:,}, in each of {workers * local} workers, and no more than data.shuffle_gib, "
            f"{images.config.shuffle_gib:g} GiB"
        )
    if run.first_step > 0 and images.config.stream_restart:
        state = next_epoch(run, state, workers, block_bytes(images.config, workers), images.files)
    if run.first_step > 0 and state is None:
        raise ValueError(
            f"{run.folder.path}: the checkpoint of step {run.first_step} holds no stream position for process "
            f"{run.rank}: a stream is resumed with the same number of processes, or with data.stream_restart true"
        )
    size, seed = run.micro_batch_size, run.config.seed
    batches = StreamBatches(images, size, seed, run.device, collate, num_workers, run.rank, run.world_size, state)
    run.state.data_state = batches.state_dict
    return batches


def next_epoch(
    run: TrainingRun, state: dict[str, Any] | None, workers: int, num_bytes: int, files: str
) -> dict[str, Any] | None:
    """The stream state that this process resumes from: its own, or the start of the next epoch.

    If a checkpoint was written by another number of processes or workers, or while reading other `files`, all
    processes start the epoch after the furthest one that any of them reached, in blocks of `num_bytes`. Every process
    has to call this.
    """
    numbers = run.world_size, workers, files
    same = state is not None and (state["processes"], state["workers"], state.get("files", files)) == numbers
    epochs = [position["epoch"] for position in (state or {"positions": []})["positions"]]
    found = gather_objects((same, max(epochs, default=0)))
    if all(matching for matching, _ in found):
        return state
    epoch = 1 + max(furthest for _, furthest in found)
    run.accelerator.print(
        "the stream was read by other numbers of processes or workers, or from other files: it goes on at the start "
        f"of epoch {epoch}, the rest of the epoch before is skipped, and the count of samples left out begins anew"
    )
    positions = [asdict(StreamPosition(epoch=epoch)) for _ in range(workers)]
    counts = {"workers": workers, "processes": run.world_size, "next_worker": 0, "block_bytes": num_bytes}
    return counts | {"positions": positions}


def count_left_out(run: TrainingRun, training: ImageDataset | StreamingImages, batches: Any) -> dict[str, int]:
    """How many samples were left out of training by all processes together; every process has to call this.

    For a stream these are the counts `StreamBatches.left_out` since the beginning of the run, where a sample counts in
    every epoch; for a data set the number of images that could not be read since the program was started.
    """
    if not isinstance(training, StreamingImages):
        return {"unreadable": len(set().union(*gather_objects(training.skipped)))}
    counts = batches.left_out
    total = run.accelerator.reduce(torch.tensor(list(counts.values()), device=run.device), reduction="sum")
    return dict(zip(counts, total.tolist(), strict=True))
