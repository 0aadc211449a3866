"""The first 64 samples that a generator was measured with, as one picture; table.py puts those of all together.

    python experiments/understanding_drives_generation/samples.py --samples generated.npz --output samples.png

Every generator draws the same labels from the same noise, so that a place in the picture is the same for all.
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, write_picture

SIDE, COLUMNS, ROWS = 48, 16, 4  # pixels of an image in the picture, images


@dataclass(kw_only=True)
class Config(Settings):
    """Settings of this program."""

    samples: str = setting(help="FILE.npz that eval/generation.py --save_images wrote")
    output: str = setting(help="FILE.png")

    def __post_init__(self):
        super().__post_init__()
        check_output(self.output, ".png")


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    from vtp_diffusion.data.npz import NpzImages

    images = NpzImages(config.samples)
    picture = Image.new("RGB", (SIDE * COLUMNS, SIDE * ROWS), "white")
    shown = range(min(len(images), COLUMNS * ROWS))
    for place, image in zip(shown, images.read(shown).permute(0, 2, 3, 1).numpy(), strict=True):
        small = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        picture.paste(small, (place % COLUMNS * SIDE, place // COLUMNS * SIDE))
    write_picture(Path(config.output), picture)


if __name__ == "__main__":
    run(main)
