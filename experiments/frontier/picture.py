"""Draw a few-step student beside its teacher on a CPU: the same labels and noise, a row for each way of sampling.

    python experiments/frontier/picture.py --student runs/frontier/student-0/pipeline --output student.png

Labels are every sixth of the classes in alphabetical order and seeds 0, 1, 2, ...: nothing is chosen. The seconds that
a row takes, the second time, go into FILE.json beside the picture.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from vtp_diffusion.generation.sampler_config import SamplerConfig
from vtp_diffusion.generation.sampling import open_pipeline
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, write_json

SIDE = 96  # pixels of an image in the picture
COLOURS = 128
TEACHER_STEPS = (4, 16)


@dataclass(kw_only=True)
class Config(Settings):
    """Settings of this program."""

    student: str = setting(help="folder of its pipeline")
    teacher: str = setting("weights/openmoji-128", "folder of the pipeline that it was made from")
    guidance_scale: float = setting(2.5, "of the teacher, as it is baked in", at_least=1)
    output: str = setting(help="FILE.png")

    def __post_init__(self):
        super().__post_init__()
        check_output(self.output, ".png")


def sampled(pipe, labels: list[str], steps: int, **settings) -> tuple[list[Image.Image], float]:
    """One image per label, with the label's position as seed of its noise; and the seconds, decoding included."""
    for _ in range(2):  # the first call also pays for one-time work
        noise = [torch.Generator().manual_seed(place) for place in range(len(labels))]
        began = time.perf_counter()
        images = pipe(labels, num_inference_steps=steps, generator=noise, **settings).images
        seconds = time.perf_counter() - began
    return images, seconds


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    student = open_pipeline(config.student, SamplerConfig(solver="pipeline", num_inference_steps=1), "cpu")
    teacher = open_pipeline(config.teacher, SamplerConfig(solver="unipc"), "cpu")
    labels, guided = sorted(student.labels)[::6], {"guidance_scale": config.guidance_scale}
    ways = {f"student, steps {n}": (student, n, {}) for n in student.transformer.config.student["steps"]}
    ways |= {f"teacher, steps {n}, guided": (teacher, n, guided) for n in TEACHER_STEPS}
    picture, found = Image.new("RGB", (SIDE * len(labels), SIDE * len(ways))), {}
    for y, (name, (pipe, steps, settings)) in enumerate(ways.items()):
        images, found[name] = sampled(pipe, labels, steps, **settings)
        for x, image in enumerate(images):
            picture.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x * SIDE, y * SIDE))
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(config.output, optimize=True)
    results = {"device": "CPU", "threads": torch.get_num_threads(), "torch": torch.__version__, "labels": labels}
    write_json(Path(config.output).with_suffix(".json"), results | {"images": len(labels), "seconds": found})
    print({name: round(seconds, 2) for name, seconds in found.items()})


if __name__ == "__main__":
    run(main)
