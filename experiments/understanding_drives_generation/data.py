"""The images of this experiment: the same concepts in three styles of emoji, in one folder.

    npm pack emoji-datasource-google@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
    python experiments/understanding_drives_generation/data.py --noto emoji-datasource-google-16.0.0.tgz \\
        --fluent lobehub-fluent-emoji-3d-1.1.0.tgz --output runs/emoji

OpenMoji (with its skin tones) is rendered as every program of the project renders it; of the other two the base emoji
are read from the packages and laid on white. The names of the three are joined by code points. The folder has the
name and the layout of a rendering of OpenMoji, so that every program reads it, without `datasets`, with

    --data.source openmoji --data.resolution 128 --data.cache_dir runs/emoji

A held-out concept is held out in every style and tone, since `base` decides. The caption ends with the style: within a
batch no caption belongs to two images. --archive FILE.tar writes the folder into one file as well (44 MB).
--style_in_class gives the images of the other two styles classes of their own (animal-bird-noto beside OpenMoji's
animal-bird), which a generator can be asked for. --openmoji_weight 2 has every base emoji of OpenMoji seen twice as
often as one of another style: programs draw by weight, and extract_latents.py writes as many more copies.
"""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vtp_diffusion.data.openmoji import (
    ATTRIBUTION,
    ATTRIBUTION_NAME,
    METADATA_NAME,
    OPENMOJI_VERSION,
    openmoji_folder,
    read_metadata,
)
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import replacing

STYLES = {"openmoji": "openmoji style", "noto": "noto style", "fluent": "fluent 3d style"}
LICENCES = ATTRIBUTION + (
    "Files noto-*: Noto Emoji by Google (https://github.com/googlefonts/noto-emoji), Apache License 2.0, from the npm "
    "package emoji-datasource-google, of 64 pixels.\n"
    "Files fluent-*: Fluent Emoji by Microsoft (https://github.com/microsoft/fluentui-emoji), MIT License, from the "
    "npm package @lobehub/fluent-emoji-3d by LobeHub, MIT License.\n"
    "All were laid on white.\n"
)


@dataclass(kw_only=True)
class Config(Settings):
    """Settings of this program."""

    noto: str = setting(help="npm package emoji-datasource-google, a .tgz")
    fluent: str = setting(help="npm package @lobehub/fluent-emoji-3d, a .tgz")
    output: str = setting("runs/emoji", "folder for the images' folder")
    resolution: int = setting(128, "side of the images in pixels", at_least=1)
    archive: str | None = setting(None, "FILE.tar with the same folder")
    style_in_class: bool = setting(False, "the subcategory ends with the style, but for OpenMoji")
    openmoji_weight: float = setting(1.0, "how often a base emoji of OpenMoji is seen, against other styles", above=0)

    def __post_init__(self):
        super().__post_init__()
        files = {"noto": self.noto, "fluent": self.fluent}
        if missing := [f"--{name} {file}" for name, file in files.items() if not Path(file).is_file()]:
            raise ValueError(f"not there: {', '.join(missing)}; `npm pack NAME` fetches them, see --help")


def code(name: str) -> str:
    """Code points as the packages can be compared by: upper case, without the variation selector."""
    return "-".join(part for part in name.upper().split("-") if part != "FE0F")


def on_white(data: bytes, resolution: int) -> Image.Image:
    """A square image with transparency, laid on white, and made smaller if it is larger than `resolution`."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    side = min(image.width, resolution)  # a smaller one is enlarged when it is read, and takes less room until then
    return white.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def packed_images(package: str, folder: str) -> dict[str, bytes]:
    """Code -> content of every image in a folder of an npm package, which may have one under two names."""
    with tarfile.open(package) as archive:
        members = [m for m in archive if m.isfile() and m.name.startswith(f"package/{folder}/")]
        return {code(Path(member.name).stem): archive.extractfile(member).read() for member in members}


def styled(row: dict, style: str, in_class: bool) -> dict:
    """A row of OpenMoji's metadata as that of the same emoji in a style, which the class tells if `in_class`."""
    names = {"key": f"{style}-{row['key']}", "file_name": f"images/{style}-{row['key']}.webp"}
    if in_class and style != "openmoji":
        names["subcategory"] = f"{row['subcategory']}-{style}"
    return row | names | {"caption": f"{row['caption']}, {STYLES[style]}"}


def write_folder(config: Config, folder: Path) -> dict[str, int]:
    """Write images, metadata and licences. Returns: style -> number of images. Raises: ValueError for an empty one."""
    rendered = openmoji_folder(config.resolution)
    rows = read_metadata(rendered)
    base = {code(row["key"]): row for row in rows if not row["skin_tone"]}
    (folder / "images").mkdir(parents=True)
    written = []
    for row in rows:
        weight = {} if row["skin_tone"] or config.openmoji_weight == 1 else {"weight": config.openmoji_weight}
        written.append(styled(row, "openmoji", config.style_in_class) | weight)
        (folder / written[-1]["file_name"]).write_bytes((rendered / row["file_name"]).read_bytes())
    for style, package, place in (("noto", config.noto, "img/google/64"), ("fluent", config.fluent, "assets")):
        for name, data in packed_images(package, place).items():
            if name in base:  # neither skin tones nor what OpenMoji has no drawing of
                written.append(styled(base[name], style, config.style_in_class))
                on_white(data, config.resolution).save(folder / written[-1]["file_name"], lossless=True)
    counts = {style: sum(row["key"].startswith(f"{style}-") for row in written) for style in STYLES}
    if empty := [style for style, count in counts.items() if count == 0]:
        raise ValueError(f"no known emoji in --{empty[0]} {getattr(config, empty[0])}, expected the npm package")
    (folder / ATTRIBUTION_NAME).write_text(LICENCES, encoding="utf-8")
    (folder / METADATA_NAME).write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    return counts


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    folder = Path(config.output) / f"openmoji-{OPENMOJI_VERSION}-{config.resolution}"
    if folder.exists():
        raise ValueError(f"{folder} is there already: remove it, or give another --output")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as unfinished:
        counts = write_folder(config, unfinished)
    print(", ".join(f"{count} {style}" for style, count in counts.items()), "images in", folder)
    if config.archive is not None:
        with replacing(Path(config.archive)) as unfinished, tarfile.open(unfinished, "w") as archive:
            archive.add(folder, folder.name)
        print(f"the same in {config.archive}: {Path(config.archive).stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    run(main)
