"""Images through an autoencoder: a picture of originals and reconstructions side by side, and the PSNR of each.

    python pipelines/reconstruct.py --vae weights/openmoji-128/vae --images photo.png drawings \\
        --output demo/reconstruction.png
    python pipelines/reconstruct.py --vae vtp-large --images photos --resolution 512 --output large.png
    python pipelines/reconstruct.py --vae FOLDER --images downloads --skip_unreadable --output reconstruction.png

Images are cropped to squares as ADM does. The PSNR of all is printed; of more than 64 the picture shows 64, spread
evenly over the files. A file that can't be read stops the program, which first writes the picture of the files before
it; with --skip-unreadable such files are counted and left out.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from vtp_diffusion.data.batches import spread_evenly
from vtp_diffusion.data.folders import read_layout
from vtp_diffusion.data.image_files import UnreadableImageError, center_crop, read_image
from vtp_diffusion.data.images import image_grid, pil_to_uint8, to_pil
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import check_output, write_picture
from vtp_diffusion.runtime.processes import check_device
from vtp_diffusion.runtime.programs import print_end

PICTURED = 64  # at most so many originals in the picture, whatever the folder holds


@dataclass(kw_only=True)
class ReconstructConfig(Settings):
    """Options of this program."""

    vae: str = setting(help="folder of a diffusers autoencoder")
    images: list[str] = setting(help="image files, and folders of them")
    output: str = setting(help="FILE.png to write")
    resolution: int | None = setting(None, "side of the images in pixels; none: the autoencoder's", at_least=1)
    batch_size: int = setting(8, "images reconstructed at once", at_least=1)
    skip_unreadable: bool = setting(False, "count and leave out files that can't be read")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "torch device to run on")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)
        suffix = Path(self.output).suffix
        check_output(self.output, suffix if suffix.lower() == ".png" else ".png")

    def files(self) -> list[Path]:
        """The image files. Raises: ValueError if a path does not exist, or a folder holds no images."""
        files = []
        for path in map(Path, self.images):
            if path.is_dir():
                layout = read_layout(path)
                print(layout.describe())
                files += [file for file, _ in layout.of_split("all")]
            elif path.is_file():
                files.append(path)
            else:
                raise ValueError(f"{path} is neither an image file nor a folder")
        if not files:
            raise ValueError("images is empty: give at least one file or folder")
        return files


def open_autoencoder(config: ReconstructConfig) -> tuple[torch.nn.Module, int]:
    """The autoencoder and the side of its input images."""
    from vtp_diffusion.models.image_size import named_image_size
    from vtp_diffusion.models.loading import load_autoencoder

    vae = load_autoencoder(config.vae)
    found = named_image_size(vae)
    if config.resolution is None and found is None:
        raise ValueError(f"no image size of the {type(vae).__name__} is known: --resolution is needed")
    resolution = config.resolution or found[1]
    patch = getattr(vae, "spatial_compression_ratio", 1)
    if resolution % patch:
        raise ValueError(f"resolution must be a multiple of the autoencoder's patch {patch}, got {resolution}")
    return vae.to(config.device), resolution


def batches_of_images(
    config: ReconstructConfig, files: Sequence[Path], resolution: int, skipped: list[Path]
) -> Iterator[list[tuple[Path, Image.Image]]]:
    """Files and their cropped images, some at a time. Files that can't be read are added to `skipped`.

    Raises: UnreadableImageError, after the images before it, unless such files are to be skipped.
    """
    batch = []
    for file in files:
        try:
            batch.append((file, center_crop(read_image(file), resolution)))
        except UnreadableImageError as error:
            if not config.skip_unreadable:
                yield batch
                raise UnreadableImageError(f"{error}. --skip_unreadable leaves such files out") from error
            skipped.append(file)
        if len(batch) == config.batch_size:
            yield batch
            batch = []
    yield batch


def reconstruct_files(
    config: ReconstructConfig, files: Sequence[Path], vae: torch.nn.Module, resolution: int, skipped: list[Path]
) -> Iterator[tuple[Path, Image.Image, Image.Image, float]]:
    """Of each file: original, reconstruction and PSNR in dB. Raises: as of `batches_of_images`."""
    from vtp_diffusion.metrics.pixels import psnr
    from vtp_diffusion.models.latent_space import reconstruct

    for batch in batches_of_images(config, files, resolution, skipped):
        if not batch:
            continue
        originals = torch.stack([pil_to_uint8(image) for _, image in batch])  # (B, 3, R, R)
        made = reconstruct(vae, originals)
        for (file, image), result, ratio in zip(batch, to_pil(made), psnr(originals, made).tolist(), strict=True):
            yield file, image, result, ratio


def draw_picture(output: str, pairs: Sequence[tuple[Image.Image, Image.Image, float]], ratios: list[float]) -> None:
    """`pairs`: original, reconstruction and PSNR of those to draw; `ratios`: the PSNR of all."""
    if not pairs:
        return
    images = [image for original, made, _ in pairs for image in (original, made)]
    labels = [label for *_, ratio in pairs for label in ("original", f"{ratio:.1f} dB")]
    write_picture(Path(output), image_grid(images, 2 * min(4, len(pairs)), labels))
    if len(pairs) < len(ratios):
        print(f"the picture shows {len(pairs)} of {len(ratios)} images")
    print(f"{'mean of ' + str(len(ratios)):40} {sum(ratios) / len(ratios):7.2f} dB")


def main(argv: list[str] | None = None) -> None:
    config = parse_config(ReconstructConfig, argv, __doc__)
    from tqdm.auto import tqdm

    files = config.files()
    if Path(config.output).resolve() in {file.resolve() for file in files}:
        raise ValueError(f"output {config.output} is one of the images, expected another file")
    vae, resolution = open_autoencoder(config)
    pictured, pairs, ratios, skipped = set(spread_evenly(files, PICTURED)), [], [], list[Path]()
    try:
        found = reconstruct_files(config, files, vae, resolution, skipped)
        for file, original, made, ratio in tqdm(found, desc="reconstructing", total=len(files)):
            ratios.append(ratio)
            pairs += [(original, made, ratio)] if file in pictured else []
            tqdm.write(f"{f'{file.parent.name}/{file.name}':40} {ratio:7.2f} dB")
    finally:  # also of the files before one that can't be read
        draw_picture(config.output, pairs, ratios)
    if skipped:
        print(f"{len(skipped)} of {len(files)} files can't be read: {', '.join(map(str, skipped))}")
    if not ratios:
        raise ValueError(f"none of the {len(files)} files can be read as an image")
    then = "eval/reconstruction.py --vae {} --data.source {} --split all --data.resolution {} --output results.json"
    folder = next(filter(os.path.isdir, config.images), "FOLDER")
    then += " --data.skip_unreadable" * config.skip_unreadable
    print_end([config.output], then, config.vae, folder, resolution)


if __name__ == "__main__":
    run(main)
