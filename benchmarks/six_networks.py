"""Images a second through the six networks of FDr6 in one pass, against each of them alone.

    python benchmarks/six_networks.py --output benchmarks/results/six_networks_h100.json
    python benchmarks/six_networks.py --tiny --device cpu --num_images 8 --batch_size 4

What is timed is what `eval/generation.py` does with images: to the device, resized once a size, through the networks,
statistics and kept features. Images are tensors in memory, so that no disk or decoder is measured; weights are random,
which changes no speed. Two ratios say what the pass costs:

    ratio_to_slowest      images a second of all six over those of the slowest alone
    ratio_to_one_by_one   the same over 1 / (sum of the six networks' seconds per image): above 1, one pass is faster
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vtp_diffusion.evaluation.measurement import wanted_outputs
from vtp_diffusion.evaluation.one_pass import record_images
from vtp_diffusion.evaluation.sources import HASH_BYTES
from vtp_diffusion.metrics import timm_networks
from vtp_diffusion.metrics.fdr6 import SIX
from vtp_diffusion.metrics.features import Extractor, FeatureNetwork
from vtp_diffusion.metrics.inception import InceptionFeatures, save_random_inception
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.disk import write_json

TINY_VIT = {"embed_dim": 12, "depth": 1, "num_heads": 2}
TINY_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (4, 6, 8, 12)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="torch device")
    parser.add_argument("--num_images", type=int, default=1024)
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--modes", nargs="+", default=["fast", "exact"], choices=["exact", "fast"])
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--tiny", action="store_true", help="networks of a few thousand parameters, Inception whole")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    results = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "settings": settings,
        "rows": [],
    }
    shape = (arguments.num_images, 3, arguments.size, arguments.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    networks = random_networks(arguments.tiny)
    for mode in arguments.modes:
        extractors = {
            name: Extractor(network, device, mode, arguments.compile, arguments.batch_size)
            for name, network in networks.items()
        }
        rates = {name: rate({name: extractors[name]}, images, arguments.batch_size) for name in SIX}
        rates["all six"] = rate(extractors, images, arguments.batch_size)
        row = {"mode": mode, "images_per_second": {name: round(value, 2) for name, value in rates.items()}}
        row["ratio_to_slowest"] = round(rates["all six"] / min(rates[name] for name in SIX), 3)
        row["ratio_to_one_by_one"] = round(rates["all six"] * sum(1 / rates[name] for name in SIX), 3)
        results["rows"].append(row)
        print(json.dumps(row, indent=2))
        if arguments.output:
            write_json(arguments.output, results)


def random_networks(tiny: bool) -> dict[str, FeatureNetwork]:
    """The six with random weights."""
    networks: dict[str, FeatureNetwork] = {}
    with tempfile.TemporaryDirectory() as folder:
        networks["inception"] = InceptionFeatures(save_random_inception(Path(folder) / "random.pth", seed=0))
    table = timm_networks.TIMM_NETWORKS
    for name, network in list(table.items()):
        if tiny:
            table[name] = replace(network, architecture=TINY_CONVNEXT if name == "convnextv2_b" else TINY_VIT)
        networks[name] = timm_networks.TimmFeatures(name, timm_networks.timm_model(name))
        table[name] = network
    return networks


def rate(extractors: dict[str, Extractor], images: torch.Tensor, batch_size: int) -> float:
    """Images a second, after a batch that pays for compilation and cuDNN's choices."""
    seconds = 0.0
    for part in (images[:batch_size], images):
        start = time.perf_counter()
        record(extractors, part, batch_size)  # ends with features on the CPU: the device has finished
        seconds = time.perf_counter() - start
    return len(images) / seconds


def record(extractors: dict[str, Extractor], images: torch.Tensor, batch_size: int) -> None:
    places: list[Sequence[int]] = [
        range(k, min(k + batch_size, len(images))) for k in range(0, len(images), batch_size)
    ]
    batches = ((place, images[place[0] : place[-1] + 1], [bytes(HASH_BYTES)] * len(place)) for place in places)
    wanted = {name: wanted_outputs(extractor.network, "generated") for name, extractor in extractors.items()}
    record_images(batches, len(images), extractors, wanted, seed=0)


if __name__ == "__main__":
    run(main)
