"""How far MIND and the Fréchet distance scatter at N images, and how well they tell two sets of images apart.

    python benchmarks/mind_spread.py --output benchmarks/results/mind_spread_openmoji.json

    python pipelines/generate.py --pipeline weights/openmoji-128 --num_images 13400 --output plain
    python pipelines/generate.py --pipeline weights/openmoji-128 --num_images 13400 --guidance_scale 2.5 \\
        --output guided
    python benchmarks/mind_spread.py --reference guided --images plain --device cuda \\
        --output benchmarks/results/mind_spread_pipeline.json

The reference is OpenMoji's pictures or a folder of images. They are split at random into two halves: N random images
of one half are the reference, N of the other the real images. N of --images are compared with the same reference;
without --images they are the real ones at half the resolution, enlarged again, a small fault that a metric should
notice. A row holds, over repetitions of such subsets, mean and standard deviation of the distance of real images and
of the others, and

    separation = (mean of the others - mean of real ones) / root of the mean of both variances

which does not depend on the scale of a distance: the larger it is, the fewer images are needed. Subsets of one half
share images, more of them at larger N, which makes deviations too small by about the root of 1 - N / (images of the
half); they are corrected for it. N is at most 3/4 of a half: 1,416 of OpenMoji's 3,778 pictures; larger N are left out
and named. The last commands compare a pipeline with and without guidance, with as many samples as wanted;
results/mind_spread_pipeline.json is of the weights of commit be4752e, today's give other numbers.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from vtp_diffusion.data.image_datasets import DataConfig
from vtp_diffusion.data.images import from_uint8, to_uint8
from vtp_diffusion.evaluation.sources import FolderImages, ImageSource, image_batches, open_reference
from vtp_diffusion.metrics.features import Extractor
from vtp_diffusion.metrics.frechet import GaussianStatistics, frechet_distance
from vtp_diffusion.metrics.mind import PROJECTIONS, sliced_distance
from vtp_diffusion.metrics.networks import feature_network
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.disk import write_json

Images = tuple[ImageSource, list[int]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", default="openmoji", help="openmoji, or a folder of images")
    parser.add_argument("--images", type=Path, help="folder of images to tell from the reference")
    parser.add_argument("--resolution", type=int, default=128, help="side that the reference is cropped to")
    parser.add_argument("--feature_network", default="efficientnet_lite0", help="as of eval/generation.py")
    parser.add_argument("--weights", help="its file")
    parser.add_argument("--sizes", type=int, nargs="+", default=[250, 500, 1000, 1400, 2500, 5000], help="N")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args(argv)
    network = feature_network(arguments.feature_network, arguments.weights)
    extractor, size = Extractor(network, arguments.device), (arguments.resolution,) * 2
    source, base, variants = open_reference(DataConfig(), arguments.reference, "all", size)
    real = features_of((source, base + variants), extractor, arguments.batch_size)
    if arguments.images is None:
        others = features_of((source, base + variants), extractor, arguments.batch_size, halved)
    else:
        folder = FolderImages(arguments.images)
        if folder.size != size:
            raise ValueError(f"{arguments.images} holds images of {folder.size}, the reference is cropped to {size}")
        others = features_of((folder, list(range(len(folder)))), extractor, arguments.batch_size)
    results = {
        "reference": arguments.reference,
        "images": "the reference at half its resolution" if arguments.images is None else arguments.images.name,
        "num_reference": len(real),
        "num_images": len(others),
        "network": network.describe(),
        "projections": PROJECTIONS,
        "repetitions": arguments.repetitions,
        "rows": measure(real, others, arguments.images is None, arguments.sizes, arguments.repetitions),
    }
    if left_out := set(arguments.sizes) - {row["N"] for row in results["rows"]}:
        print(f"left out: N of {', '.join(map(str, sorted(left_out)))}, more than 3/4 of half of the images there are")
    for row in results["rows"]:
        print(json.dumps(row))
    if arguments.output:
        write_json(arguments.output, results)


def halved(images: torch.Tensor) -> torch.Tensor:
    """uint8 images at half their resolution, enlarged again."""
    sides, options = images.shape[2:], {"mode": "bilinear", "antialias": True}
    small = interpolate(from_uint8(images), (sides[0] // 2, sides[1] // 2), **options)
    return to_uint8(interpolate(small, sides, **options))


def features_of(
    images: Images, extractor: Extractor, batch_size: int, change: Callable = lambda images: images
) -> torch.Tensor:
    """(N, D) on the device."""
    batches = image_batches(*images, batch_size)
    return torch.cat([extractor(change(batch))["features"] for batch in batches])


def measure(real: torch.Tensor, others: torch.Tensor, paired: bool, sizes: list[int], repetitions: int) -> list[dict]:
    """A row for every N that the halves hold and every distance.

    Args:
        paired: `others` are changed copies of `real`: none is compared with its own original.
    """
    order = np.random.default_rng(0).permutation(len(real))
    first, second = order[: len(real) // 2], order[len(real) // 2 :]
    pool = second if paired else np.arange(len(others))
    rows = []
    for size in (size for size in sizes if size <= 0.75 * min(len(first), len(second), len(pool))):
        found: dict[str, list[tuple[float, float]]] = {"MIND": [], "FD": []}
        for repetition in range(repetitions):
            generator = np.random.default_rng([1, size, repetition])
            reference, held_out = (real[generator.choice(half, size, replace=False)] for half in (first, second))
            changed = others[generator.choice(pool, size, replace=False)]
            pair = (held_out, changed)
            found["MIND"].append(tuple(sliced_distance(x, reference, repetition, groups=0).value for x in pair))
            statistics = GaussianStatistics.of(reference, device=real.device)
            found["FD"].append(
                tuple(frechet_distance(statistics, GaussianStatistics.of(x, device=real.device)) for x in pair)
            )
        shared = (1 - size / min(len(first), len(second), len(pool))) ** 0.5
        rows += [row(name, size, np.array(values), shared) for name, values in found.items()]
    return rows


def row(distance: str, size: int, values: np.ndarray, shared: float) -> dict:
    """Values (repetitions, 2) of real images and of the others."""
    (real, others), deviations = values.mean(0), values.std(0, ddof=1) / shared
    return {
        "distance": distance,
        "N": size,
        "real": round(real, 5),
        "real_deviation": round(deviations[0], 5),
        "images": round(others, 5),
        "images_deviation": round(deviations[1], 5),
        "relative_deviation": round(deviations[1] / others, 4),
        "separation": round((others - real) / np.sqrt(np.square(deviations).mean()), 2),
    }


if __name__ == "__main__":
    run(main)
