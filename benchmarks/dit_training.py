r"""Speed, memory and exactness of train_dit/train.py, started as a user starts it, on random latents.

    python benchmarks/dit_training.py --output speed.json --sizes XL/1 --processes 1 --ways fast plain compiled
    python benchmarks/dit_training.py --output two.json --sizes XL/1 --processes 1 2 --strategies ddp fsdp
    python benchmarks/dit_training.py --output losses.json --sizes B/1 --processes 1 --speed false --same_losses \\
        --ways fast plain --steps 200
    python benchmarks/dit_training.py --output resume.json --sizes XL/1 --processes 1 2 --speed false --resume_check \
        --batch_size 32 --steps 12
    python benchmarks/dit_training.py --output tiny.json --sizes tiny --processes 1 2 --resume_check --steps 8

Speed is the median of the log's img/s without the first third of the steps, which contains compilation. For XL/1 at
128 images a GPU on an H100 it is compared with the upstream trainer's on the same work and GPU (`PEER`).
--same_losses trains in all ways and in float32, and says how far the losses are from float32's and from each other.
--resume_check resumes a run from its checkpoint at half of the steps, as if it had been killed later, and compares
with the uninterrupted run: with the same number of processes every bit of the weights has to be equal (deterministic
mode); from the first to the second of --processes the losses have to agree within `LOSS_TOLERANCE`.

Speed is measured until the last of --steps is in the log, and nothing is saved; --profile adds what a step of several
processes waits for (step_profile.py). Every run has its seconds from start to end, and those of training alone as
logged; the difference is starting, compiling and, if runs are compared, saving. A row is written as soon as it is
measured. If the benchmark is stopped (SIGTERM, SIGINT), the training that it started ends at once.
"""

import itertools
import json
import os
import shutil
import signal
import statistics
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
    run_to_its_end,
    run_until,
    steps_logged,
    torchrun,
)
from safetensors.torch import load_file

from vtp_diffusion import AutoencoderVTP
from vtp_diffusion.data.latent_shards import write_metadata, write_shard
from vtp_diffusion.models.latent_space import autoencoder_identity
from vtp_diffusion.runtime.config import parse_config
from vtp_diffusion.runtime.disk import check_output, read_json, write_results
from vtp_diffusion.runtime.experiments import check_names

PROGRAM = ROOT / "train_dit" / "train.py"
PROFILED = ROOT / "benchmarks" / "step_profile.py"  # the same program, some of its steps profiled
NEVER = 1_000_000  # steps
# layers, heads, channels of a head, qk_norm, channels and side of the latents
SIZES = {
    "tiny": (2, 2, 16, False, 4, 4),
    "B/1": (12, 12, 64, False, 64, 16),
    "XL/1": (28, 16, 72, False, 64, 16),
    "1p0B/1": (24, 24, 64, False, 64, 16),
    "openmoji": (8, 4, 64, True, 8, 16),
}
# img/s on one H100: LightningDiT-XL/1, 256 tokens, batch 128, bf16, AdamW and EMA; and its model compiled as a whole
PEER = {"upstream trainer": 460.0, "upstream model, compiled": 488.0}
# How the training is started: as it is by default (fused kernels, CUDA graphs on one GPU), and with less.
WAYS = {
    "fast": [],
    "recompute": ["--recompute=true"],
    "no_graphs": ["--cuda_graphs=false"],
    "plain": ["--fused=false", "--cuda_graphs=false"],
    "compiled": ["--compile=true"],
}
LOSS_TOLERANCE = 0.02  # relative; bf16 gradients summed in another order, over some steps
NUM_LATENTS = 1024
NUM_CLASSES = 10


