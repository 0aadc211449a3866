r"""Images a second of train_vtp/train.py, all three objectives, on one process and on several, as a user starts it.

    python benchmarks/vtp_scaling.py --processes 1 2 --output benchmarks/results/vtp_scaling.json   # two H100
    python benchmarks/vtp_scaling.py --size tiny --processes 1 2 --steps 6 --output tiny.json       # a CPU
    python benchmarks/vtp_scaling.py --same_losses true --images 128 --steps 20 --processes 1 1 2 --output losses.json

`large` is configs/large.yaml, model and objectives, on OpenMoji at 128 pixels: 1024 images a process are as many
tokens as the 256 of 256 pixels that fit into an H100, and captions are cut to as many tokens less. What it changes of
the configuration is `SIZES`, with `MEASURED`; options after `--` go to the program and come last. One process alone
would record CUDA graphs, which several cannot; the committed result is without them in both:

    python benchmarks/vtp_scaling.py --output scaling.json -- --cuda_graphs false \
        --reconstruction.lpips_trunk vgg16.safetensors

Speed is the median of the log's images/s after the first third of the steps, which compilation is in; `times_one` is
that of all processes in that of the first row with one process, `scaling` that of one of them.

With --same_losses the batch is that of all processes together, in float32, nothing compiled or recorded, no stochastic
depth, and speed says little. Every later row has the largest difference of any loss to the first row's, step by step,
and that of the gradient's norm, since AdamW makes up for a gradient that is too long. A difference is in parts of the
first row's loss, or of `SMALL` of the whole loss where that is more: a loss like KoLeo's passes through zero. Where
one process comes again, as in `1 1 2`, it computes attention by its formula instead of a fused kernel: its differences
are what rounding alone comes to. The learning rate rises as in the configuration, for `large` to 8e-7 in 20 steps;
`-- --lr_warmup_steps 10` shows what a full one does to rounding from a random start.

A run ends as soon as its last line is there: nothing is evaluated, saved or exported. A row is in the file as soon as
it is measured; a run that fails ends the benchmark with what it wrote.
"""

import json
import math
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from launching import (
    ROOT,
    device_name,
    end_by_exception,
    program_environment,
    read_log,
    run_until,
    steps_logged,
    torchrun,
)

from vtp_diffusion.runtime.config import parse_config
from vtp_diffusion.runtime.disk import check_output, write_results

PROGRAM = ROOT / "train_vtp" / "train.py"
NEVER = 1_000_000  # steps
MEASURED = {
    "max_train_steps": NEVER,  # more than are made: at the last one a run is evaluated and saved
    "checkpointing_steps": NEVER,
    "validation_steps": NEVER,
    "report_to": "none",
}
SMALL = 0.01  # of the whole loss
# logged beside losses
STATISTICS = ("logit_scale", "logit_bias", "captions", "teacher_entropy", "mean_target_entropy")
SAME_LOSSES = {
    "mixed_precision": "no",
    "compile": "false",
    "cuda_graphs": "false",  # one process alone would have them
    "self_supervision.stochastic_depth": 0,
    "log_steps": 1,
}
ROUNDED_OTHERWISE = {"DIFFUSERS_ATTN_BACKEND": "_native_math"}  # the environment of one process when it comes again
# the configuration, images a process, what is changed
SIZES = {
    "large": (
        "large.yaml",
        1024,
        {
            "data.source": "openmoji",
            "data.streaming": "false",
            "data.caption_column": "none",
            "data.resolution": 128,
            "self_supervision.crops.global_size": 128,
            "self_supervision.crops.local_size": 48,
            "text.text_context_length": 20,  # 4 x 20 tokens for the 77 of an image four times as large
        },
    ),
    "tiny": ("tiny.yaml", 8, {"data.limit": 64, "self_supervision.crops.local_crops": 2}),
}


@dataclass(kw_only=True)
class BenchmarkConfig:
    output: str = field(metadata={"help": "FILE.json for the results"})
    size: Literal["large", "tiny"] = field(default="large", metadata={"help": "tiny: a CPU, seconds"})
    processes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "one each GPU"})
    images: int | None = field(default=None, metadata={"help": "a process; none: 1024, for tiny 8"})
    steps: int = field(default=36, metadata={"help": "of every run"})
    same_losses: bool = field(
        default=False, metadata={"help": "are the losses of a batch those of one process? --images is the batch"}
    )

    def __post_init__(self):
        check_output(self.output)
        if not self.processes or min(self.processes) < 1 or self.steps < 6:
            raise ValueError(
                f"processes is {self.processes} and steps {self.steps}, expected positive numbers and 6 steps or more"
            )
        if self.images is not None and self.images < 1:
            raise ValueError(f"images is {self.images} a process, expected a positive number")
        if torch.cuda.is_available() and max(self.processes) > torch.cuda.device_count():
            raise ValueError(f"processes is {self.processes}, but there are {torch.cuda.device_count()} GPUs")


