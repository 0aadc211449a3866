"""Images through an autoencoder: a picture of originals and reconstructions side by side, and the PSNR of each.

    python pipelines/reconstruct.py --vae weights/openmoji-128/vae --images photo.png drawings \\
        --output demo/reconstruction.png
    python pipelines/reconstruct.py --vae vtp-large --images photos --resolution 512 --output large.png
    python pipelines/reconstruct.py --vae FOLDER --images downloads --skip_unreadable --output reconstruction.png

Images are cropped to squares as ADM does. A file that can't be read stops the program, which first writes the picture
of the files before it; with --skip-unreadable such files are counted and left out.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from vtp_diffusion.data.folders import read_layout
from vtp_diffusion.data.image_files import UnreadableImageError, center_crop, read_image
from vtp_diffusion.data.images import image_grid, pil_to_uint8, to_pil
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import write_picture
from vtp_diffusion.runtime.processes import check_device
from vtp_diffusion.runtime.programs import print_end


@dataclass(kw_only=True)
class ReconstructConfig(Settings):
    """Options of this program."""

    vae: str = setting(help="folder of a diffusers autoencoder")
    images: list[str] = setting(help="image files, and folders of them")
    output: str = setting(help="FILE.png to write")
    resolution: int | None = setting(None, "side of the images in pixels; none: the autoencoder's", at_least=1)
    skip_unreadable: bool = setting(False, "count and leave out files that can't be read")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "torch device to run on")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)
        if Path(self.output).suffix.lower() != ".png":
            raise ValueError(f"output is {self.output}, expected a FILE.png")

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
    from vtp_diffusion.models.loading import load_autoencoder

    vae = load_autoencoder(config.vae)
    # AutoencoderRAE calls it image_size; AutoencoderDC has neither
    resolution = config.resolution or vae.config.get("sample_size") or vae.config.get("image_size")
    if resolution is None:
        raise ValueError(f"the configuration of {type(vae).__name__} names no image size: --resolution is needed")
    patch = getattr(vae, "spatial_compression_ratio", 1)
    if resolution % patch:
        raise ValueError(f"resolution must be a multiple of the autoencoder's patch {patch}, got {resolution}")
    return vae.to(config.device), resolution


def draw_picture(output: str, images: list[Image.Image], ratios: list[float]) -> None:
    """`images` are originals and reconstructions in turn, `ratios` the PSNR of each pair."""
    if not images:
        return
    labels = [label for ratio in ratios for label in ("original", f"{ratio:.1f} dB")]
    write_picture(Path(output), image_grid(images, 2 * min(4, len(ratios)), labels))
    print(f"{'mean of ' + str(len(ratios)):40} {sum(ratios) / len(ratios):7.2f} dB")


def main(argv: list[str] | None = None) -> None:
    config = parse_config(ReconstructConfig, argv, __doc__)
    from tqdm.auto import tqdm

    from vtp_diffusion.metrics.pixels import psnr
    from vtp_diffusion.models.latent_space import reconstruct

    files = config.files()
    vae, resolution = open_autoencoder(config)
    images, ratios, skipped = [], [], []
    for file in tqdm(files, desc="reconstructing"):
        try:
            image = center_crop(read_image(file), resolution)
        except UnreadableImageError:
            if not config.skip_unreadable:
                draw_picture(config.output, images, ratios)
                raise
            skipped.append(file)
            continue
        original = pil_to_uint8(image)[None]  # (1, 3, R, R)
        reconstruction = reconstruct(vae, original)
        ratios.append(psnr(original, reconstruction).item())
        images += [image, to_pil(reconstruction)[0]]
        tqdm.write(f"{f'{file.parent.name}/{file.name}':40} {ratios[-1]:7.2f} dB")
    draw_picture(config.output, images, ratios)
    if skipped:
        print(f"{len(skipped)} of {len(files)} files can't be read: {', '.join(map(str, skipped))}")
    if not images:
        raise ValueError(f"none of the {len(files)} files can be read as an image")
    then = "eval/reconstruction.py --vae {} --data.source {} --split all --data.resolution {} --output results.json"
    folder = next(filter(os.path.isdir, config.images), "FOLDER")
    print_end([config.output], then, config.vae, folder, resolution)


if __name__ == "__main__":
    run(main)