@dataclass(kw_only=True)
class BenchmarkConfig:
    output: str = field(metadata={"help": "FILE.json for the results"})
    sizes: list[str] = field(default_factory=lambda: ["tiny"], metadata={"help": f"one or more of {', '.join(SIZES)}"})
    processes: list[int] = field(default_factory=lambda: [1], metadata={"help": "one each GPU"})
    strategies: list[Literal["ddp", "fsdp"]] = field(
        default_factory=lambda: ["ddp"], metadata={"help": "fsdp: sharded weights, on two or more GPUs"}
    )
    batch_size: int | None = field(default=None, metadata={"help": "images a GPU; none: 128, for tiny 4"})
    steps: int = field(default=60, metadata={"help": "of every run"})
    ways: list[str] = field(default_factory=lambda: ["fast"], metadata={"help": f"some of {', '.join(WAYS)}"})
    speed: bool = field(default=True, metadata={"help": "measure img/s, memory and scaling"})
    profile: bool = field(
        default=False,
        metadata={"help": "several processes: what a step waits for, see step_profile.py"},
    )
    resume_check: bool = field(default=False, metadata={"help": "compare interrupted runs with straight ones"})
    same_losses: bool = field(default=False, metadata={"help": "compare the losses of all ways with float32's"})

    def __post_init__(self):
        check_output(self.output)
        for name in self.sizes:
            if name not in SIZES:
                raise ValueError(f"size {name!r} is unknown; known: {', '.join(SIZES)}")
        if not self.processes or min(self.processes) < 1 or self.steps < 6:
            raise ValueError(
                f"processes is {self.processes} and steps {self.steps}, expected positive numbers and 6 steps or more"
            )
        if torch.cuda.is_available() and max(self.processes) > torch.cuda.device_count():
            raise ValueError(f"processes is {self.processes}, but there are {torch.cuda.device_count()} GPUs")
        check_names("ways", self.ways, WAYS)
        if not self.speed and not self.resume_check and not self.same_losses:
            raise ValueError("speed, resume_check and same_losses are false, expected one of them")
        if "fsdp" in self.strategies and not torch.cuda.is_available():
            raise ValueError("strategies has fsdp, which accelerate gives on GPUs only")


def make_data(folder: Path, size: str) -> None:
    """An autoencoder of random weights (nothing is decoded) and latents of its shape, all in one shard."""
    channels, side = SIZES[size][4:]
    parts = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}
    vae = AutoencoderVTP(
        sample_size=4 * side,
        patch_size=4,
        latent_channels=channels,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        **{f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in parts.items()},
    )
    vae.save_pretrained(folder / "vae")
    (folder / "latents").mkdir()
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(NUM_LATENTS, channels, side, side, generator=random).bfloat16()
    labels = torch.arange(NUM_LATENTS) % NUM_CLASSES
    write_shard(folder / "latents" / "latents_00000.safetensors", latents, latents.flip(3), labels)
    names = [str(k) for k in range(NUM_CLASSES)]
    metadata = {"autoencoder": autoencoder_identity(vae), "num_samples": NUM_LATENTS, "label_names": names}
    write_metadata(folder / "latents", metadata | {"mean": [0.0] * channels, "std": [1.0] * channels})


def program_words(data: Path, size: str, output: Path) -> list[str]:
    """Options of the program for a model of `SIZES` on the latents of `make_data`."""
    layers, heads, head_dim, qk_norm = SIZES[size][:4]
    words = [f"--output_dir={output}", f"--vae={data / 'vae'}", f"--latents={data / 'latents'}"]
    words += [f"--model.num_layers={layers}", f"--model.num_attention_heads={heads}"]
    return [
        *words,
        f"--model.attention_head_dim={head_dim}",
        f"--model.qk_norm={str(qk_norm).lower()}",
        "--report_to=none",
    ]


