"""Images a second of shards read as a stream, beside the same shards read by index through a plain DataLoader.

Shards of random JPEGs are written first, into a temporary folder. Both readers decode, crop and batch, with the same
number of worker processes. The ratio printed is stream over index: 1 means that shuffling blocks and keeping positions
cost nothing.

    python benchmarks/streaming_data.py --output benchmarks/results/streaming_data.json
"""

import argparse
import io
import json
import tempfile
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

import vtp_diffusion.data.image_datasets as data
from vtp_diffusion.data.batches import StepBatchSampler, collate_images, read_batches
from vtp_diffusion.data.image_datasets import DataConfig, open_dataset
from vtp_diffusion.data.streaming import StreamBatches, StreamingImages
from vtp_diffusion.runtime.disk import write_json

CPU = torch.device("cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--images_per_shard", type=int, default=256)
    parser.add_argument("--side", type=int, default=320, help="of the JPEGs, in pixels")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=40, help="timed, after one that is not")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), arguments)
        rates = measure(Path(folder), arguments)
    results = {"settings": {k: v for k, v in vars(arguments).items() if k != "output"}, "torch": torch.__version__}
    results |= {"datasets": datasets.__version__, "images_per_second": rates}
    results["ratio_to_index"] = {name: round(rate / rates["index"], 3) for name, rate in rates.items()}
    print(json.dumps(results, indent=2))
    if arguments.output:
        write_json(arguments.output, results)


def write_shards(folder: Path, arguments: argparse.Namespace) -> None:
    """Parquet files of JPEGs; 16 pixels of noise a side, enlarged, so that they decode as photographs do."""
    random = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for shard in range(arguments.shards):
        images = []
        for _ in range(arguments.images_per_shard):
            file = io.BytesIO()
            blocks = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            blocks.resize((arguments.side, arguments.side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            images.append({"bytes": file.getvalue(), "path": None})
        rows = {"image": images, "text": [f"picture {k}" for k in range(len(images))]}
        datasets.Dataset.from_dict(rows, features).to_parquet(str(folder / f"{shard:05d}.parquet"))


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Images a second of both readers."""
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    shared = {"source": "parquet", "data_files": str(folder / "*.parquet"), "caption_column": "text"}
    shared["resolution"] = arguments.resolution
    size, workers = arguments.batch_size, arguments.num_workers
    data.IN_MEMORY_BYTES = 0  # read by index from the files, as a set that does not fit is
    indexed = open_dataset(DataConfig(**shared))
    sampler = StepBatchSampler(len(indexed), size, 0, 0, arguments.batches + 1)
    stream = StreamingImages(DataConfig(**shared, streaming=True))
    readers = {
        "index": read_batches(indexed, sampler, collate_images, CPU, workers),
        "stream": StreamBatches(stream, size, 0, CPU, collate_images, workers),
    }
    return {name: images_per_second(batches, arguments.batches, size) for name, batches in readers.items()}


def images_per_second(batches: Iterable, count: int, batch_size: int) -> float:
    iterator = iter(batches)
    next(iterator)
    start = time.perf_counter()
    read = sum(1 for _ in islice(iterator, count))
    return round(read * batch_size / (time.perf_counter() - start), 1)


if __name__ == "__main__":
    main()
