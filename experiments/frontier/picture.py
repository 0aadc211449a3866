"""Draw a few-step student beside its teacher: the same labels and noise, a row for each way of sampling.

    python experiments/frontier/picture.py --student runs/frontier/student-0/pipeline --output student.png

Labels are every sixth of the classes in alphabetical order and seeds 0, 1, 2, ...: nothing is chosen.
"""

from dataclasses import dataclass

import torch
from PIL import Image

from vtp_diffusion.generation.sampler_config import SamplerConfig
from vtp_diffusion.generation.sampling import open_pipeline
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output

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


def sampled(folder: str, solver: str, labels: list[str], steps: int, **settings) -> list[Image.Image]:
    """An image a label, of the noise of its place."""
    pipe = open_pipeline(folder, SamplerConfig(solver=solver, num_inference_steps=steps), "cpu")
    noise = [torch.Generator().manual_seed(place) for place in range(len(labels))]
    return pipe(labels, num_inference_steps=steps, generator=noise, **settings).images


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    student = open_pipeline(config.student, SamplerConfig(solver="pipeline", num_inference_steps=1), "cpu")
    labels, steps = sorted(student.labels)[::6], student.transformer.config.student["steps"]
    rows = [sampled(config.student, "pipeline", labels, n) for n in sorted(steps)]
    guided = {"guidance_scale": config.guidance_scale}
    rows += [sampled(config.teacher, "unipc", labels, n, **guided) for n in TEACHER_STEPS]
    picture = Image.new("RGB", (SIDE * len(labels), SIDE * len(rows)))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            picture.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x * SIDE, y * SIDE))
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(config.output, optimize=True)
    print(f"rows: student in {', '.join(map(str, sorted(steps)))} steps, teacher in {TEACHER_STEPS}; labels: {labels}")


if __name__ == "__main__":
    run(main)