def train(
    data: Path,
    size: str,
    processes: int,
    strategy: str,
    steps: int,
    output: Path,
    *options: str,
    saved: bool = True,
    profile: Path | None = None,
    gpus: list[int] | None = None,
) -> tuple[list[dict], dict[str, float]]:
    """Run the program: the losses of its log; its seconds, altogether and of training.

    Args:
        saved: to its end; False: only until its last step is in the log, and nothing is saved.
        profile: FILE.json for a profile of the steps that come then, with `saved` False.
        gpus: those to use; None: the first.
    """
    words = program_words(data, size, output)
    words += [f"--max_train_steps={steps if saved else NEVER}", *options]
    command = torchrun(processes, PROGRAM, *words)
    if profile is not None:
        command = torchrun(processes, PROFILED, profile, steps, *words)
    environment = program_environment(gpus)
    environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if strategy == "fsdp" else {}
    states = [json.loads(path.read_text(encoding="utf-8")) for path in output.glob("checkpoint-*/state.json")]
    before, start = max((state["seconds"] for state in states), default=0.0), time.perf_counter()
    if saved:
        run_to_its_end(command, environment)
    else:
        run_until(lambda: profile.is_file() if profile else steps_logged(output) >= steps, command, environment)
    seconds = {"altogether": time.perf_counter() - start}
    losses = [line for line in read_log(output) if "loss" in line and line["step"] <= steps]
    return losses, seconds | {"training": losses[-1]["seconds"] - before}


