"""Batches on the device: the order of samples, gathering or reading them ahead, and augmentation."""

import math
import multiprocessing
import multiprocessing.context
import signal
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from ..runtime.config import Settings, setting
from ..runtime.reproducibility import step_positions
from .images import from_uint8, to_device

# A data set up to these sizes is held on the device unless the configuration says otherwise. Models, activations and
# other users of the machine need the rest.
DEVICE_SHARE = 0.25  # of an accelerator's memory
HOST_BYTES = 2**30  # if the device is the CPU
PLAIN_BATCH = 64  # images per batch outside training

READ_AHEAD = 2  # batches per thread
NUM_DRAWS = 9  # uniform random numbers per image for `augment_images`

Columns = dict[str, torch.Tensor]
Job, Result, Value = TypeVar("Job"), TypeVar("Result"), TypeVar("Value")


class StepBatchSampler:
    """Batches of indices keyed by (seed, step): step s of process r is the same list whenever training starts.

    With gradient accumulation a step has several micro-steps; the arguments below count micro-steps. The samples of a
    step do not depend on the numbers of micro-steps and processes, as long as their product with `batch_size` stays
    the same.

    Without weights, each epoch is one random permutation of the samples. Epochs follow each other without a gap, so a
    batch may span two. With weights, every step draws with replacement, in proportion to the weights; the draw is
    stratified, so that a batch follows the proportions more closely than independent draws would.

    Args:
        num_samples: size of the data set.
        batch_size: indices per micro-step and process.
        seed: of the run.
        start_step, num_steps: iterating gives the micro-steps start_step ... start_step + num_steps - 1.
        rank, world_size: this process and the number of processes; together they read each epoch once.
        weights: (num_samples,) not negative; equal weights count as none.
        accumulation: micro-steps per step.
    Raises: ValueError: sizes that are not positive, weights of another shape, negative, not finite or all zero.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        start_step: int,
        num_steps: int,
        rank: int = 0,
        world_size: int = 1,
        weights: torch.Tensor | None = None,
        accumulation: int = 1,
    ):
        if num_samples <= 0 or batch_size <= 0 or num_steps < 0 or start_step < 0:
            raise ValueError(
                f"got {num_samples} samples, batches of {batch_size}, {num_steps} steps from {start_step}: samples "
                "and batch size must be positive, steps not negative"
            )
        if accumulation < 1:
            raise ValueError(f"got {accumulation} micro-steps a step, expected at least one")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} processes")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.start_step, self.num_steps, self.rank, self.world_size = start_step, num_steps, rank, world_size
        self.accumulation = accumulation
        self._permutation: tuple[int, np.ndarray] | None = None
        self._cumulative = None if weights is None else self._cumulate(weights)

    def _cumulate(self, weights: torch.Tensor) -> np.ndarray | None:
        values = np.asarray(weights, dtype=np.float64)
        if values.shape != (self.num_samples,):
            raise ValueError(f"weights have shape {values.shape}, expected ({self.num_samples},)")
        if not np.isfinite(values).all() or (values < 0).any() or values.sum() == 0:
            raise ValueError("weights must be finite and not negative, and not all zero")
        return None if (values == values[0]).all() else np.cumsum(values) / values.sum()

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.batch, range(self.start_step, self.start_step + self.num_steps))

    def positions(self, step: int) -> range:
        """Positions in the run of this process's samples at a micro-step, for `draw_for_positions`."""
        return step_positions(step, self.rank, self.world_size, self.batch_size)

    def batch(self, step: int) -> list[int]:
        """The indices of this process at a micro-step."""
        first = self.positions(step).start
        if self._cumulative is not None:
            total = self.batch_size * self.world_size * self.accumulation
            random = np.random.default_rng([self.seed, step // self.accumulation])
            # one draw in each of `total` equal slices of the distribution, then shuffled so that every rank sees all
            points = random.permutation((np.arange(total) + random.random(total)) / total)
            indices = np.searchsorted(self._cumulative, points, side="right").clip(max=self.num_samples - 1)
            return indices[first % total : first % total + self.batch_size].tolist()
        indices = []
        while len(indices) < self.batch_size:
            epoch, offset = divmod(first + len(indices), self.num_samples)
            indices += self._epoch(epoch)[offset : offset + self.batch_size - len(indices)].tolist()
        return indices

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._permutation is None or self._permutation[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
            self._permutation = (epoch, order)
        return self._permutation[1]


def fits_on_device(num_bytes: int, device: torch.device, choice: bool | None = None) -> bool:
    """Whether to hold a data set of that size on the device: `choice`, or if None, whether it is small enough."""
    if choice is not None:
        return choice
    if device.type == "cuda":
        return num_bytes <= DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory
    return num_bytes <= HOST_BYTES


def columns_to_device(columns: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A loader's columns (in pinned memory for a GPU) on the device; columns that are not tensors stay as they are."""
    return {
        name: column.to(device, non_blocking=True) if isinstance(column, torch.Tensor) else column
        for name, column in columns.items()
    }


def gathered_batches(columns: Columns, sampler: StepBatchSampler, device: torch.device) -> Iterator[Columns]:
    """Batches of rows of columns (N, ...). All columns are copied to the device once; after that only
    indices are, without blocking."""
    columns = columns_to_device(columns, device)
    for indices in sampler:
        rows = to_device(torch.tensor(indices), device)
        yield {name: column[rows] for name, column in columns.items()}


class _ReadingProcess(multiprocessing.Process):
    """A worker that ignores SIGTERM (see `ignore_stopping`): its data loader ends it with SIGKILL."""

    terminate = multiprocessing.Process.kill


class _ReadingContext(multiprocessing.context.BaseContext):
    Process = _ReadingProcess

    @property
    def _name(self) -> str:  # the name of a context's start method
        return multiprocessing.get_start_method()


def ignore_stopping(worker: int) -> None:
    """`worker_init_fn` that makes a loader's workers ignore SIGINT and SIGTERM.

    Terminals send SIGINT, and torchrun and schedulers SIGTERM, to all processes of a group. Training then still
    finishes its step, and needs its workers for that; they end with it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def training_loader(dataset: Dataset, num_workers: int, device: torch.device, **settings: Any) -> DataLoader:
    """The data loader for training: its workers ignore the signals that stop training, and it leaves torch's global
    random state alone, so that a resumed run draws the same numbers.

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
    """`read(job)` of every job, in order. Threads work ahead of the consumer; with 0 threads each is read on demand.

    For reading that releases the interpreter lock, such as reading files into buffers. Worker processes would need one
    more copy, through shared memory.
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


class ReusedMemory:
    """Tensors on the host whose memory is reused once nothing refers to them.

    The operating system fills new memory with zeros, page by page: about as much work as reading latents.
    """

    def __init__(self):
        self._free: list[np.ndarray] = []

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor; every call must ask for the same number of bytes."""
        memory = self._free.pop() if self._free else np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
        lent = memory[:]  # an object of its own, which the tensor and all its views keep alive
        weakref.finalize(lent, self._free.append, memory)
        return torch.from_numpy(lent).view(dtype).view(*shape)


def collate_images(items: list[dict[str, Any]], columns: Sequence[str] = ("image",)) -> dict[str, Any]:
    """Items of an `ImageDataset` -> the given columns: "image" uint8 (B, 3, R, R), "label" (B,) int64, "key" and
    "caption" lists of strings."""
    values = {name: [item[name] for item in items] for name in columns}
    make = {"image": torch.stack, "label": torch.tensor}
    return {name: make.get(name, list)(column) for name, column in values.items()}


class ReadableBatches(Dataset):
    """Batches of an `ImageDataset` in which no image is replaced by another one.

    An item, by a sequence of indices, is the places of the images that can be read, and pixels, uint8 (B, 3, R, R).
    The first that can be read stands in for those that cannot, so that batches keep their size: an encoder would be
    compiled again for another one. Without a readable image there are no pixels.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, indices: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        items = [self.dataset.item_or_none(index) for index in indices]
        places = [place for place, item in enumerate(items) if item is not None]
        if not places:
            return places, torch.empty(0, dtype=torch.uint8)
        return places, torch.stack([(item or items[places[0]])["image"] for item in items])


def spread_evenly(values: Sequence[Value], limit: int | None) -> list[Value]:
    """At most `limit` of the values (None: all), in order and spread evenly over them, the first one included."""
    count = len(values) if limit is None else min(limit, len(values))
    return [values[k * len(values) // count] for k in range(count)]


def all_columns(dataset: Dataset, collate: Callable[[Any], Columns]) -> Columns:
    """What `collate` makes of all items of an `ImageDataset`, as of `read_batches`.

    With `skip_unreadable` an item can be another image, so that all columns have to come from the items themselves.
    """
    indices = range(len(dataset))
    parts = [collate(dataset.__getitems__(indices[i : i + 256])) for i in indices[::256]]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def plain_columns(
    dataset: Dataset, device: torch.device, limit: int | None = None, columns: Sequence[str] = ("image",)
) -> Iterator[dict[str, Any]]:
    """Batches of an `ImageDataset` in order: the given columns, as of `collate_images`, with images (B, 3, R, R) in
    [-1, 1] on the device.

    Args: `limit`: largest number of images, spread over the whole set.
    """
    chosen = spread_evenly(range(len(dataset)), limit)
    for start in range(0, len(chosen), PLAIN_BATCH):
        batch = collate_images(dataset.__getitems__(chosen[start : start + PLAIN_BATCH]), columns)
        yield batch | {"image": from_uint8(batch["image"].to(device))}


def plain_batches(dataset: Dataset, device: torch.device, limit: int | None = None) -> Iterator[torch.Tensor]:
    """The images alone of `plain_columns`."""
    return (batch["image"] for batch in plain_columns(dataset, device, limit))


@dataclass(kw_only=True)
class AugmentationConfig(Settings):
    """Random changes of training images, made in batches on the device; the defaults change nothing."""

    flip: float = setting(0.0, "probability of mirroring", at_least=0, at_most=1)
    shift: int = setting(0, "largest shift in whole pixels, on both axes", at_least=0)
    scale: float = setting(0.0, "scale by a factor in [1 - scale, 1 + scale]", at_least=0, below=1)
    rotation: float = setting(0.0, "largest rotation in degrees, to either side", at_least=0)
    hue: float = setting(0.0, "probability of permuting the colour channels", at_least=0, at_most=1)


UNCHANGED = AugmentationConfig()


def augment_images(images: torch.Tensor, config: AugmentationConfig, draws: torch.Tensor) -> torch.Tensor:
    """Randomly changed images, each with its own draws; pixels from outside the image are white.

    Args:
        images: (B, 3, H, W), uint8 or float in [-1, 1].
        draws: (B, NUM_DRAWS) uniform in [0, 1), on the images' device.
    Returns: (B, 3, H, W) float32 in [-1, 1].
    """
    images = from_uint8(images) if images.dtype == torch.uint8 else images.float()
    if config == UNCHANGED:
        return images
    if draws.shape != (len(images), NUM_DRAWS):
        raise ValueError(f"draws have shape {tuple(draws.shape)}, expected {(len(images), NUM_DRAWS)}")
    flip, tint, angle, scale, shift_x, shift_y = draws[:, :6].unbind(1)  # (B,)
    if config.hue > 0:
        order = torch.where(tint[:, None] < config.hue, draws[:, 6:].argsort(1), torch.arange(3, device=images.device))
        images = images.gather(1, order[:, :, None, None].expand_as(images))
    if config.shift > 0 or config.scale > 0 or config.rotation > 0:
        steps = 2 * config.shift + 1
        images = _affine(
            images,
            angle=(2 * angle - 1) * math.radians(config.rotation),
            scale=1 + (2 * scale - 1) * config.scale,
            shift_x=(shift_x * steps).floor() - config.shift,
            shift_y=(shift_y * steps).floor() - config.shift,
        )
    if config.flip > 0:
        images = torch.where((flip < config.flip)[:, None, None, None], images.flip(3), images)
    return images


def _affine(images, angle, scale, shift_x, shift_y) -> torch.Tensor:
    """(B, 3, H, W) rotated (radians) and scaled about the centre, then shifted (pixels), each by its own (B,)."""
    height, width = images.shape[2:]
    # affine_grid maps output to input coordinates, so this is the inverse; they run from -1 to 1 on either axis
    cos, sin = angle.cos() / scale, angle.sin() / scale
    back_x, back_y = cos * shift_x - sin * shift_y, sin * shift_x + cos * shift_y
    rows = [cos, -sin * height / width, -2 * back_x / width, sin * width / height, cos, -2 * back_y / height]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    # grid_sample pads with zeros: subtracting 1 makes white zero
    return F.grid_sample(images - 1, grid, align_corners=False) + 1
