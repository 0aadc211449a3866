r"""Seconds from the start of a program to its first step of training and to its first images.

    timeout 500 python benchmarks/startup.py --output benchmarks/results/startup_h100.json
    python benchmarks/startup.py --output startup.json --tiny true --ways "train plain" "generate fast"   # a CPU

train_dit/train.py trains XL/1 on random latents, 128 images a step, and is ended as soon as its first step is in
log.jsonl (which waits for the device); nothing is saved. pipelines/generate.py makes a picture of four images, 10
evaluations of XL/1 and VTP-Large's decoder with random weights, and ends when the picture is written. Both run as one
process without a launcher, the `--ways` one after the other, each once. Every way has its own cache folder of Triton
and torch.compile: empty the first time, filled (`cache`) when the way is repeated.

`seconds` of a row has three parts: `imports`, those before the progress bar, by Python's -X importtime; `building`,
the rest until the bar shows, which is loading, initialising and moving to the device; and `first`, the time after
that, with kernels and compiling (including `imports_in_first`, later imports). The libraries of PyTorch and CUDA are
read once before, so that the first row does not wait for a cold disk. `of_plain` is `seconds` divided by those of the
plain way of the same program. Rows are written as soon as they are measured, and those that compile come last.
"""

import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dit_training
import sampling
import torch
from launching import (
    LOOK_SECONDS,
    ROOT,
    device_name,
    end_by_exception,
    environment_alone,
    failure,
    read_log,
    running,
    written,
)

from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, write_results
from vtp_diffusion.runtime.experiments import check_names

# name -> program, its options
WAYS = {
    "train fused": ("train", dit_training.WAYS["fast"]),
    "train plain": ("train", dit_training.WAYS["plain"]),
    "train compiled": ("train", dit_training.WAYS["compiled"]),
    "generate fast": ("generate", []),
    "generate plain": ("generate", ["--fast=false"]),
}
ORDER = ["train fused", "train plain", *["generate fast"] * 2, "generate plain", *["train compiled"] * 2]
PROGRAMS = {"train": "train_dit/train.py", "generate": "pipelines/generate.py"}
BARS = {"train": "steps: ", "generate": "network evaluations: "}  # how their progress bars begin
LIBRARIES = ("torch", "nvidia", "triton")  # packages
IMAGES = 4
EVALUATIONS = 10


@dataclass(kw_only=True)
class BenchmarkConfig(Settings):
    output: str = setting(help="FILE.json for the results")
    ways: list[str] = setting(default_factory=lambda: list(ORDER), help=f"in order, of {'; '.join(WAYS)}")
    tiny: bool = setting(False, "tiny networks, to try the benchmark itself")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_output(self.output)
        check_names("ways", self.ways, WAYS)


def import_seconds(text: str) -> float:
    """The sum of Python's times of importing, each module without those that it imports, in a program's output."""
    return sum(int(own) for own in re.findall(r"import time:\s*(\d+) \|", text)) / 1e6


def watch(command: list[str], environment: dict[str, str], bar: str, reached: Callable[[], bool]) -> dict[str, float]:
    """Run a program until something is reached: the seconds until then, and their parts.

    Args: `bar`: how the progress bar begins after which the first step is made.
    Raises: RuntimeError with what it wrote if it ends before.
    """
    start, shown = time.perf_counter(), None
    with running(command, environment) as (process, errors):
        while True:
            over = process.poll() is not None
            there = reached()
            if shown is None and bar in written(errors):
                shown = time.perf_counter() - start
            if there and shown is not None:
                break
            if over:
                raise failure(command, errors)
            time.sleep(LOOK_SECONDS)
        seconds = time.perf_counter() - start
        before, _, after = written(errors).partition(bar)
    imports = import_seconds(before)
    row = {"seconds": seconds, "imports": imports, "building": shown - imports, "first": seconds - shown}
    return row | {"imports_in_first": import_seconds(after)}


def measure(config: BenchmarkConfig, folder: Path, name: str, number: int) -> dict:
    """A row of the results. Args: `number`: of the start, which no other one has."""
    program, options = WAYS[name]
    cache, output = folder / "caches" / name.replace(" ", "-"), folder / f"run-{number}"
    filled = cache.is_dir() and any(path.is_file() for path in cache.rglob("*"))
    if program == "train":
        size = "tiny" if config.tiny else "XL/1"
        words = [*dit_training.program_words(folder, size, output), *dit_training.precision()]
        words += [f"--train_batch_size={8 if config.tiny else 128}"]
        words += [
            f"--{key}={dit_training.NEVER}" for key in ("max_train_steps", "checkpointing_steps", "validation_steps")
        ]
    else:
        output = output.with_suffix(".png")
        words = [f"--pipeline={folder / 'pipeline'}", f"--output={output}", f"--num_inference_steps={EVALUATIONS}"]
        words += ["--labels", *map(str, range(IMAGES)), f"--batch_size={IMAGES}"]
    command = [sys.executable, "-X", "importtime", str(ROOT / PROGRAMS[program]), *words, *options]
    reached = output.is_file if program == "generate" else lambda: bool(read_log(output))
    row = watch(command, environment_alone(cache), BARS[program], reached)
    return {"way": name, "options": options, "cache": "filled" if filled else "empty"} | row


def of_plain(rows: list[dict]) -> dict[str, float]:
    """Seconds of every way beside those of the plain way of its program."""
    plain = {row["way"].split()[0]: row["seconds"] for row in rows if row["way"].endswith("plain")}
    known = [row for row in rows if row["way"].split()[0] in plain]
    return {f"{row['way']}, {row['cache']} cache": row["seconds"] / plain[row["way"].split()[0]] for row in known}


def read_libraries() -> None:
    """Every shared library of PyTorch and CUDA, once."""
    for package in LIBRARIES:
        for path in (Path(torch.__file__).parents[1] / package).rglob("*.so*"):
            with open(path, "rb") as file:
                while file.read(2**24):
                    pass


def make_files(config: BenchmarkConfig, folder: Path, program: str) -> None:
    """What a program needs: latents, or a pipeline of random weights."""
    if program == "train":
        dit_training.make_data(folder, "tiny" if config.tiny else "XL/1")
    else:
        sampling.make_pipeline(config.tiny).save_pretrained(folder / "pipeline")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchmarkConfig, argv, __doc__)
    results = {"device": device_name(), "torch": torch.__version__, "cores": os.cpu_count(), "rows": []}
    if torch.cuda.is_available():
        read_libraries()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder, ready = Path(temporary), set()
        for number, name in enumerate(config.ways):
            if (program := WAYS[name][0]) not in ready:  # a pipeline is made on the GPU: not before training is over
                make_files(config, folder, program)
                ready.add(program)
            results["rows"].append(measure(config, folder, name, number))
            results["of_plain"] = of_plain(results["rows"])
            write_results(config.output, "startup", config, results)
            print(json.dumps(results["rows"][-1]), flush=True)
    print(f"beside the plain ways: {json.dumps(results['of_plain'])}\nresults: {config.output}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_by_exception)
    main()