def changes(config: BenchmarkConfig) -> dict:
    """What every run changes of the configuration."""
    changed = MEASURED | SIZES[config.size][2] | {"log_steps": max(1, config.steps // 12)}
    return changed | (SAME_LOSSES if config.same_losses else {})


def batch_sizes(config: BenchmarkConfig, processes: int) -> tuple[int, int]:
    """Images of a step, and of a process in it: with `same_losses` the step has `images`, else every process has."""
    images = config.images or SIZES[config.size][1]
    return (images, images // processes) if config.same_losses else (images * processes, images)


def measure(config: BenchmarkConfig, options: list[str], gpus: list[int] | None = None) -> Iterator[dict]:
    """A row for every number of processes, as soon as it is measured. Args: `gpus`: those to use; None: the first."""
    file, single = SIZES[config.size][0], None
    first: list[dict] = []
    for processes in config.processes:
        with tempfile.TemporaryDirectory() as temporary:
            run, start = Path(temporary) / "run", time.perf_counter()
            again = config.same_losses and processes == 1 and single is not None
            settings = changes(config) | {"output_dir": run}
            settings["train_batch_size"], images_a_process = batch_sizes(config, processes)
            environment = program_environment(gpus)
            if config.same_losses:
                environment |= {"NVIDIA_TF32_OVERRIDE": "0"}  # torch allows TensorFloat-32 to convolutions
                environment |= ROUNDED_OTHERWISE if again else {}
            words = [f"--config={ROOT / 'train_vtp' / 'configs' / file}"]
            words += [f"--{name}={value}" for name, value in settings.items()]
            command = torchrun(processes, PROGRAM, *words, *options)
            run_until(lambda run=run: steps_logged(run) >= config.steps, command, environment)
            lines = [line for line in read_log(run) if line["step"] <= config.steps]
        steady = [line for line in lines if line["step"] > config.steps // 3]
        row = {"processes": processes, "images_a_process": images_a_process}
        row["images_per_second"] = statistics.median(line["images_per_second"] for line in steady)
        row["mfu"] = statistics.median(line["mfu"] for line in steady) if "mfu" in steady[0] else None
        row["peak_memory_gib"] = lines[-1]["peak_memory_gib"]
        if processes == 1 and single is None:
            single = row["images_per_second"]
        row["times_one"] = None if single is None else row["images_per_second"] / single
        row["scaling"] = None if single is None else row["times_one"] / processes
        row["images_per_second_of_lines"] = [line["images_per_second"] for line in lines]
        row["losses"] = [line["loss"] for line in lines]
        if again:
            row["environment"] = ROUNDED_OTHERWISE
        if config.same_losses and first:
            row |= compare(first, lines)
        first = first or lines
        yield row | {"seconds": time.perf_counter() - start}


def compare(first: list[dict], second: list[dict]) -> dict:
    """How far the losses of a log are from those of the first.

    Raises: SystemExit where a loss or a norm is not finite: it would not count as different.
    Returns: `differences_of_losses`, of each step that of the loss which differs most; `largest_difference_of_losses`,
        their largest with its step and the loss's name; `differences_of_gradient_norms`.
    """
    names = ["loss", *(name for name in first[0] if "/" in name and name.split("/")[-1] not in STATISTICS)]
    found = []
    for line in (*first, *second):
        if bad := [name for name in (*names, "grad_norm") if line[name] is None or not math.isfinite(line[name])]:
            raise SystemExit(f"step {line['step']}: {', '.join(bad)} not finite, expected numbers to compare")
    for a, b in zip(first, second, strict=True):
        parts = {name: abs(a[name] - b[name]) / max(abs(a[name]), SMALL * abs(a["loss"])) for name in names}
        worst = max(parts, key=parts.get)
        found.append({"step": a["step"], "loss": worst, "difference": parts[worst]})
    norms = [abs(a["grad_norm"] - b["grad_norm"]) / a["grad_norm"] for a, b in zip(first, second, strict=True)]
    return {
        "differences_of_losses": [place["difference"] for place in found],
        "largest_difference_of_losses": max(found, key=lambda place: place["difference"]),
        "differences_of_gradient_norms": norms,
    }


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    config, options = parse_config(BenchmarkConfig, words[:cut], __doc__), words[cut + 1 :]
    results = {"device": device_name(), "changed": changes(config), "options": options, "rows": []}
    for row in measure(config, options):
        results["rows"].append(row)
        write_results(config.output, "vtp_scaling", config, results)
        print(json.dumps(row), flush=True)
    print(f"results: {config.output}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_by_exception)
    main()
