r"""Images a second of train_dit/extract_latents.py as a whole, from JPEG files, and what limits it.

    timeout 300 python benchmarks/extraction_program.py --output benchmarks/results/extraction_program_h100.json
    python benchmarks/extraction_program.py --output extraction.json --tiny true --num_workers 1    # a CPU

VTP-Large of random weights, 256 pixels, JPEGs of about 500 x 400 in folders of classes: 200 different ones, textured
so that they have 40 to 110 KB as ImageNet's do, and links to them. An image is encoded twice, the second time
mirrored; every rate here is of images, not of latents. The program is started as its documentation says, with bf16 and
--compile, and has one size of batch, so that it compiles once. Rates, in the order measured:

- program: `steady`, of the second half of the images, by the times of its progress bar, when what the workers read
  ahead while it compiled is used up; `altogether`, from its start to its end. `gpu_busy` is the mean of what
  nvidia-smi calls utilisation in the steady part: the share of time in which any kernel ran
- reading: the same images, decoded, cropped and batched by the same code with as many workers, and not used
- nvjpeg: torchvision's decoder on the GPU, batches of files in memory, without cropping
- encoder: compiled, on batches that are in pinned memory, latents back: by latent_extraction.py

`limit` is the slower one of reading and encoder, and `of_limit` the program's steady rate beside it.
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import latent_extraction
import numpy as np
import torch
from launching import LOOK_SECONDS, ROOT, device_name, end_by_exception, environment_alone, run_and_look, written
from PIL import Image
from torch.utils.data import DataLoader

import vtp_diffusion.data.image_datasets as data
from vtp_diffusion.data.image_datasets import DataConfig, open_dataset
from vtp_diffusion.models.latent_space import encode_raw
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, write_results
from vtp_diffusion.training.compilation import compile_modules

PROGRAM = ROOT / "train_dit" / "extract_latents.py"
DIFFERENT = 200  # images; the others are links to them
CLASSES = 10
RESOLUTION = 256
UTILISATION = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-i"]


@dataclass(kw_only=True)
class BenchmarkConfig(Settings):
    output: str = setting(help="FILE.json for the results")
    images: int = setting(24_576, "JPEG files; whole shards of 4,096", at_least=1)
    batch_size: int = setting(128, "images encoded at a time", at_least=1)
    num_workers: int = setting(os.cpu_count(), "processes that read images", at_least=1)
    tiny: bool = setting(False, "64 images, one at a time, and a tiny VTP, to try the benchmark itself")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_output(self.output)
        if self.tiny:
            self.images, self.batch_size = 64, 1
        if self.images % (2 * self.shard) or self.shard % self.batch_size:
            raise ValueError(
                f"images is {self.images} and batch_size {self.batch_size}, expected a multiple of {2 * self.shard} "
                f"and a divisor of {self.shard}: a smaller last batch would be compiled by itself"
            )

    @property
    def shard(self) -> int:
        return 32 if self.tiny else 4096

    @property
    def sizes(self) -> SimpleNamespace:
        """What latent_extraction.py takes."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        size = {"size": "tiny" if self.tiny else "large", "resolution": RESOLUTION}
        return SimpleNamespace(**size, batch_size=self.batch_size, repeats=3 if self.tiny else 15, device=device)