def measure_speed(
    config: BenchmarkConfig, data: Path, size: str, folder: Path, gpus: list[int] | None = None
) -> Iterator[dict]:
    """A row for every strategy, way and number of processes, as soon as it is measured.

    Args: `gpus`: those to use; None: the first.
    """
    images, single = images_per_process(config, size), {}
    for strategy, way, processes in itertools.product(config.strategies, config.ways, config.processes):
        if strategy == "fsdp" and processes == 1:
            continue
        every = max(1, config.steps // 12)
        options = [f"--train_batch_size={images * processes}", f"--log_steps={every}", *precision()]
        options += [f"--checkpointing_steps={NEVER}", f"--validation_steps={NEVER}", *WAYS[way]]
        output = folder / f"{strategy}-{way}-{processes}"
        profile = folder / f"{output.name}.json" if config.profile and processes > 1 else None
        ends = {"saved": False, "profile": profile, "gpus": gpus}
        lines, seconds = train(data, size, processes, strategy, config.steps, output, *options, **ends)
        shutil.rmtree(output)
        steady = [line for line in lines if line["step"] > config.steps // 3]
        row = {"size": size, "strategy": strategy, "way": way, "processes": processes, "images_a_process": images}
        row["images_per_second"] = statistics.median(line["images_per_second"] for line in steady)
        row["mfu"] = statistics.median(line["mfu"] for line in steady) if "mfu" in steady[0] else None
        row["peak_memory_gib"] = lines[-1]["peak_memory_gib"]
        if processes == 1:
            single[way] = row["images_per_second"]
        row["scaling"] = row["images_per_second"] / (processes * single[way]) if way in single else None
        comparable = size == "XL/1" and images == 128 and processes == 1 and "H100" in device_name()
        if profile is not None:
            row["profile"] = read_json(profile)
        row["ratio_to"] = {n: row["images_per_second"] / v for n, v in PEER.items()} if comparable else None
        yield row | {"seconds": seconds}


def compare_losses(config: BenchmarkConfig, data: Path, size: str, folder: Path) -> Iterator[dict]:
    """Losses of the same training in all ways and in float32: root mean square of what separates each from float32's,
    relative, and of what separates the first way from the last."""
    options = [f"--train_batch_size={images_per_process(config, size)}", "--log_steps=1"]
    options += ["--checkpointing_steps=1000000"]
    losses = {}
    for way in [*config.ways, "float32"]:
        words = ["--fused=false", "--cuda_graphs=false"] if way == "float32" else [*precision(), *WAYS[way]]
        lines, _ = train(data, size, 1, "ddp", config.steps, folder / f"losses-{way}", *options, *words)
        losses[way] = torch.tensor([line["loss"] for line in lines], dtype=torch.float64)
        shutil.rmtree(folder / f"losses-{way}")

    def apart(one: str, other: str) -> float:
        return ((losses[one] - losses[other]) / losses["float32"]).square().mean().sqrt().item()

    result = {"size": size, "steps": config.steps, "from_float32": {way: apart(way, "float32") for way in config.ways}}
    result["first_from_last_way"] = apart(config.ways[0], config.ways[-1])
    result["last_losses"] = {way: values[-20:].mean().item() for way, values in losses.items()}
    yield result | {"losses": {way: [round(value, 5) for value in values.tolist()] for way, values in losses.items()}}


def images_per_process(config: BenchmarkConfig, size: str) -> int:
    return config.batch_size or (4 if size == "tiny" else 128)


def precision() -> list[str]:
    return ["--mixed_precision=bf16"] if torch.cuda.is_available() else []


def as_killed_after(step: int, run: Path, target: Path) -> None:
    """The folder that a kill after the checkpoint of a step would have left of a run; the run itself stays."""
    target.mkdir()
    for name in ("config.yaml", "log.jsonl"):
        shutil.copy(run / name, target)
    kept = f"checkpoint-{step}"
    shutil.copytree(run / kept, target / kept, copy_function=os.link)  # gigabytes, which nobody writes to again


def saved_weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    parts = {part: run / f"checkpoint-{step}" / part for part in ("transformer", "transformer_ema")}
    states = {part: load_file(path / "diffusion_pytorch_model.safetensors") for part, path in parts.items()}
    return {f"{part}/{key}": value for part, state in states.items() for key, value in state.items()}


def resume_options(batch_size: int, half: int) -> list[str]:
    """Options of a run that is to be compared with one which goes on after a checkpoint of the step `half`."""
    words = [f"--train_batch_size={batch_size}", "--log_steps=1", *precision(), "--deterministic"]
    return [*words, f"--checkpointing_steps={half}", "--checkpoints_total_limit=2"]


def largest_difference(straight: list[dict], moved: list[dict]) -> float:
    """Of the losses of two runs, in parts of the first one's."""
    return max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(straight, moved, strict=True))


def check_resume(config: BenchmarkConfig, data: Path, size: str, folder: Path) -> Iterator[dict]:
    """Bits of a resumed run on as many processes, then losses of one that goes on with another number of them."""
    first, second = config.processes[0], config.processes[-1]
    steps, half = config.steps, -(-config.steps // 2)
    options = [*resume_options(images_per_process(config, size) * max(config.processes), half), *WAYS[config.ways[0]]]
    result = {"size": size, "steps": steps, "seconds": {}}
    straight, seconds = train(data, size, first, "ddp", steps, folder / "straight", *options)
    result["seconds"]["straight"] = seconds
    as_killed_after(half, folder / "straight", folder / "resumed")
    as_killed_after(half, folder / "straight", folder / "moved")
    _, result["seconds"]["resumed"] = train(data, size, first, "ddp", steps, folder / "resumed", *options)
    one, other = (saved_weights(folder / name, steps) for name in ("straight", "resumed"))
    differing = [key for key, value in one.items() if not torch.equal(value, other[key])]
    del one, other
    result["resumed_on_the_same_processes"] = {"processes": first, "bits_differ_in": differing}
    yield result
    moved, result["seconds"]["moved"] = train(data, size, second, "ddp", steps, folder / "moved", *options)
    largest = largest_difference(straight, moved)
    result["moved"] = {"from": first, "to": second, "largest_relative_loss_difference": largest}
    result["passed"] = not differing and largest < LOSS_TOLERANCE
    for name in ("straight", "resumed", "moved"):
        shutil.rmtree(folder / name)
    yield result


def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchmarkConfig, argv, __doc__)
    results = {"device": device_name(), "speed": [], "losses": [], "resume": []}

    def keep(kind: str, row: dict) -> None:
        if not results[kind] or results[kind][-1] is not row:  # a check that goes on after a part of it is known
            results[kind].append(row)
        write_results(config.output, "dit_training", config, results)
        print(json.dumps(row), flush=True)

    for size in config.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make_data(folder, size)
            if config.speed:
                for row in measure_speed(config, folder, size, folder):
                    keep("speed", row)
            if config.same_losses:
                for row in compare_losses(config, folder, size, folder):
                    keep("losses", row)
            if config.resume_check:
                for row in check_resume(config, folder, size, folder):
                    keep("resume", row)
    print(f"results: {config.output}")
    if not all(check["passed"] for check in results["resume"]):
        raise SystemExit("a resumed run differs from a straight one, see above")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_by_exception)
    main()
