r"""Programs on 1, 2 and 4 GPUs of one host in one job: rates, scaling, memory, and whether files have the same bytes.

    OMP_NUM_THREADS=8 python benchmarks/several_gpus.py --output benchmarks/results/several_gpus_h100.json
    python benchmarks/several_gpus.py --tiny true --processes 1 2 --seconds 900 --output several.json    # a CPU

First a tiny run of train_dit/train.py on all GPUs; smaller numbers of GPUs later resume it from its checkpoint. Then
all smaller numbers side by side, each on its own GPUs (`gpus` of a row; `beside`: what ran at the same time, and
where); then all GPUs together, one program after the other. `--parts` are:

- dit: train_dit/train.py, XL/1, 128 images a GPU, by dit_training.py; on all GPUs with a profile (step_profile.py)
- vtp: train_vtp/train.py, VTP Large, all objectives, by vtp_scaling.py; on one and on all GPUs. Options after `--` are
  for this program
- latents: train_dit/extract_latents.py, VTP-Large, noise of 256 px; images: pipelines/generate.py, XL/1 with it
- sharded: dit with FSDP2, on all GPUs
- resume: see above; the losses after the checkpoint are compared with those of the uninterrupted run

Weights are random. The rate of latents and images is that of the shards and parts that are written after every process
has written one; `seconds_to_first` is the time before that, with starting and compiling. `scaling` is the rate divided
by that of as many single GPUs. A row is written as soon as it is measured. A program that fails becomes a row with its
`error`, and the next one starts. After --seconds everything ends. With --keep_rows the rows of FILE.json without an
error stay and are not measured again.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import dit_training
import numpy as np
import psutil
import sampling
import torch
import vtp_scaling
from launching import ROOT, device_name, end_by_exception, program_environment, run_and_look, torchrun
from PIL import Image

from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, file_sha256, read_json, write_results
from vtp_diffusion.runtime.experiments import check_names

PARTS = ("resume", "dit", "vtp", "latents", "images", "sharded")
RESUME_STEPS = 12
SHARD = {"large": 768, "tiny": 8}  # images; a part of an npz has 256
NOISE_FILES = 512  # different ones; the others are links to them
DIT_STEPS = {"large": 36, "tiny": 6}
VTP_STEPS = {"large": 18, "tiny": 6}
EVALUATIONS = {"large": 10, "tiny": 1}


@dataclass(kw_only=True)
class BenchmarkConfig(Settings):
    output: str = setting(help="FILE.json for the results")
    processes: list[int] = setting(default_factory=lambda: [1, 2, 4], help="rising, one each GPU")
    parts: list[str] = setting(default_factory=lambda: list(PARTS), help=f"some of {', '.join(PARTS)}")
    seconds: float = setting(255.0, "after which everything ends, from when the programs start", above=0)
    keep_rows: bool = setting(False, "go on with the file that is there")
    tiny: bool = setting(False, "tiny networks, to try the benchmark itself")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_output(self.output)
        check_names("parts", self.parts, PARTS)
        if len(self.processes) < 2 or self.processes[0] != 1 or sorted(set(self.processes)) != self.processes:
            raise ValueError(f"processes is {self.processes}, expected rising numbers from 1 on, two or more")
        if sum(self.processes[:-1]) > self.processes[-1]:
            raise ValueError(f"processes is {self.processes}: the smaller ones don't fit side by side into the last")
        if torch.cuda.is_available() and self.processes[-1] > torch.cuda.device_count():
            raise ValueError(f"processes is {self.processes}, but there are {torch.cuda.device_count()} GPUs")
        if "sharded" in self.parts and not torch.cuda.is_available():
            self.parts = [part for part in self.parts if part != "sharded"]  # accelerate shards on GPUs only

    @property
    def pieces(self) -> int:
        """Of latents and of images: every process needs two, for the rate is that of the second and later ones."""
        return (2 if self.tiny else 3) * self.processes[-1]

    @property
    def size(self) -> str:
        return "tiny" if self.tiny else "large"


Lane = tuple[list[int], list[str]]  # GPUs, and the parts that are measured on them one after the other


def plan(processes: list[int], parts: list[str]) -> list[list[Lane]]:
    """What is measured: phases one after the other, of lanes side by side."""
    everything, lanes, free = list(range(processes[-1])), [], 0
    for count in processes[:-1]:
        wanted = ["dit", "latents", "images", "resume"]
        lanes.append((everything[free : free + count], [*wanted, "vtp"] if count == 1 else wanted))
        free += count
    if spare := everything[free:]:  # compiling VTP takes longest
        lanes[0] = (lanes[0][0], ["dit", "images"])
        lanes.append((spare[:1], ["vtp", "latents", "resume"]))
    phases = [[(everything, ["resume"])], lanes, [(everything, ["dit", "latents", "images", "sharded", "vtp"])]]
    return [[(gpus, [part for part in wanted if part in parts]) for gpus, wanted in lanes] for lanes in phases]


def make_files(config: BenchmarkConfig, folder: Path) -> None:
    """Latents, random weights and images for all programs but the first."""
    if not config.tiny:
        dit_training.make_data(make_folder(folder / "XL1"), "XL/1")
    if {"latents", "images"} & set(config.parts):
        sampling.make_pipeline(config.tiny).save_pretrained(folder / "pipeline")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if "latents" in config.parts:
        make_images(folder / "noise", config.pieces * SHARD[config.size])


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def make_images(folder: Path, count: int) -> None:
    """JPEGs of coarse noise, 256 x 256."""
    folder.mkdir()

    def write(number: int) -> None:
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg")

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(min(count, NOISE_FILES))))
    for number in range(NOISE_FILES, count):
        os.link(folder / f"{number % NOISE_FILES:06d}.jpg", folder / f"{number:06d}.jpg")


def dit_size(config: BenchmarkConfig) -> str:
    return "tiny" if config.tiny else "XL/1"


def measure_dit(config: BenchmarkConfig, folder: Path, gpus: list[int], strategy: str = "ddp") -> Iterator[dict]:
    size, count = dit_size(config), len(gpus)
    settings = dit_training.BenchmarkConfig(
        output=str(folder / "dit.json"),
        sizes=[size],
        processes=[count],
        strategies=[strategy],
        steps=DIT_STEPS[config.size],
        profile=count == config.processes[-1],
    )
    yield from dit_training.measure_speed(settings, folder / size.replace("/", ""), size, folder, gpus)


def measure_vtp(config: BenchmarkConfig, folder: Path, gpus: list[int], options: list[str]) -> Iterator[dict]:
    settings = vtp_scaling.BenchmarkConfig(
        output=str(folder / "vtp.json"), size=config.size, processes=[len(gpus)], steps=VTP_STEPS[config.size]
    )
    # one process alone would record CUDA graphs, which several cannot
    for row in vtp_scaling.measure(settings, ["--cuda_graphs=false", *options], gpus):
        yield {name: value for name, value in row.items() if name != "times_one"}


def measure_latents(config: BenchmarkConfig, folder: Path, gpus: list[int]) -> Iterator[dict]:
    output, on_gpu = folder / f"latents-{len(gpus)}", torch.cuda.is_available()
    words = [f"--vae={folder / 'pipeline' / 'vae'}", f"--output_dir={output}", f"--data.source={folder / 'noise'}"]
    words += ["--data.resolution=256", "--split=all", f"--shard_size={SHARD[config.size]}"]
    words += [f"--num_workers={12 if on_gpu else 0}", f"--mixed_precision={'bf16' if on_gpu else 'no'}"]
    words += [] if on_gpu else ["--batch_size=4"]
    program, files = ROOT / "train_dit" / "extract_latents.py", (output, "latents_*.safetensors")
    row = watch(program, words, gpus, files, config.pieces, SHARD[config.size])
    together = hashlib.sha256()
    for path in sorted(output.glob(files[1])):
        together.update(file_sha256(path).encode())
    yield row | {"sha256": together.hexdigest()}


def measure_images(config: BenchmarkConfig, folder: Path, gpus: list[int]) -> Iterator[dict]:
    output, part = folder / f"images-{len(gpus)}.npz", 256
    words = [f"--pipeline={folder / 'pipeline'}", f"--output={output}", f"--num_images={config.pieces * part}"]
    words += [f"--num_inference_steps={EVALUATIONS[config.size]}", "--batch_size=64"]
    files = (output.with_name(f"{output.name}.parts"), "[0-9]*.npy")
    row = watch(ROOT / "pipelines" / "generate.py", words, gpus, files, config.pieces, part)
    yield row | {"sha256": file_sha256(output)}


def watch(
    program: Path, words: list[str], gpus: list[int], files: tuple[Path, str], pieces: int, each: int
) -> dict[str, float]:
    """Run a program to its end: its seconds, and the rate at which it writes files of `each` images.

    Raises: RuntimeError with what it wrote if it fails.
    """
    (folder, pattern), command = files, torchrun(len(gpus), program, *words)
    written: dict[str, float] = {}
    start = time.time()

    def look(errors) -> None:
        for path in folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # parts are removed in the end
                written.setdefault(path.name, path.stat().st_mtime)

    run_and_look(look, command, program_environment(gpus))
    altogether, times, first = time.time() - start, sorted(written.values()), len(gpus)
    if len(times) != pieces:
        raise RuntimeError(f"{folder} had {len(times)} files {pattern}, expected {pieces}")
    rate = (pieces - first) * each / (times[-1] - times[first - 1])
    row = {"images": pieces * each, "images_per_second": rate}
    return row | {"seconds_to_first": times[0] - start, "seconds": altogether}


def measure_resume(config: BenchmarkConfig, folder: Path, gpus: list[int]) -> Iterator[dict]:
    """On all GPUs the run that others go on with; on fewer, one that goes on after its checkpoint."""
    half, count = RESUME_STEPS // 2, len(gpus)
    options = dit_training.resume_options(4 * config.processes[-1], half)
    options += dit_training.WAYS["plain"]  # kernels are made for widths of real models
    straight, output = folder / "straight", folder / f"moved-{count}"
    if count == config.processes[-1]:
        output = straight
    else:
        dit_training.as_killed_after(half, straight, output)
    data = folder / "tiny"
    lines, seconds = dit_training.train(data, "tiny", count, "ddp", RESUME_STEPS, output, *options, gpus=gpus)
    row = {"steps": RESUME_STEPS, "after_step": None if output == straight else half, "seconds": seconds}
    if output != straight:
        before = [line for line in dit_training.read_log(straight) if "loss" in line]
        row["largest_relative_loss_difference"] = dit_training.largest_difference(before, lines)
    yield row | {"losses": [line["loss"] for line in lines]}


def measure(config: BenchmarkConfig, folder: Path, part: str, gpus: list[int], options: list[str]) -> Iterator[dict]:
    """Rows of a part on these GPUs."""
    if part == "vtp":
        return measure_vtp(config, folder, gpus, options)
    if part == "sharded":
        return measure_dit(config, folder, gpus, "fsdp")
    functions: dict[str, Callable] = {"dit": measure_dit, "latents": measure_latents, "images": measure_images}
    return (functions | {"resume": measure_resume})[part](config, folder, gpus)


def compare(rows: list[dict]) -> None:
    """Add what a row is beside that of one process: scaling, and whether its files have the same bytes."""
    single = {row["part"]: row for row in rows if row["processes"] == 1 and "error" not in row}
    for row in rows:
        one = single.get("dit" if row["part"] == "sharded" else row["part"])
        if one is None or "error" in row:
            continue
        if "images_per_second" in row:
            row["scaling"] = row["images_per_second"] / (row["processes"] * one["images_per_second"])
        if "sha256" in row:
            row["same_bytes_as_one"] = row["sha256"] == one["sha256"]


class Job:
    """The rows so far, written whenever there is a new one, and how everything ends."""

    def __init__(self, config: BenchmarkConfig, options: list[str]):
        self.config, self.options, self.lock, self.over = config, options, threading.Lock(), False
        self.start = time.perf_counter()
        there = config.keep_rows and Path(config.output).is_file()
        before = read_json(Path(config.output))["rows"] if there else []
        self.rows = [row for row in before if "error" not in row]
        self.results = {"device": device_name(), "options": options, "rows": self.rows}

    def known(self, part: str, gpus: list[int]) -> bool:
        # resume needs the run itself, not its row
        return part != "resume" and any((r["part"], r["processes"]) == (part, len(gpus)) for r in self.rows)

    def keep(self, row: dict) -> None:
        with self.lock:
            if self.over:  # what failed since everything was ended is no result
                return
            others = [r for r in self.rows if (r["part"], r["processes"]) != (row["part"], row["processes"])]
            self.rows[:] = [*others, row | {"at_second": time.perf_counter() - self.start}]
            compare(self.rows)
            self.results["seconds"] = time.perf_counter() - self.start
            write_results(self.config.output, "several_gpus", self.config, self.results)
            print(json.dumps(self.rows[-1]), flush=True)

    def run_lane(self, folder: Path, lane: Lane, beside: list[Lane]) -> None:
        gpus, parts = lane
        for part in parts:
            if self.known(part, gpus):
                continue
            about = {"part": part, "processes": len(gpus), "gpus": gpus, "beside": beside}
            try:
                for row in measure(self.config, folder, part, gpus, self.options):
                    self.keep(about | row)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is written down and the next part measured
                self.keep(about | {"error": f"{type(error).__name__}: {error}"[-4000:]})

    def run_phase(self, folder: Path, lanes: list[Lane], also: Callable[[], None] | None = None) -> bool:
        """Whether all of it is measured before the time is over. Args: `also`: done in this thread meanwhile."""
        threads = []
        for lane in lanes:
            beside = [other for other in lanes if other is not lane and other[1]]
            threads.append(threading.Thread(target=self.run_lane, args=(folder, lane, beside), daemon=True))
            threads[-1].start()
        if also is not None:
            also()
        for thread in threads:
            thread.join(max(0.0, self.start + self.config.seconds - time.perf_counter()))
        return not any(thread.is_alive() for thread in threads)

    def end(self) -> None:
        """End all that was started and is not over."""
        with self.lock:
            self.over = True
        started = psutil.Process().children(recursive=True)
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, timeout=10)


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    config, options = parse_config(BenchmarkConfig, words[:cut], __doc__), words[cut + 1 :]
    job = Job(config, options)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder, first, complete = Path(temporary), True, True
        dit_training.make_data(make_folder(folder / "tiny"), "tiny")
        try:
            for lanes in plan(config.processes, config.parts):
                complete = job.run_phase(folder, lanes, (lambda: make_files(config, folder)) if first else None)
                first = False
                if not complete:
                    break
        finally:
            job.end()
    failed = [f"{row['part']} on {row['processes']}" for row in job.rows if "error" in row]
    print(f"results: {config.output}")
    if failed or not complete:
        late = f"not everything was measured in {config.seconds:g} seconds"
        what = f"failed: {', '.join(failed)}" if failed else late
        raise SystemExit(f"{what}. --keep_rows measures what is missing")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_by_exception)
    main()
