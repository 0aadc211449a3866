"""The same labels and noise drawn by several pipelines, side by side: a row for each label.

    python experiments/shipped_pipeline/side_by_side.py --images runs/old runs/new --titles old new --output both.webp

The folders are those of pipelines/generate.py, with equal options, or with the same classes of another style.
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vtp_diffusion.generation.sample_files import LABELS_NAME
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, read_json

GAP, HEADER, LINE = 24, 20, 18  # pixels


@dataclass(kw_only=True)
class Config(Settings):
    """Settings of this program."""

    images: list[str] = setting(help="folders of images, one beside the other")
    titles: list[str] = setting(help="one for each folder")
    side: int = setting(72, "pixels of an image in the picture", at_least=1)
    output: str = setting(help="FILE.webp")

    def __post_init__(self):
        super().__post_init__()
        check_output(self.output, ".webp")
        if len(self.images) != len(self.titles):
            raise ValueError(f"titles are {len(self.titles)}, expected one for each of {len(self.images)} folders")


def read_rows(folder: Path) -> dict[str, list[Path]]:
    """Label -> its images. Raises: ValueError for another folder."""
    if not (folder / LABELS_NAME).is_file():
        raise ValueError(f"{folder} has no {LABELS_NAME}, expected a folder of pipelines/generate.py")
    rows = {}
    for name, label in read_json(folder / LABELS_NAME).items():
        rows.setdefault(label.get("name", f"class {label['label']}"), []).append(folder / name)
    short = {label: label.removesuffix("-noto").removesuffix("-fluent") for label in rows}
    if len(set(short.values())) < len(short):  # one folder with several styles
        return rows
    return {short[label]: files for label, files in rows.items()}


def drawn(folders: list[dict[str, list[Path]]], titles: list[str], side: int) -> Image.Image:
    """The picture. Raises: ValueError if the labels or their numbers differ."""
    shapes = [[(label, len(files)) for label, files in rows.items()] for rows in folders]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"labels and their numbers of images differ: {shapes}, expected equal ones")
    columns = max(count for _, count in shapes[0])
    step = columns * side + GAP
    picture = Image.new("RGB", (len(folders) * step - GAP, HEADER + len(shapes[0]) * (side + LINE)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    for place, (rows, title) in enumerate(zip(folders, titles, strict=True)):
        draw.text((place * step + 4, 2), title, fill="black", font=font)
        for y, (label, files) in zip(range(HEADER, picture.height, side + LINE), rows.items(), strict=True):
            draw.text((place * step + 4, y), label, fill="gray", font=font)
            for column, file in enumerate(files):
                with Image.open(file) as image:
                    small = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
                picture.paste(small, (place * step + column * side, y + LINE - 1))
    return picture


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    rows = [read_rows(Path(folder)) for folder in config.images]
    drawn(rows, config.titles, config.side).save(config.output, quality=60, method=6)


if __name__ == "__main__":
    run(main)
