"""What data of ImageNet's size cost on disk and CPU, extrapolated: listing, reading, shards, loading, npz.

    python benchmarks/imagenet_rehearsal.py --output benchmarks/results/imagenet_rehearsal.json
    python benchmarks/imagenet_rehearsal.py --images 100000 --latents 200000 --folder /data/rehearsal
    python benchmarks/imagenet_rehearsal.py --costs     # the table of README.md, from committed rates

A made-up data set of the given size is written to a temporary folder and removed. Each part is measured once, in one
process ("write shards" makes the random numbers too); what 1,281,167 images (2,562,334 latents with their mirror
images) would take at that rate is printed beside it, and the rate of the committed result. Files are in memory when
they are read, but for "load cold": see latent_loading.py, which repeats that and names a peer.
"""

import argparse
import io
import itertools
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from latent_loading import SHAPE, drop_from_memory, write_latents
from PIL import Image

from vtp_diffusion.data.folders import content_hashes, read_layout
from vtp_diffusion.data.image_files import center_crop, read_image
from vtp_diffusion.data.latent_shards import LatentDataset, verify_shard
from vtp_diffusion.data.npz import NpzImages, write_npz
from vtp_diffusion.runtime.disk import read_json, write_json

IMAGES, SAMPLES, PAIRS = 1_281_167, 50_000, 277_000_000
LATENTS = 2 * IMAGES
RESULTS = Path(__file__).with_name("results")
CLASSES, BATCH, LATENT_BYTES = 10, 256, 2 * SHAPE[0] * SHAPE[1] * SHAPE[2]
# part -> how many of its things the whole job has
WHOLE = {"list": IMAGES, "hash": IMAGES, "read JPEG": IMAGES, "write shards": LATENTS, "verify shards": LATENTS}
WHOLE |= {"load warm": LATENTS, "load cold": LATENTS, "write npz": SAMPLES, "read npz": SAMPLES}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5_000, help="JPEGs of 256 pixels")
    parser.add_argument("--latents", type=int, default=8_192, help="latents, half of them of mirror images")
    parser.add_argument("--npz_images", type=int, default=1_000)
    parser.add_argument("--side", type=int, default=256, help="of the JPEGs and of the images in the npz")
    parser.add_argument("--folder", type=Path, help="where all is written, on the disk to be measured")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--costs", action="store_true", help="print the table of costs and end")
    return parser.parse_args(argv)