def write_jpeg(folder: Path, number: int) -> int:
    """A picture of noise at four scales, its bytes. What is finest decides how large the file is."""
    random = np.random.default_rng(number)
    width, height = (500, 400) if number % 4 else (375, 500)
    picture = np.zeros((height, width, 3), np.float32)
    for scale, strength in ((64, 70), (16, 30), (4, 16), (1, random.uniform(4, 20))):
        noise = random.normal(0, strength, (-(-height // scale), -(-width // scale), 3)).clip(-127, 127) + 128
        noise = Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        picture += np.asarray(noise, np.float32) - 128
    path = folder / f"{number % CLASSES}" / f"{number:06d}.jpg"
    Image.fromarray((picture + 128).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return path.stat().st_size


def make_images(folder: Path, count: int) -> list[int]:
    """JPEGs in folders of classes. Returns the bytes of the different ones."""
    for label in range(CLASSES):
        (folder / f"{label}").mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        sizes = list(pool.map(partial(write_jpeg, folder), range(min(count, DIFFERENT)), chunksize=4))
    for number in range(DIFFERENT, count):
        first = number % DIFFERENT  # of the same class, as DIFFERENT is a multiple of CLASSES
        os.link(
            folder / f"{first % CLASSES}" / f"{first:06d}.jpg", folder / f"{number % CLASSES}" / f"{number:06d}.jpg"
        )
    return sizes


class Utilisation:
    """What nvidia-smi says of the GPU, every fifth of a second while this is entered: (time, percent) each."""

    def __init__(self):
        self.samples: list[tuple[float, float]] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.go_on_looking, daemon=True)

    def look(self) -> None:
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        said = subprocess.run([*UTILISATION, gpu], capture_output=True, text=True, check=True)
        self.samples.append((time.perf_counter(), float(said.stdout)))

    def go_on_looking(self) -> None:
        while not self.over.wait(0.2):
            self.look()

    def __enter__(self) -> "Utilisation":
        if torch.cuda.is_available():
            self.look()  # what fails, fails here
            self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        if self.thread.ident is not None:
            self.thread.join()

    def mean(self, start: float, end: float) -> float | None:
        """The share of time that the GPU was busy between two times; None without a GPU."""
        between = [percent for at, percent in self.samples if start <= at <= end]
        return statistics.mean(between) / 100 if between else None


def progress(text: str) -> int:
    """How many images the last state of the program's progress bar counts."""
    counts = re.findall(r"encoding: +\d+%\|[^|]*\| (\d+)/", text)
    return int(counts[-1]) if counts else 0


def steady_part(seen: list[tuple[float, int]], count: int) -> tuple[float, float, float]:
    """Images a second of the second half of the images, when it began and when it ended.

    Args: `seen`: (time, images so far), each count once, rising.
    """
    start, first = next((at, images) for at, images in seen if images >= count / 2)
    end, last = next((at, images) for at, images in seen if images == count)
    return (last - first) / (end - start), start, end


def run_program(config: BenchmarkConfig, folder: Path, environment: dict[str, str]) -> dict:
    """Rates of the program and the share of time that the GPU was busy."""
    on_gpu = torch.cuda.is_available()
    words = [f"--vae={folder / 'vae'}", f"--output_dir={folder / 'latents'}", f"--data.source={folder / 'images'}"]
    words += [f"--data.resolution={RESOLUTION}", f"--shard_size={config.shard}"]
    words += [f"--batch_size={config.batch_size}", f"--num_workers={config.num_workers}"]
    words += ["--mixed_precision=bf16", "--compile=true"] if on_gpu else []
    environment = environment | {"TQDM_MININTERVAL": str(LOOK_SECONDS)}
    command, seen, start = [sys.executable, str(PROGRAM), *words], [(0.0, 0)], time.perf_counter()

    def look(errors) -> None:
        if (images := progress(written(errors))) > seen[-1][1]:
            seen.append((time.perf_counter(), images))

    with Utilisation() as gpu:
        run_and_look(look, command, environment)
        altogether = time.perf_counter() - start
    rate, begin, end = steady_part(seen, config.images)
    row = {"steady": rate, "altogether": config.images / altogether, "seconds": altogether}
    row |= {"seconds_to_first_batch": next(at for at, images in seen if images > config.batch_size) - start}
    return row | {"steady_seconds": end - begin, "gpu_busy": gpu.mean(begin, end), "options": words[3:]}


def collate(items: list[dict]) -> torch.Tensor:
    return torch.stack([item["image"] for item in items])


def reading(config: BenchmarkConfig, folder: Path) -> float:
    """Images a second of decoding, cropping and batching alone, after the first batch of every worker."""
    data.IN_MEMORY_BYTES = 0  # read from the files, as a set that does not fit is
    dataset = open_dataset(DataConfig(source=str(folder / "images"), resolution=RESOLUTION))
    count, workers = min(config.images, 6 * config.batch_size * config.num_workers), config.num_workers
    batches = [range(k, k + config.batch_size) for k in range(0, count, config.batch_size)]
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
    times = []
    for _ in loader:
        times.append(time.perf_counter())
    return (len(times) - workers) * config.batch_size / (times[-1] - times[workers - 1])


def nvjpeg(config: BenchmarkConfig, folder: Path, repeats: int = 10) -> float | str:
    """Images a second that the GPU decodes, the median; or why it does not."""
    if not torch.cuda.is_available():
        return "not available: no GPU"
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError as error:
        return f"not available: {error}"
    paths = sorted((folder / "images").rglob("*.jpg"))[: config.batch_size]
    files = [torch.from_numpy(np.fromfile(path, np.uint8)) for path in paths]
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        try:
            decode_jpeg(files, mode=ImageReadMode.RGB, device="cuda")
        except RuntimeError as error:  # a torchvision that is built without it
            return f"not available: {error}"
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return len(files) / statistics.median(times[2:])


def encoder(config: BenchmarkConfig) -> float:
    """Images a second, each encoded twice, of the encoder alone."""
    sizes = config.sizes
    vae, precision = latent_extraction.build("autocast", sizes), "no"
    if sizes.device == "cuda":
        compile_modules(vae, vae._repeated_blocks)
        precision = "bf16"
    return latent_extraction.measure(latent_extraction.encoding(vae, encode_raw, sizes), precision, sizes)[0] / 2


def limit(program: float, reading: float, encoder: float) -> dict[str, float | str]:
    """Which of the two is slower, and the program's rate beside it."""
    name, rate = min(("reading", reading), ("encoder", encoder), key=lambda pair: pair[1])
    return {"limit": name, "of_limit": program / rate}


def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchmarkConfig, argv, __doc__)
    torch.set_float32_matmul_precision("high")  # as the program
    results = {"device": device_name(), "torch": torch.__version__, "cores": os.cpu_count()}

    def keep(**values) -> None:
        results.update(values)
        write_results(config.output, "extraction_program", config, results)
        print(json.dumps(values), flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = time.perf_counter()
        sizes = make_images(folder / "images", config.images)
        latent_extraction.build("autocast", config.sizes).save_pretrained(folder / "vae")
        keep(kilobytes=[min(sizes) / 1000, statistics.mean(sizes) / 1000, max(sizes) / 1000])
        keep(seconds_to_make_files=time.perf_counter() - start)
        # an empty cache for the program, which the encoder alone finds filled
        environment = environment_alone(folder / "caches")
        os.environ |= {name: value for name, value in environment.items() if name.endswith("_CACHE_DIR")}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        keep(program=run_program(config, folder, environment))
        keep(reading=reading(config, folder))
        keep(nvjpeg=nvjpeg(config, folder))
        keep(encoder=encoder(config))
    keep(**limit(results["program"]["steady"], results["reading"], results["encoder"]))
    print(f"results: {config.output}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_by_exception)
    main()
