"""The batches that pre-training reads, of a data set or a stream, and how many samples were left out of them."""

import os
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset

from ..data.batches import (
    Columns,
    StepBatchSampler,
    all_images,
    collate_images,
    fits_on_device,
    gathered_batches,
    read_batches,
)
from ..data.captions import tokenize_captions
from ..data.image_datasets import ImageDataset
from ..data.streaming import Collate, StreamBatches, StreamingImages, StreamPosition, block_bytes
from ..runtime.processes import gather_objects
from ..training.loop import TrainingRun


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
    columns = {"image": all_images(dataset)}
    if context_length is not None:
        token_ids, paired = tokenize_captions(dataset.captions, context_length)
        columns |= {"token_ids": token_ids, "paired": paired}
    return gathered_batches(columns, sampler, run.device)


def stream_batches(run: TrainingRun, images: StreamingImages, collate: Collate, num_workers: int) -> StreamBatches:
    """The batches of a run's micro-steps; checkpoints save the position in the stream, from which the run resumes.

    Raises:
        ValueError: the run is resumed with other numbers of processes or workers, and `data.stream_restart` is off.
    """
    state, workers = run.state.resumed_data_state, max(1, num_workers)
    if run.is_main:
        buffered, local = images.config.shuffle_buffer, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        print(
            f"streams hold up to {buffered * workers * local:,} encoded samples on each node: data.shuffle_buffer, "
            f"{buffered:,}, in each of {workers * local} workers, and no more than data.shuffle_gib, "
            f"{images.config.shuffle_gib:g} GiB"
        )
    if run.first_step > 0 and images.config.stream_restart:
        state = next_epoch(run, state, workers, block_bytes(images.config, workers))
    if run.first_step > 0 and state is None:
        raise ValueError(
            f"{run.folder.path}: the checkpoint of step {run.first_step} holds no stream position for process "
            f"{run.rank}: a stream is resumed with the same number of processes, or with data.stream_restart true"
        )
    size, seed = run.micro_batch_size, run.config.seed
    batches = StreamBatches(images, size, seed, run.device, collate, num_workers, run.rank, run.world_size, state)
    run.state.data_state = batches.state_dict
    return batches


def next_epoch(run: TrainingRun, state: dict[str, Any] | None, workers: int, num_bytes: int) -> dict[str, Any] | None:
    """The stream state that this process resumes from: its own, or the start of the next epoch.

    If a checkpoint was written by another number of processes or workers, all processes start the epoch after the
    furthest one that any of them reached, in blocks of `num_bytes`. Every process has to call this.
    """
    same = state is not None and (state["processes"], state["workers"]) == (run.world_size, workers)
    epochs = [position["epoch"] for position in (state or {"positions": []})["positions"]]
    found = gather_objects((same, max(epochs, default=0)))
    if all(matching for matching, _ in found):
        return state
    epoch = 1 + max(furthest for _, furthest in found)
    run.accelerator.print(
        f"the stream was read by other numbers of processes or workers: it goes on at the start of epoch {epoch}, the "
        "rest of the epoch before is skipped, and the count of samples left out begins anew"
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