def write_images(folder: Path, count: int, side: int) -> None:
    """JPEGs of 16 different pictures in `CLASSES` folders."""
    random, contents = np.random.default_rng(0), []
    for _ in range(16):
        coarse = Image.fromarray(random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(content := io.BytesIO(), "JPEG", quality=90)
        contents.append(content.getvalue())
    for k in range(count):
        path = folder / f"{k % CLASSES}" / f"{k:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[k % 16])


def load(dataset: LatentDataset, epoch: int) -> None:
    order = np.random.default_rng(epoch).permutation(len(dataset))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        dataset.read(rows, rows % 2 == 0)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Things a second of every part."""
    rates, images, latents, npz = {}, folder / "images", folder / "latents", folder / "images.npz"

    def timed(name: str, count: int, work: Callable[[], object]) -> object:
        start = time.perf_counter()
        result = work()
        rates[name] = count / (time.perf_counter() - start)
        return result

    write_images(images, arguments.images, arguments.side)
    pairs = timed("list", arguments.images, lambda: read_layout(images).of_split("train"))
    paths = [path for path, _ in pairs]
    timed("hash", len(paths), lambda: content_hashes(paths))
    some = paths[:1_000]
    timed("read JPEG", len(some), lambda: [center_crop(read_image(path), arguments.side) for path in some])
    latents.mkdir()
    timed("write shards", arguments.latents, lambda: write_latents(latents, arguments.latents // 2, 4))
    dataset = LatentDataset(latents)
    bounds = [0, *dataset.ends.tolist()]
    labels = [dataset.labels[first:last].tolist() for first, last in itertools.pairwise(bounds)]
    shards = list(zip(dataset.files, labels, strict=True))
    timed("verify shards", arguments.latents, lambda: [verify_shard(*shard) for shard in shards])
    timed("load warm", len(dataset), lambda: load(dataset, 0))
    drop_from_memory(dataset.files)
    timed("load cold", len(dataset), lambda: load(dataset, 1))
    size, count = (arguments.side, arguments.side), arguments.npz_images
    batch = np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    timed("write npz", count, lambda: write_npz(npz, count, size, [batch]))
    timed("read npz", count, lambda: NpzImages(npz).read(range(count)))
    return rates


def costs() -> str:
    """The table of costs, in Markdown."""

    def rate(name: str, *keys: str | int) -> float:
        value = read_json(RESULTS / f"{name}.json")
        for key in keys:
            value = value[key]
        return value

    speed = ("speed", 0, "images_per_second")
    two = rate("dit_speed_xl_two_h100", *speed) / rate("dit_speed_xl_one_h100", *speed)
    rows = (
        # what, how many, images a second of one H100, the share of twice the rate that two have, if that was measured
        ("VTP Large encodes ImageNet and its mirror images", LATENTS,
         rate("latent_extraction_h100", "images_per_second", "autocast, compiled"), None),
        ("LightningDiT-XL/1 trains for 80 epochs", 80 * IMAGES, rate("dit_speed_xl_fused_h100", *speed), two / 2),
        ("LightningDiT-XL/1 trains for 800 epochs", 800 * IMAGES, rate("dit_speed_xl_fused_h100", *speed), two / 2),
        ("50,000 samples, as the program of `sampling_h100.json`", SAMPLES,
         rate("sampling_h100", "programs", 0, "images_per_second"), None),
        ("VTP Large sees 277 million pairs once", PAIRS, rate("vtp_pretraining", "images_per_second"),
         rate("vtp_scaling_two_h100", "rows", 1, "images_per_second")
         / rate("vtp_scaling_two_h100", "rows", 0, "images_per_second") / 2),
    )  # fmt: skip
    lines = ["| work | one H100, hours | eight, hours (E) | 64, hours (E) |", "|---|---|---|---|"]
    for name, count, images, share in rows:
        hours = [count / images / 3600 / (gpus * (1 if gpus == 1 else share or 1)) for gpus in (1, 8, 64)]
        lines.append(f"| {name}{'' if share else ' (U)'} | {' | '.join(f'{value:,.2f}' for value in hours)} |")
    disk = f"Disk: latents in bfloat16 {LATENTS * LATENT_BYTES / 1e9:.0f} GB, 50,000 images of 256 pixels as npz "
    return "\n".join([*lines, "", f"{disk}{SAMPLES * 256 * 256 * 3 / 1e9:.1f} GB."])


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.costs:
        print(costs())
        return
    if arguments.latents < 8 or arguments.latents % 2:
        raise ValueError(f"--latents is {arguments.latents}, expected an even number, at least 8: half are mirrored")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rates = measure(arguments, Path(folder))
    committed = RESULTS / "imagenet_rehearsal.json"
    before = read_json(committed)["a_second"] if committed.is_file() else {}
    for name, value in rates.items():
        line = f"{name:13} {value:>10,.0f} a second: {WHOLE[name] / value / 60:>7,.1f} minutes for {WHOLE[name]:,} (E)"
        print(line + (f", {value / before[name]:.2f} x the committed rate" if name in before else ""))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of this process {peak:.2f} GiB")
    if arguments.output is not None:
        settings = {
            name: value for name, value in vars(arguments).items() if name not in ("output", "folder", "costs")
        }
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        results = {"a_second": rates, "minutes_for_all": {n: WHOLE[n] / value / 60 for n, value in rates.items()}}
        results |= {"peak_memory_gib": peak, "settings": settings, "load_average": os.getloadavg()[0], **machine}
        write_json(arguments.output, results | {"torch": torch.__version__})


if __name__ == "__main__":
    main()
