"""Images a second through Inception, this package's against torch-fidelity's, from PNG files and from tensors.

    python benchmarks/feature_extraction.py --device cuda --num_workers 28 --seconds 220 \\
        --output benchmarks/results/feature_extraction_h100.json

    python benchmarks/feature_extraction.py --device cpu --num_files 8 --num_tensors 8 --size 64 --batch_size 4 \\
        --num_workers 0 --seconds 600

Both sides run one after the other in one process, on the same images, with TensorFloat-32 off ("exact" and the peer);
"fast" is float16 inside the network. The peer runs as in its `calculate_metrics`: a loader of four processes, batches
of 64. A row is one pass over the given number of images, from the start of its reading processes to the last feature
on the CPU; choosing cuDNN's algorithms and compiling come before it and have rows of their own. The rows:

    torch-fidelity            features and logits
    exact, fast               features, spatial features and logits: compiled, as `eval/generation.py --compile` does
    ... record                what `eval/generation.py` does with an image: the same, hashes, statistics, kept features
    reading                   files to batches in pinned memory: no network can be faster

After --seconds no further group of rows is started, and the missing ones are named. Every row is printed, and the JSON
written, as soon as it is measured.

The ceiling is the rate of plain matrix products in each precision divided by the operations of one image. Winograd's
3x3 convolutions save multiplications and may exceed it. Weights are random unless given, which changes no speed. What
the modes cost in accuracy is how far features lie from those computed in float64 (of 64 images) and from the peer's,
relative to their spread, and the FID between two sets of tensors in both modes; that needs real weights. Files beyond
1,024 are links to the first ones, but each is read and decoded.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from vtp_diffusion.evaluation.measurement import wanted_outputs
from vtp_diffusion.evaluation.one_pass import record_images
from vtp_diffusion.evaluation.sources import FolderImages, ImageSource, hashed_batches, image_batches
from vtp_diffusion.metrics.features import Extractor
from vtp_diffusion.metrics.frechet import GaussianStatistics, frechet_distance
from vtp_diffusion.metrics.inception import InceptionFeatures, save_random_inception
from vtp_diffusion.runtime.disk import write_json
from vtp_diffusion.runtime.processes import reading_processes
from vtp_diffusion.runtime.reproducibility import exact_float32

PEER_BATCH_SIZE = 64  # torch-fidelity's default
DISTINCT_FILES = 1024
PRODUCT_SIDE = 8192  # of the matrices of the ceiling on a GPU


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="torch device")
    parser.add_argument("--num_files", type=int, default=50000, help="PNG files, as many as of an FID-50K")
    parser.add_argument("--num_tensors", type=int, default=4096, help="tensors of each of the two sets")
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("--batch_size", type=int, default=256, help="of this package")
    parser.add_argument("--num_workers", type=int, default=reading_processes(), help="of this package")
    parser.add_argument("--weights", type=Path, help="torch-fidelity's file of Inception; random ones if not given")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="on a GPU if not given")
    parser.add_argument("--seconds", type=float, default=90, help="after which no other group of rows is begun")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args(argv)
    for name in ("num_files", "num_tensors", "size", "batch_size"):
        if getattr(arguments, name) < 2:
            raise ValueError(f"--{name} must be at least 2, got {getattr(arguments, name)}")
    if arguments.compile is None:
        arguments.compile = arguments.device.startswith("cuda")
    with tempfile.TemporaryDirectory() as folder:
        Benchmark(arguments, Path(folder), start).run()


class TensorImages(Dataset):
    """Tensors (N, 3, H, W) in memory, as torch-fidelity and `image_batches` take images."""

    settings = None

    def __init__(self, images: torch.Tensor):
        self.images, self.size = images, tuple(images.shape[2:])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        return self.images[indices[0] : indices[-1] + 1]


class Benchmark:
    """Measures row after row, and writes all there are after each.

    Args:
        folder: for files of images and of random weights.
        start: time when the program began.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path, start: float):
        self.arguments, self.folder, self.start = arguments, folder, start
        self.device = torch.device(arguments.device)
        self.cuda = self.device.type == "cuda"
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k != "output"}
        self.results: dict[str, Any] = {
            "device": torch.cuda.get_device_name(self.device) if self.cuda else "cpu",
            "torch": torch.__version__,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "settings": settings,
            "weights": "random" if arguments.weights is None else arguments.weights.name,
            "rows": [],
            "seconds_before": {},
            "not_run": [],
        }
        self.distances: dict[str, float] = {}

    def run(self) -> None:
        self.prepare()
        with exact_float32():
            self.measure_peer()
        kind = "compiled" if self.arguments.compile else "eager"
        groups: dict[str, Callable[[], None]] = {
            f"exact, {kind}": lambda: self.measure_mode("exact"),
            f"fast, {kind}": lambda: self.measure_mode("fast"),
            "reading": self.measure_reading,
            "ceiling": self.measure_ceiling,
        }
        for name, measure in groups.items():
            if time.perf_counter() - self.start > self.arguments.seconds:
                self.results["not_run"].append(name)
                print(f"not run, --seconds {self.arguments.seconds:g} are over: {name}", flush=True)
            else:
                measure()
        self.write()

    def prepare(self) -> None:
        """Images and weights."""
        count, size = self.arguments.num_tensors, self.arguments.size
        seconds, sets = timed(lambda: [textures(count, size, seed, self.device) for seed in (0, 1)])
        self.first, self.second = map(TensorImages, sets)
        self.before("making images", seconds)
        seconds, _ = timed(lambda: save_png(self.first.images, self.arguments.num_files, self.folder / "png"))
        self.before("writing files", seconds)
        seconds, self.files = timed(lambda: FolderImages(self.folder / "png"))
        self.before("opening the folder", seconds)
        self.weights = self.arguments.weights or save_random_inception(self.folder / "random.pth", seed=0)

    def measure_peer(self) -> None:
        """Rates of torch-fidelity and its features."""
        from torch_fidelity.datasets import ImagesPathDataset, TransformPILtoRGBTensor
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        from torch_fidelity.utils import get_featuresdict_from_dataset

        layers = ["2048", "logits_unbiased"]
        weights = {"feature_extractor_weights_path": str(self.weights)}
        model = FeatureExtractorInceptionV3("peer", layers, **weights).to(self.device)
        files = [str(file) for file in self.files.files]

        def extract_theirs(dataset: Dataset) -> torch.Tensor:
            options = (PEER_BATCH_SIZE, self.cuda, not self.cuda, False)
            return get_featuresdict_from_dataset(dataset, model, *options)["2048"]

        first = TensorImages(self.first.images[:PEER_BATCH_SIZE])
        self.before("torch-fidelity's first batch", timed(lambda: extract_theirs(first))[0])
        dataset = ImagesPathDataset(files, TransformPILtoRGBTensor())
        self.row("png, torch-fidelity", len(dataset), timed(lambda: extract_theirs(dataset))[0])
        seconds, self.peer = timed(lambda: extract_theirs(self.first))
        self.row("tensors, torch-fidelity", len(self.first), seconds)
        model.feature_extractor_internal_dtype = torch.float64  # its constructor takes "float64" for float32
        model.double()
        with torch.inference_mode():
            seconds, self.precise = timed(lambda: model(first.images.to(self.device))[0].double().cpu())
        self.before("features in float64", seconds)
        self.compare("torch-fidelity", self.peer)

    def measure_mode(self, mode: str) -> None:
        """As evaluation runs, with what the mode does to features and to an FID."""
        kind = "compiled" if self.arguments.compile else "eager"
        extractor = self.extractor(f"{mode}, {kind}", mode, compile=self.arguments.compile)
        seconds, found = timed(lambda: extract(extractor, self.batches(self.first)))
        self.row(f"tensors, {mode}", len(self.first), seconds)
        seconds, _ = timed(lambda: extract(extractor, self.batches(self.files)))
        self.row(f"png, {mode}", len(self.files), seconds)
        seconds, _ = timed(lambda: self.record(extractor))
        self.row(f"png, {mode}, record", len(self.files), seconds)
        other = extract(extractor, self.batches(self.second))
        pair = [GaussianStatistics.of(x, device=self.device) for x in (found, other)]
        seconds, self.distances[mode] = timed(lambda: frechet_distance(*pair))
        self.before(f"distance of {mode} features", seconds)
        self.compare(mode, found)
        self.results["fid"] = self.distances
        if len(self.distances) == 2:
            self.results["fid_difference_of_fast_mode"] = self.distances["fast"] - self.distances["exact"]
        self.write()

    def compare(self, name: str, found: torch.Tensor) -> None:
        """How far features of the first set lie from the peer's and from those of float64."""
        for other, features in (("torch-fidelity", self.peer), ("float64", self.precise)):
            spread = (features - features.mean(0)).norm()
            difference = ((found[: len(features)] - features).norm() / spread).item()
            self.results.setdefault(f"difference_to_{other}_by_spread", {})[name] = difference

    def measure_reading(self) -> None:
        for name, hashed in (("png, reading", False), ("png, reading and hashing", True)):
            seconds, _ = timed(lambda h=hashed: [None for _ in self.batches(self.files, h)])
            self.row(name, len(self.files), seconds)

    def measure_ceiling(self) -> None:
        network = InceptionFeatures(self.weights)
        image = torch.zeros(1, 3, self.arguments.size, self.arguments.size, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            network(image)
        flops = counter.get_total_flops()
        ceiling: dict[str, Any] = {"flops_an_image": flops}
        side = PRODUCT_SIDE if self.cuda else 1024
        kinds = [("float32", torch.float32)]
        if self.cuda:  # no CPU program is made for float16
            kinds.append(("float16", torch.float16))
        for name, dtype in kinds:
            rate = product_flops(side, dtype, self.device)
            ceiling[name] = {"flops_a_second": rate, "images_per_second": round(rate / flops, 1)}
        self.results["ceiling"] = ceiling
        print(f"ceiling: {json.dumps(ceiling)}", flush=True)
        self.write()

    def extractor(self, name: str, mode: str, **options) -> Extractor:
        """Ready: compiled, and its algorithms chosen."""
        torch.compiler.reset()  # else an earlier program serves again, whatever the inductor's settings are now
        size = self.arguments.batch_size
        extractor = Extractor(InceptionFeatures(self.weights), self.device, mode, batch_size=size, **options)
        self.before(f"first batch, {name}", timed(lambda: extract(extractor, [self.first.images[:size]]))[0])
        rest = len(self.first) % size
        if rest and not options["compile"]:  # a batch of another size is another choice
            extract(extractor, [self.first.images[-rest:]])
        return extractor

    def batches(self, source: ImageSource, hashed: bool = False) -> Iterator:
        """As evaluation reads them. Tensors lie in memory: processes could only copy them."""
        workers = 0 if isinstance(source, TensorImages) else self.arguments.num_workers
        read = hashed_batches if hashed else image_batches
        return read(source, range(len(source)), self.arguments.batch_size, workers, self.cuda)

    def record(self, extractor: Extractor) -> None:
        """What `eval/generation.py` does with generated images."""
        count, step = len(self.files), self.arguments.batch_size
        places = (range(k, min(k + step, count)) for k in range(0, count, step))
        passing = ((place, *batch) for place, batch in zip(places, self.batches(self.files, True), strict=True))
        wanted = {"inception": wanted_outputs(extractor.network, "generated")}
        record_images(passing, count, {"inception": extractor}, wanted, seed=0)

    def before(self, what: str, seconds: float) -> None:
        """What precedes rows, and is in none."""
        self.results["seconds_before"][what] = round(seconds, 2)
        print(f"{what}: {seconds:.2f} s", flush=True)

    def row(self, name: str, count: int, seconds: float) -> None:
        row = {"name": name, "images": count, "seconds": round(seconds, 6), "images_per_second": count / seconds}
        peer = f"{name.partition(',')[0]}, torch-fidelity"
        for other in self.results["rows"]:
            if other["name"] == peer and "reading" not in name:
                row["ratio_to_torch_fidelity"] = row["images_per_second"] / other["images_per_second"]
        self.results["rows"].append(row)
        ratio = f", {row['ratio_to_torch_fidelity']:.2f} x torch-fidelity" if "ratio_to_torch_fidelity" in row else ""
        print(f"{name}: {row['images_per_second']:.1f} images/s ({count} images){ratio}", flush=True)
        self.write()

    def write(self) -> None:
        self.results["seconds_in_all"] = round(time.perf_counter() - self.start, 1)
        if self.arguments.output:
            write_json(self.arguments.output, self.results)


def extract(extractor: Extractor, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """All three outputs are computed, the features (N, 2048) kept, on the CPU."""
    return torch.cat([extractor(batch)["features"] for batch in batches]).cpu()


def timed(call: Callable) -> tuple[float, Any]:
    """Seconds, and what a call returned; its result is on the CPU, so the device has finished."""
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def product_flops(side: int, dtype: torch.dtype, device: torch.device, repeats: int = 10) -> float:
    """FLOP/s of square matrix products."""
    x = torch.randn(side, side, device=device).to(dtype)

    def multiply(times: int) -> None:
        for _ in range(times):
            y = x @ x
        y[0, 0].item()  # waits

    with exact_float32():
        multiply(2)
        seconds, _ = timed(lambda: multiply(repeats))
    return 2 * side**3 * repeats / seconds


def textures(count: int, size: int, seed: int, device: torch.device) -> torch.Tensor:
    """uint8 (N, 3, size, size) on the CPU, made on the device: noise of several sizes, which PNG compresses about as
    badly as photographs."""
    generator = torch.Generator(device).manual_seed(seed)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for chunk in images.split(256):
        total = torch.full((len(chunk), 3, size, size), 128.0, device=device)
        for side, weight in ((4, 60.0), (16, 30.0 + 10 * seed), (size, 6.0)):
            noise = torch.randn(len(chunk), 3, side, side, generator=generator, device=device)
            total += weight * (noise if side == size else interpolate(noise, (size, size), mode="bilinear"))
        chunk.copy_(total.clamp_(0, 255))
    return images


def save_png(images: torch.Tensor, count: int, folder: Path) -> None:
    """`count` files, of which the first 1,024 at most are made and the others linked to them."""
    folder.mkdir()
    distinct = min(count, len(images), DISTINCT_FILES)
    pixels = images[:distinct].permute(0, 2, 3, 1).contiguous().numpy()

    def save(k: int) -> None:
        Image.fromarray(pixels[k]).save(folder / f"{k:06d}.png")

    with ThreadPoolExecutor() as pool:
        list(pool.map(save, range(distinct)))
    for k in range(distinct, count):
        os.link(folder / f"{k % distinct:06d}.png", folder / f"{k:06d}.png")


if __name__ == "__main__":
    main()
