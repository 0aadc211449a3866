"""Images of given classes from a saved pipeline: one labelled picture, or a folder of files.

    python pipelines/generate.py --pipeline weights/openmoji-128 --labels face-smiling flag \\
        --num_images_per_label 4 --guidance_scale 2.5 --output demo/generated.png

    python pipelines/generate.py --pipeline FOLDER --labels 207 "golden retriever" \\
        --num_images_per_label 1000 --batch_size 64 --output samples

Image k (counted over all labels) comes from a generator seeded with seed + k, so neither the batch size nor an
interruption changes it. A folder can be continued with the same command; one that holds another run is refused.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import is_accelerate_available
from PIL import Image
from tqdm.auto import tqdm

from vtp_diffusion import LightningDiTPipeline
from vtp_diffusion.cli import run
from vtp_diffusion.config import parse_config
from vtp_diffusion.images import image_grid


@dataclass
class GenerateConfig:
    pipeline: str = field(metadata={"help": "folder of a saved pipeline"})
    labels: list[str] = field(metadata={"help": "class indices or names"})
    output: str = field(metadata={"help": "FILE.png for one labelled picture, or a folder for a file an image"})
    num_images_per_label: int = field(default=1, metadata={"help": "images of each label"})
    num_inference_steps: int = field(default=50, metadata={"help": "evaluations of the network an image"})
    guidance_scale: float = field(default=1.0, metadata={"help": "1 is no guidance"})
    guidance_interval: tuple[float, float] = field(
        default=(0.0, 1.0), metadata={"help": "times between which guidance is on, 0 is noise and 1 is data"}
    )
    guidance_channels: int | None = field(
        default=None, metadata={"help": "guide only the first so many latent channels; 3 is upstream's rule"}
    )
    seed: int = field(default=0, metadata={"help": "image k uses seed + k"})
    batch_size: int = field(default=8, metadata={"help": "images at once"})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "precision"})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "torch device to run on"}
    )

    def __post_init__(self) -> None:
        if Path(self.output).suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp"):
            raise ValueError(f"output must be a file ending in .png or a folder, got {self.output}")
        if self.num_images_per_label < 1 or self.batch_size < 1:
            raise ValueError(
                "num_images_per_label and batch_size must be at least 1, "
                f"got {self.num_images_per_label} and {self.batch_size}"
            )

    @property
    def settings(self) -> dict:
        """What decides the images: everything but where they go and how many are made at once."""
        where = ("output", "batch_size", "device")
        return {name: value for name, value in json.loads(json.dumps(asdict(self))).items() if name not in where}


def load_pipeline(config: GenerateConfig) -> LightningDiTPipeline:
    if not (Path(config.pipeline) / "model_index.json").is_file():
        raise ValueError(f"expected the folder of a saved pipeline, {config.pipeline} has no model_index.json")
    # the default of low_cpu_mem_usage, which warns where accelerate is not installed
    options = {"dtype": getattr(torch, config.dtype), "low_cpu_mem_usage": is_accelerate_available()}
    pipe = DiffusionPipeline.from_pretrained(config.pipeline, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(config.device)


def generate(
    config: GenerateConfig, pipe: LightningDiTPipeline, labels: list[int], wanted: list[int], receive
) -> None:
    """Make the images with the wanted numbers and hand each to `receive(number, image)`, batch by batch."""
    batches = [wanted[start : start + config.batch_size] for start in range(0, len(wanted), config.batch_size)]
    with tqdm(total=len(wanted) * config.num_inference_steps, desc="network evaluations") as progress:
        for numbers in batches:

            def advance(pipe, step, timestep, tensors, numbers=numbers):
                progress.update(len(numbers))
                return {}

            images = pipe(
                [labels[number // config.num_images_per_label] for number in numbers],
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                guidance_interval=config.guidance_interval,
                guidance_channels=config.guidance_channels,
                generator=[torch.Generator().manual_seed(config.seed + number) for number in numbers],
                callback_on_step_end=advance,
            ).images
            for number, image in zip(numbers, images, strict=True):
                receive(number, image)


def write_picture(config: GenerateConfig, pipe: LightningDiTPipeline, labels: list[int], total: int) -> None:
    images: dict[int, Image.Image] = {}
    generate(config, pipe, labels, list(range(total)), images.__setitem__)
    known = pipe.config.id2label or {}
    names = [known.get(str(label), f"class {label}") for label in labels]
    each = config.num_images_per_label
    columns = each if each > 1 else math.ceil(math.sqrt(total))
    picture = image_grid([images[k] for k in range(total)], columns, [names[k // each] for k in range(total)])
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    picture.save(config.output)
    print(f"{total} images: {config.output}")


def write_folder(config: GenerateConfig, pipe: LightningDiTPipeline, labels: list[int], total: int) -> None:
    folder = Path(config.output)
    settings_file = folder / "settings.json"
    settings = config.settings | {"label_ids": labels}
    if settings_file.is_file():
        others = json.loads(settings_file.read_text(encoding="utf-8"))
        if changed := sorted(key for key in settings | others if settings.get(key) != others.get(key)):
            given = ", ".join(f"{key} {settings.get(key)!r} instead of {others.get(key)!r}" for key in changed)
            raise ValueError(f"{folder} holds another run's images: {given}")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds files of something else: expected a new or empty folder, or one of this run")

    def save(number: int, image: Image.Image) -> None:
        if not settings_file.exists():  # with the first image: bad settings leave nothing behind
            folder.mkdir(parents=True, exist_ok=True)
            settings_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        unfinished = folder / f".{number:06d}.png"  # renamed when complete: an interruption leaves no half image
        image.save(unfinished)
        unfinished.rename(folder / f"{number:06d}.png")

    wanted = [number for number in range(total) if not (folder / f"{number:06d}.png").exists()]
    generate(config, pipe, labels, wanted, save)
    print(f"{len(wanted)} images made, {total - len(wanted)} were there: {folder}")


def main(argv: list[str] | None = None) -> None:
    config = parse_config(GenerateConfig, argv, __doc__)
    pipe = load_pipeline(config)
    # a word of digits is an index
    labels = pipe.get_label_ids([int(label) if label.isdecimal() else label for label in config.labels])
    write = write_picture if Path(config.output).suffix.lower() == ".png" else write_folder
    write(config, pipe, labels, total=len(labels) * config.num_images_per_label)


if __name__ == "__main__":
    run(main)
