"""Images of a saved pipeline: one labelled picture, a folder of files, or the npz that ADM's evaluator reads.

    python pipelines/generate.py --pipeline weights/openmoji-128 --labels face-smiling food-fruit-fluent \\
        --num_images_per_label 4 --guidance_scale 4 --output demo/generated.png

    python pipelines/generate.py --pipeline FOLDER --labels 207 "golden retriever" \\
        --num_images_per_label 1000 --batch_size 64 --output samples

    accelerate launch pipelines/generate.py --pipeline FOLDER --num_images 50000 --label_rule random \\
        --num_inference_steps 249 --batch_size 125 --output samples.npz

Labels are given, or drawn: at random, or balanced (50 per class for 50,000 images of ImageNet). The noise of image k
depends only on the seed and k. So batch size, number of processes and interruptions change images by rounding at most
(`benchmarks/batch_invariance.py`). The same command continues an interrupted run; an output that holds another run is
refused. `eval/generation.py` measures folders and npz files, and can sample a pipeline itself without writing files.
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from vtp_diffusion.generation.sampler_config import SamplerConfig
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import parse_config, setting
from vtp_diffusion.runtime.disk import check_output, write_picture
from vtp_diffusion.runtime.processes import check_device, join_processes, this_process
from vtp_diffusion.runtime.programs import print_end

if TYPE_CHECKING:
    from vtp_diffusion import LightningDiTPipeline

PICTURE_IMAGES = 1024


@dataclass(kw_only=True)
class GenerateConfig(SamplerConfig):
    """Options of this program."""

    pipeline: str = setting(help="folder of a saved pipeline")
    output: str = setting(help="FILE.png for one labelled picture, FILE.npz, or a folder of files")
    labels: list[str] = setting(default_factory=list, help="class names or indices; index=4 where 4 is a name too")
    num_images_per_label: int = setting(1, "images of each of the labels", at_least=1)
    columns: int | None = setting(
        None, "images in a row of one picture; none: those of a label, or about as many as rows", at_least=1
    )
    num_images: int | None = setting(None, "number of images, with drawn labels", at_least=1)
    label_rule: Literal["random", "balanced"] = setting(
        "random", "how num_images labels are drawn: at random, or each class in turn"
    )
    device: str = setting(
        "cuda" if torch.cuda.is_available() else "cpu",
        "torch device of a single process; several get theirs from accelerate",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)
        if Path(self.output).suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp"):
            raise ValueError(f"output is {self.output}, expected a file ending in .png or .npz, or a folder")
        if (self.num_images is None) == (not self.labels):
            raise ValueError("give either labels, or num_images for labels that are drawn")
        if self.num_images is not None and self.num_images_per_label != 1:
            raise ValueError(f"num_images_per_label is {self.num_images_per_label}, expected 1 beside num_images")
        if self.labels and self.label_rule != GenerateConfig.label_rule:
            raise ValueError(f"label_rule is {self.label_rule}, but labels are given: expected num_images, or no rule")
        if self.kind == ".png" and (self.num_images or len(self.labels) * self.num_images_per_label) > PICTURE_IMAGES:
            raise ValueError(f"one picture holds {PICTURE_IMAGES} images at most: give FILE.npz or a folder as output")
        if self.columns is not None and self.kind != ".png":
            raise ValueError(f"columns is {self.columns}, expected none for {self.output}, which is no picture")
        if self.kind:
            check_output(self.output, Path(self.output).suffix)

    @property
    def kind(self) -> str:
        """ ".png", ".npz" or "" for a folder."""
        suffix = Path(self.output).suffix.lower()
        return suffix if suffix in (".png", ".npz") else ""


def load_pipeline(config: GenerateConfig, device: torch.device | str) -> LightningDiTPipeline:
    """The pipeline in the configured precision, on the device. Raises: ValueError if there is none."""
    from vtp_diffusion.models.loading import inner_folder

    folder, index = config.pipeline, "model_index.json"
    if not (Path(folder) / index).is_file():
        raise ValueError(
            f"expected the folder of a saved pipeline, {folder} has no {index}{inner_folder(folder, index)}"
        )
    from vtp_diffusion.generation.sampling import open_pipeline

    return open_pipeline(config.pipeline, config, device)


def image_labels(config: GenerateConfig, pipe: LightningDiTPipeline) -> tuple[list[int], dict]:
    """The label of every image, and the settings to record about them."""
    from vtp_diffusion.generation.sampling import draw_labels

    if config.num_images is not None:
        labels = draw_labels(config.label_rule, config.num_images, pipe.transformer.config.num_classes, config.seed)
        return labels, {"labels": config.label_rule}
    given = pipe.get_label_ids(config.labels)
    labels = [label for label in given for _ in range(config.num_images_per_label)]
    return labels, {"labels": "given", "label_ids": given, "num_images_per_label": config.num_images_per_label}


def generate(
    config: GenerateConfig,
    pipe: LightningDiTPipeline,
    labels: list[int],
    numbers: list[int],
    receive: Callable[[int, torch.Tensor], None],
) -> None:
    """Make the images with these numbers and hand each to `receive(number, image)`, uint8 (3, H, W), in order."""
    from tqdm.auto import tqdm

    from vtp_diffusion.generation.fast_sampling import prepare_sampling
    from vtp_diffusion.generation.sampling import sample_numbers

    if not numbers:
        return
    speed, quiet = prepare_sampling(pipe, config), this_process()[0] > 0
    if not quiet:
        print(speed)

    def hand_over(batch: list[int], images: torch.Tensor) -> None:
        for number, image in zip(batch, images, strict=True):
            receive(number, image)

    total, written = None, None  # an adaptive solver chooses its steps
    if config.solver != "dopri5":  # heun has two evaluations in all steps but the last
        total = len(numbers) * len(pipe._set_timesteps(config.num_inference_steps, pipe.device))
    with (
        tqdm(total=total, desc="network evaluations", unit_scale=True, disable=quiet) as progress,
        ThreadPoolExecutor(1) as writer,  # files are written while the next batch is sampled
    ):
        for start in range(0, len(numbers), config.batch_size):
            batch = numbers[start : start + config.batch_size]
            advance = partial(progress.update, len(batch))
            images = sample_numbers(pipe, labels, batch, config.seed, advance, **config.sampler)
            if written is not None:
                written.result()
            written = writer.submit(hand_over, batch, images)
        written.result()


def draw_picture(config: GenerateConfig, pipe: LightningDiTPipeline, labels: list[int]) -> None:
    """One labelled picture of all images."""
    from vtp_diffusion.data.images import image_grid, to_pil

    images: dict[int, torch.Tensor] = {}
    generate(config, pipe, labels, list(range(len(labels))), images.__setitem__)
    known = pipe.config.id2label or {}
    names = [known.get(str(label), f"class {label}") for label in labels]
    each = config.num_images_per_label
    columns = config.columns or (each if each > 1 else math.ceil(math.sqrt(len(labels))))
    picture = image_grid(to_pil(torch.stack([images[k] for k in range(len(labels))])), columns, names)
    write_picture(Path(config.output), picture)
    print(f"{len(labels)} images")
    print_end([config.output], "pipelines/app.py --pipeline {}", config.pipeline)


def write_files(
    config: GenerateConfig,
    pipe: LightningDiTPipeline,
    labels: list[int],
    label_settings: dict,
    wait: Callable[[], None],
) -> None:
    """Write a folder or an npz by all processes together; `wait` is a barrier."""
    from vtp_diffusion.generation.sample_files import KEPT, SampleFolder, SampleNpz
    from vtp_diffusion.generation.sampling import pipeline_identity

    settings = config.sampler | {"seed": config.seed, "num_images": len(labels)}
    settings |= pipeline_identity(pipe) | label_settings | config.precision
    files = (SampleNpz if config.kind == ".npz" else SampleFolder)(config.output, settings)
    rank, world_size = this_process()
    with files.locked() if rank == 0 else contextlib.nullcontext():
        missing, numbers = len(files.missing()), files.missing(rank, world_size)
        wait()  # all have listed the missing images before any writes one
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # what schedulers send is as Ctrl-C
        try:
            generate(config, pipe, labels, numbers, files.write)
        except KeyboardInterrupt as error:
            files.keep()
            raise KeyboardInterrupt(KEPT) from error
        finally:
            signal.signal(signal.SIGTERM, before)
        wait()
        if rank == 0:
            files.finish(labels, pipe.config.id2label or {})
            print(f"{missing} images made, {len(labels) - missing} were there")
            then = "eval/generation.py --images {} --reference FOLDER --output results.json"
            print_end([config.output], then, config.output)


def main(argv: list[str] | None = None) -> None:
    config = parse_config(GenerateConfig, argv, __doc__)
    several = this_process()[1] > 1
    if several and config.kind == ".png":
        raise ValueError(f"one picture is made by one process, {this_process()[1]} were launched")
    if config.kind == ".png" and Path(config.output).exists():
        print(f"{config.output} is there: its picture will be replaced")
    accelerator = join_processes() if several else None
    pipe = load_pipeline(config, accelerator.device if several else config.device)
    labels, label_settings = image_labels(config, pipe)
    if config.kind == ".png":
        draw_picture(config, pipe, labels)
        return
    write_files(config, pipe, labels, label_settings, accelerator.wait_for_everyone if several else lambda: None)
    if several:
        accelerator.end_training()


if __name__ == "__main__":
    run(main)
