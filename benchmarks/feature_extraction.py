"""Images a second through Inception, this package's against torch-fidelity's, from PNG files and from tensors.

    python benchmarks/feature_extraction.py --device cuda --num_images 8192 --num_workers 16 \\
        --output benchmarks/results/feature_extraction_h100.json

    python benchmarks/feature_extraction.py --device cpu --num_images 8 --size 64 --batch_size 4 --num_workers 0

Both sides run on the same machine in one process after each other, with TensorFloat-32 off ("exact" and the peer);
"fast" is float16 inside the network. The peer runs as its `calculate_metrics` does: its loader, its batch size of 64.
Beside the ratios stand how far features lie apart, and an FID of two sets of images in both modes: that difference is
what fast mode costs. Weights are random unless given, which changes no speed; the FID difference that counts is that
of the real ones.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from vtp_diffusion.metrics import Extractor, GaussianStatistics, InceptionFeatures, exact_float32, frechet_distance
from vtp_diffusion.metrics.inception import save_random_inception
from vtp_diffusion.metrics.sources import FolderImages, read_batches

PEER_BATCH_SIZE = 64  # torch-fidelity's default


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="torch device")
    parser.add_argument("--num_images", type=int, default=8192, help="images of each of the two sets")
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("--batch_size", type=int, default=256, help="of this package")
    parser.add_argument("--num_workers", type=int, default=min(16, os.cpu_count() or 1), help="of this package")
    parser.add_argument("--weights", type=Path, help="torch-fidelity's file of Inception; random ones if not given")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="on a GPU if not given")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(arguments, Path(folder))
    print(json.dumps(results, indent=2))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


def measure(arguments: argparse.Namespace, folder: Path) -> dict:
    device, count = torch.device(arguments.device), arguments.num_images
    weights = arguments.weights or save_random_inception(folder / "random.pth", seed=0)
    first, second = (textures(count, arguments.size, seed) for seed in (0, 1))
    save_png(first, folder / "png")
    with exact_float32():
        rates, peer = measure_peer(weights, folder / "png", first, device)
    compiled = device.type == "cuda" if arguments.compile is None else arguments.compile
    distances, differences, compilation = {}, {}, {}
    for mode in ("exact", "fast"):
        extractor = Extractor(InceptionFeatures(weights), device, mode, compiled, arguments.batch_size)
        compilation[mode], _ = timed(lambda e=extractor: extract(e, [first[: arguments.batch_size]]))
        source = FolderImages(folder / "png")
        options = (arguments.batch_size, arguments.num_workers, device.type == "cuda")
        seconds, found = timed(
            lambda e=extractor, s=source, o=options: extract(e, read_batches(s, list(range(count)), *o))
        )
        rates[f"png, {mode}"] = count / seconds
        seconds, _ = timed(lambda e=extractor: extract(e, first.split(arguments.batch_size)))
        rates[f"tensors, {mode}"] = count / seconds
        other = extract(extractor, second.split(arguments.batch_size))
        distances[mode] = frechet_distance(*(GaussianStatistics.of(x, device=device) for x in (found, other)))
        differences[mode] = ((found - peer).norm() / (peer - peer.mean(0)).norm()).item()
    ours = {name: rate for name, rate in rates.items() if "torch-fidelity" not in name}
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k != "output"},
        "weights": "random" if arguments.weights is None else arguments.weights.name,
        "compiled": compiled,
        "seconds_of_first_batch": {mode: round(seconds, 2) for mode, seconds in compilation.items()},
        "images_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "ratio_to_torch_fidelity": {
            name: round(rate / rates[f"{name.partition(',')[0]}, torch-fidelity"], 2) for name, rate in ours.items()
        },
        "difference_of_features_to_their_spread": differences,
        "fid": distances,
        "fid_difference_of_fast_mode": distances["fast"] - distances["exact"],
    }


def extract(extractor: Extractor, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """All three outputs are computed, the features (N, 2048) kept, on the CPU."""
    return torch.cat([extractor(batch)["features"] for batch in batches]).cpu()


class Tensors(Dataset):
    """What torch-fidelity takes tensors as."""

    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def measure_peer(weights: Path, folder: Path, images: torch.Tensor, device: torch.device) -> tuple[dict, torch.Tensor]:
    """Rates of torch-fidelity and its features."""
    from torch_fidelity.datasets import ImagesPathDataset, TransformPILtoRGBTensor
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.utils import get_featuresdict_from_dataset

    layers, cuda = ["2048", "logits_unbiased"], device.type == "cuda"
    model = FeatureExtractorInceptionV3("peer", layers, feature_extractor_weights_path=str(weights)).to(device)
    files = ImagesPathDataset(sorted(map(str, folder.iterdir())), TransformPILtoRGBTensor())
    rates = {}
    for name, dataset in (("png", files), ("tensors", Tensors(images))):
        # the first time is cuDNN's and the loader's
        get_featuresdict_from_dataset(Tensors(images[:PEER_BATCH_SIZE]), model, PEER_BATCH_SIZE, cuda, not cuda, False)
        seconds, found = timed(
            lambda d=dataset: get_featuresdict_from_dataset(d, model, PEER_BATCH_SIZE, cuda, not cuda, False)
        )
        rates[f"{name}, torch-fidelity"] = len(images) / seconds
    return rates, found["2048"]


def timed(call: Callable) -> tuple[float, Any]:
    """Seconds, and what a call returned; its result is on the CPU, so the device has finished."""
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def textures(count: int, size: int, seed: int) -> torch.Tensor:
    """uint8 (N, 3, size, size): noise of several sizes, which PNG compresses about as badly as photographs."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for chunk in images.split(256):
        total = torch.zeros(len(chunk), 3, size, size)
        for side, weight in ((4, 60.0), (16, 30.0 + 10 * seed), (size, 6.0)):
            noise = torch.randn(len(chunk), 3, side, side, generator=generator)
            total += weight * interpolate(noise, (size, size), mode="bilinear")
        chunk.copy_((total + 128).clamp(0, 255))
    return images


def save_png(images: torch.Tensor, folder: Path) -> None:
    folder.mkdir()

    def save(k: int) -> None:
        Image.fromarray(images[k].permute(1, 2, 0).numpy()).save(folder / f"{k:06d}.png")

    with ThreadPoolExecutor() as pool:
        list(pool.map(save, range(len(images))))


if __name__ == "__main__":
    main()
