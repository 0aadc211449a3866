"""Latents a second that one process reads from files, against the target and against a loader like upstream's.

    python benchmarks/latent_loading.py --output benchmarks/results/latent_loading.json

Two cases. Warm: all shards are in the page cache. Cold: they are dropped from it before each measurement, as if
latents were larger than memory, and every row comes from the disk; "read" is the bytes read from disk divided by those
used. To limit memory instead, start this in a cgroup: `systemd-run --scope -p MemoryMax=3G ...`.

Ours is what train_dit/train.py reads with: threads reading rows into the batch. The peer does what
`ImgLatentDataset` of hustvl/LightningDiT does: it opens the shard for every sample, reads one row of one key and
normalises it, in as many worker processes. Both shuffle, both draw the mirror image half of the time, and every batch
is copied once into a waiting buffer, as it would be to a GPU. Shards of random numbers, 64 KiB a sample with its
mirror image, are written to a temporary folder first.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset

from vtp_diffusion.data.batches import StepBatchSampler
from vtp_diffusion.data.latent_shards import LatentDataset, write_shard
from vtp_diffusion.generation.latent_inputs import stored_latents
from vtp_diffusion.runtime.disk import write_json

TARGET = 20_000  # latents a second
SHAPE = (64, 16, 16)  # of VTP at 256 pixels, in bfloat16


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_samples", type=int, default=16_384, help="latents on disk")
    parser.add_argument("--num_shards", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=4, help="threads of ours, processes of the peer")
    parser.add_argument("--num_batches", type=int, default=200, help="measured, of ours")
    parser.add_argument("--peer_batches", type=int, default=20, help="measured, of the peer")
    parser.add_argument("--cold_batches", type=int, default=60, help="measured cold, of each")
    parser.add_argument("--folder", type=Path, help="where the shards are written, on the disk to be measured")
    parser.add_argument("--repeats", type=int, default=5, help="the median counts")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def write_latents(folder: Path, num_samples: int, num_shards: int) -> None:
    random = torch.Generator().manual_seed(0)
    bounds = [k * num_samples // num_shards for k in range(num_shards + 1)]
    for k, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        latents, flipped = (torch.randn(last - first, *SHAPE, generator=random).bfloat16() for _ in range(2))
        labels = torch.randint(0, 1000, (last - first,), generator=random)
        write_shard(folder / f"latents_{k:05d}.safetensors", latents, flipped, labels, first=first)


class OpenedForEverySample(Dataset):
    """The peer: one row from a file that is opened for it."""

    def __init__(self, dataset: LatentDataset):
        starts = [0, *dataset.ends.tolist()]
        self.places = [
            (path, row)
            for path, start, end in zip(dataset.files, starts, starts[1:], strict=False)
            for row in range(end - start)
        ]
        self.mean, self.std = torch.zeros(1, SHAPE[0], 1, 1), torch.ones(1, SHAPE[0], 1, 1)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path, row = self.places[index]
        with safe_open(path, framework="pt") as file:
            latents = file.get_slice("latents" if torch.rand(()) < 0.5 else "latents_flip")[row : row + 1]
            label = file.get_slice("labels")[row : row + 1]
        return ((latents - self.mean) / self.std)[0], label[0]


def rate(batches: Iterator[torch.Tensor], count: int) -> float:
    """Latents a second over `count` batches, after one that starts the workers."""
    first = next(batches)
    buffer, total = torch.empty_like(first), 0
    start = time.perf_counter()
    for _ in range(count):
        batch = next(batches)
        buffer.copy_(batch)
        total += len(batch)
    return total / (time.perf_counter() - start)


def ours(dataset: LatentDataset, arguments: argparse.Namespace, seed: int) -> Iterator[torch.Tensor]:
    sampler = StepBatchSampler(len(dataset), arguments.batch_size, seed, 0, arguments.num_batches + 1)
    for batch in stored_latents(dataset, sampler, True, torch.device("cpu"), False, arguments.workers):
        yield batch["latents"]


def peer(dataset: LatentDataset, arguments: argparse.Namespace) -> Iterator[torch.Tensor]:
    loader = DataLoader(
        OpenedForEverySample(dataset),
        batch_size=arguments.batch_size,
        shuffle=True,
        num_workers=arguments.workers,
        drop_last=True,
    )
    for latents, _ in loader:
        yield latents


def drop_from_memory(files: list[Path]) -> None:
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk() -> int:
    """So far, by this process; its children's are not in it."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def measure(arguments: argparse.Namespace, folder: Path) -> dict:
    write_latents(folder, arguments.num_samples, arguments.num_shards)
    dataset, rates, read = LatentDataset(folder), {}, []
    for path in dataset.files:
        path.read_bytes()  # into the page cache
    for repeat in range(arguments.repeats):  # in turns, so that other work on the machine meets all
        for case in ("warm", "cold"):
            for name, batches, count in (
                ("ours", lambda repeat=repeat: ours(dataset, arguments, repeat), arguments.num_batches),
                ("peer", lambda: peer(dataset, arguments), arguments.peer_batches),
            ):
                count = min(count, arguments.cold_batches) if case == "cold" else count  # each row once, as an epoch
                if case == "cold":
                    drop_from_memory(dataset.files)
                before = bytes_from_disk()
                rates.setdefault(f"{name}_{case}", []).append(rate(batches(), count))
                if (name, case) == ("ours", "cold"):
                    # threads have read ahead by then, so that this is an upper bound
                    rows = (count + 1) * arguments.batch_size * dataset.num_bytes / (2 * len(dataset))
                    read.append((bytes_from_disk() - before) / rows)
        for path in dataset.files:
            path.read_bytes()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "latents_per_second": medians,
        "all": rates,
        "ratio_to_target": {case: medians[f"ours_{case}"] / TARGET for case in ("warm", "cold")},
        "ratio_to_peer": {case: medians[f"ours_{case}"] / medians[f"peer_{case}"] for case in ("warm", "cold")},
        "read_from_disk_per_byte_used": statistics.median(read),
        "target": TARGET,
        "shape": SHAPE,
        "dtype": "bfloat16",
        **{name: value for name, value in vars(arguments).items() if name not in ("output", "folder")},
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if (arguments.peer_batches + 1) * arguments.batch_size > arguments.num_samples:
        raise ValueError(
            f"--peer_batches {arguments.peer_batches} of {arguments.batch_size} and one more do not fit into "
            f"--num_samples {arguments.num_samples}: the peer reads each once"
        )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = measure(arguments, Path(folder))
    medians, ratios, peers = (results[name] for name in ("latents_per_second", "ratio_to_target", "ratio_to_peer"))
    for case in ("warm", "cold"):
        print(
            f"{case}: {medians[f'ours_{case}']:>9,.0f} latents/s, {ratios[case]:.2f} x the target of {TARGET:,}, "
            f"{peers[case]:.1f} x the peer's {medians[f'peer_{case}']:,.0f}"
        )
    print(
        f"cold: {results['read_from_disk_per_byte_used']:.1f} bytes come from the disk for one that is used, at most"
    )
    if arguments.output is not None:
        write_json(arguments.output, results)


if __name__ == "__main__":
    main()
