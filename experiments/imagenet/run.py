"""ImageNet, start to FID-50K: convert the tokenizer, extract latents, train the generator, sample, measure, report.

    python experiments/imagenet/run.py --tokenizer VTP-Large-f16d64 --latent_statistics latents_stats.pt --processes 8
    python experiments/imagenet/run.py --config experiments/imagenet/rehearsal.yaml --data FOLDER \\
        --latent_statistics FILE --output_dir runs/rehearsal

Every step is a program of this repository; its command is printed before it runs. The same command resumes an
interrupted run. With --pipeline a given generator is measured and nothing is trained.
"""

import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting

ROOT = Path(__file__).parents[2]
Step = tuple[str, list[str]]  # program, its arguments


@dataclass(kw_only=True)
class Config(Settings):
    """Settings of this program."""

    output_dir: str = setting("runs/imagenet", "folder for everything that is made")
    data: str = setting("imagenet", "folder of the images, with train/ and one sub-folder a class in it")
    resolution: int = setting(256, "side of the images in pixels", at_least=1)
    tokenizer: str = setting("VTP-Large-f16d64", "released VTP: folder, Hub id or short name")
    latent_statistics: str | None = setting(None, "file of the means and deviations of its latents")
    training: str = setting("train_dit/configs/vtp_large_xl.yaml", "configuration of train_dit/train.py")
    pipeline: str | None = setting(None, "folder of a pipeline that is ready; none: train one")
    processes: int = setting(1, "GPUs", at_least=1)
    gradient_accumulation_steps: int = setting(1, "parts a training step is made in; see docs/imagenet.md", at_least=1)
    device: str = setting("cuda", "torch device of a single process")
    mixed_precision: Literal["no", "bf16"] = setting("bf16", "precision of the extraction")
    num_workers: int = setting(12, "processes that read images", at_least=0)
    num_images: int = setting(50_000, "images to sample and measure", at_least=3)
    num_inference_steps: int = setting(249, "evaluations of the network an image", at_least=1)
    guidance_scale: float | None = setting(None, "measure once more with guidance of this scale", above=1)
    batch_size: int = setting(125, "images sampled at a time", at_least=1)
    reference: str = setting("VIRTUAL_imagenet256_labeled.npz", "ADM's reference file, or a folder of images")
    feature_network: str = setting("inception", "network of the distances")
    weights: str | None = setting("weights-inception-2015-12-05-6726825d.pth", "its weights")

    def __post_init__(self):
        super().__post_init__()
        if self.pipeline is None and self.latent_statistics is None:
            raise ValueError("latent_statistics is none, expected a file: without them no generator can be trained")


def check_files(config: Config) -> None:
    """Raises: ValueError naming every file that is not there, before hours of work."""
    files = {"reference": config.reference, "weights": config.weights}
    if config.pipeline is None:
        file, _, entry = config.latent_statistics.rpartition(":")  # FILE:NAME is one of several in a JSON
        files |= {"data": config.data, "training": config.training, "latent_statistics": file or entry}
    else:
        files["pipeline"] = config.pipeline
    missing = [f"--{name} {file}" for name, file in files.items() if file is not None and not Path(file).exists()]
    if missing:
        raise ValueError(f"not there: {', '.join(missing)}; docs/imagenet.md says where each of them comes from")


def training_steps(config: Config, folder: Path) -> Iterator[Step]:
    """Tokenizer, latents, generator."""
    vae, latents = str(folder / "vae"), str(folder / "latents")
    data = ["--data.source", config.data, "--data.resolution", str(config.resolution)]
    if not Path(vae).is_dir():  # the program wants a new folder
        words = ["vtp", "--source", config.tokenizer, "--output", vae]
        yield "pipelines/convert.py", [*words, "--latent-statistics", config.latent_statistics]
    words = ["--vae", vae, "--output_dir", latents, *data, "--mixed_precision", config.mixed_precision]
    yield "train_dit/extract_latents.py", [*words, "--num_workers", str(config.num_workers)]
    words = ["--config", config.training, "--vae", vae, "--latents", latents, *data]
    words += ["--gradient_accumulation_steps", str(config.gradient_accumulation_steps)]
    yield "train_dit/train.py", [*words, "--output_dir", str(folder / "generator")]


def steps(config: Config) -> Iterator[Step]:
    """Every program with its arguments, in order."""
    folder = Path(config.output_dir)
    if config.pipeline is None:
        yield from training_steps(config, folder)
    words = ["--images", config.pipeline or str(folder / "generator" / "pipeline"), "--labels", "random"]
    words += ["--num_images", str(config.num_images), "--num_inference_steps", str(config.num_inference_steps)]
    words += ["--batch_size", str(config.batch_size), "--reference", config.reference, "--device", config.device]
    words += ["--feature_network", config.feature_network, *(["--weights", config.weights] if config.weights else [])]
    results = [str(folder / "unguided.json")]
    yield "eval/generation.py", [*words, "--output", results[0]]
    if config.guidance_scale is not None:
        results.append(str(folder / "guided.json"))
        guided = ["--guidance_scale", str(config.guidance_scale), "--output", results[1]]
        yield "eval/generation.py", [*words, *guided]
    yield "eval/report.py", ["--results", *results, "--output", str(folder / "report.html")]


def launch(config: Config, program: str, words: list[str]) -> None:
    """Run a program, on all GPUs if it can use several. Raises: SystemExit with its status if it fails."""
    command = [sys.executable, str(ROOT / program), *words]
    if config.processes > 1 and program not in ("pipelines/convert.py", "eval/report.py"):
        accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(config.processes)]
        command[1:1] = accelerate
    print(shlex.join(command), flush=True)
    if status := subprocess.run(command, check=False).returncode:
        raise SystemExit(status)


def main(argv: list[str] | None = None, start: Callable[[Config, str, list[str]], None] = launch) -> None:
    config = parse_config(Config, argv, __doc__)
    check_files(config)
    for program, words in steps(config):
        start(config, program, words)
    print(f"{config.output_dir} holds the results; open {config.output_dir}/report.html")


if __name__ == "__main__":
    run(main)
