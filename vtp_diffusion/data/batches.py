"""Batches on the device: gathered there from a data set held whole, or read ahead by processes or threads."""

import multiprocessing
import multiprocessing.context
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from .images import from_uint8
from .order import StepBatchSampler

# A data set up to these sizes is held on the device unless the configuration says otherwise: models, activations and
# other users of the machine need the rest.
DEVICE_SHARE = 0.25  # of an accelerator's memory
HOST_BYTES = 2**30  # where the device is the host
PLAIN_BATCH = 64  # images at a time where nothing is trained

READ_AHEAD = 2  # batches a thread

Columns = dict[str, torch.Tensor]
Job, Result = TypeVar("Job"), TypeVar("Result")


def fits_on_device(num_bytes: int, device: torch.device, choice: bool | None = None) -> bool:
    """Whether a data set of that size is to be held on the device: the choice, or where it is None, by size."""
    if choice is not None:
        return choice
    if device.type == "cuda":
        return num_bytes <= DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory
    return num_bytes <= HOST_BYTES


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device, without waiting for what is queued there."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def columns_to_device(columns: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Columns that a loader delivered (in pinned memory for a GPU); those that are no tensors stay as they are."""
    return {
        name: column.to(device, non_blocking=True) if isinstance(column, torch.Tensor) else column
        for name, column in columns.items()
    }


def gathered_batches(columns: Columns, sampler: StepBatchSampler) -> Iterator[Columns]:
    """Batches of rows of columns that lie on the device already. Nothing waits for the device: of all that training
    needs, only indices travel there.

    Args: `columns`: name -> (N, ...), on one device.
    """
    device = next(iter(columns.values())).device
    for indices in sampler:
        rows = to_device(torch.tensor(indices), device)
        yield {name: column[rows] for name, column in columns.items()}


class _ReadingProcess(multiprocessing.Process):
    """A process that ignores SIGTERM (see `ignore_stopping`) and is still ended by its data loader."""

    terminate = multiprocessing.Process.kill


class _ReadingContext(multiprocessing.context.BaseContext):
    Process = _ReadingProcess

    @property
    def _name(self) -> str:  # what a context says its start method is
        return multiprocessing.get_start_method()


def ignore_stopping(worker: int) -> None:
    """`worker_init_fn` of a loader that training reads from: its processes end when training ends, not before.

    torchrun and schedulers send SIGTERM, and terminals SIGINT, to all processes of a group. Training then still
    finishes its step, for which it needs what they read.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def training_loader(dataset: Dataset, num_workers: int, device: torch.device, **settings: Any) -> DataLoader:
    """The data loader that training reads from: its processes outlive what stops training, and drawing for it leaves
    the global random state alone, without which resuming would differ.

    Args: `settings`: of `DataLoader`: how batches are made.
    """
    return DataLoader(
        dataset,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_stopping,
        multiprocessing_context=_ReadingContext() if num_workers else None,
        generator=torch.Generator(),
        **settings,
    )


def read_batches(
    dataset: Dataset,
    sampler: Iterable[list[int]],
    collate: Callable[[Any], Columns],
    device: torch.device,
    num_workers: int,
) -> Iterator[Columns]:
    """Batches read from a map-style data set, by `num_workers` processes ahead of time, then moved to the device.

    Args: `collate`: what `dataset.__getitems__(indices)` returned -> columns.
    """
    for columns in training_loader(dataset, num_workers, device, batch_sampler=sampler, collate_fn=collate):
        yield columns_to_device(columns, device)


def read_ahead(read: Callable[[Job], Result], jobs: Iterable[Job], num_threads: int) -> Iterator[Result]:
    """`read(job)` of every job, in order, threads working ahead of the consumer; with none it is done when asked for.

    For reading that leaves the interpreter alone, such as copying from mapped files: what processes read has to be
    copied once more, through shared memory.
    """
    if num_threads == 0:
        yield from map(read, jobs)
        return
    executor, pending, jobs = ThreadPoolExecutor(num_threads), deque(), iter(jobs)
    try:
        for _, job in zip(range(READ_AHEAD * num_threads), jobs, strict=False):
            pending.append(executor.submit(read, job))
        while pending:
            yield pending.popleft().result()
            for job in jobs:
                pending.append(executor.submit(read, job))
                break
    finally:
        executor.shutdown(cancel_futures=True)


def collate_images(items: list[dict[str, Any]], columns: Sequence[str] = ("image",)) -> dict[str, Any]:
    """Items of an `ImageDataset` -> {"image": uint8 (B, 3, R, R)}, or other columns of them: "label" (B,) int64, "key"
    and "caption" lists of strings."""
    values = {name: [item[name] for item in items] for name in columns}
    make = {"image": torch.stack, "label": torch.tensor}
    return {name: make.get(name, list)(column) for name, column in values.items()}


def all_images(dataset: Dataset) -> torch.Tensor:
    """Every image of an `ImageDataset`, (N, 3, R, R) uint8."""
    chunks = [range(i, min(i + 256, len(dataset))) for i in range(0, len(dataset), 256)]
    return torch.cat([collate_images(dataset.__getitems__(list(chunk)))["image"] for chunk in chunks])


def image_batches(
    dataset: Dataset,
    sampler: StepBatchSampler,
    device: torch.device,
    keep_on_device: bool | None,
    num_workers: int,
) -> Iterator[Columns]:
    """{"image": uint8 (B, 3, R, R)} batches of an `ImageDataset` on the device, where the whole set is held if it fits
    (see `fits_on_device`)."""
    if not fits_on_device(len(dataset) * 3 * dataset.resolution**2, device, keep_on_device):
        return read_batches(dataset, sampler, collate_images, device, num_workers)
    return gathered_batches({"image": all_images(dataset).to(device)}, sampler)


def plain_batches(dataset: Dataset, device: torch.device, limit: int | None = None) -> Iterator[torch.Tensor]:
    """The images of an `ImageDataset` in order, (B, 3, R, R) in [-1, 1].

    Args: `limit`: so many images at most, spread over the whole set.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    chosen = [k * len(dataset) // count for k in range(count)]
    for start in range(0, count, PLAIN_BATCH):
        items = dataset.__getitems__(chosen[start : start + PLAIN_BATCH])
        yield from_uint8(collate_images(items)["image"].to(device))
