"""A page in the browser: images of classes by name, reconstructions of pictures, nearest training images.

    python pipelines/app.py
    python pipelines/app.py --pipeline runs/dit-openmoji/pipeline weights/openmoji-128 --reference openmoji
    python pipelines/app.py --pipeline FOLDER --reference train.npz --port 8080

The page is served on this machine until Ctrl-C. --reference gives the training images of the first pipeline: each
generated image is then shown with its nearest training image (extra `eval`). Their features are computed before the
page opens: 3,415 images of OpenMoji took 2.4 minutes of one CPU core.
Image k of a request depends only on the seed, k and its label, so pipelines/generate.py makes the same images.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from PIL import Image

from vtp_diffusion.data.image_files import UnreadableImageError, center_crop, read_image
from vtp_diffusion.data.images import enlarged, pil_to_uint8, to_pil
from vtp_diffusion.evaluation.sources import check_real_images, pipeline_image_size
from vtp_diffusion.evaluation.training_images import TrainingImages
from vtp_diffusion.generation.pipeline_checks import default_steps, guidance_kinds
from vtp_diffusion.generation.sampler_config import SamplerConfig, Solver
from vtp_diffusion.generation.sampling import open_pipeline, sample_numbers
from vtp_diffusion.generation.solvers import use_solver
from vtp_diffusion.metrics.pixels import psnr
from vtp_diffusion.models.latent_space import reconstruct
from vtp_diffusion.runtime.cli import INPUT_ERRORS, run
from vtp_diffusion.runtime.config import Settings, build_config, parse_config, setting
from vtp_diffusion.runtime.optional_packages import require
from vtp_diffusion.runtime.processes import check_device

if TYPE_CHECKING:
    from gradio import Blocks

    from vtp_diffusion import LightningDiTPipeline

Pictures = list[tuple[Image.Image, str]]  # with captions
MOST_IMAGES = 64  # of one request
# captions in several lines instead of cut; two columns on phones
STYLE = """.caption-label {white-space: normal !important; overflow-wrap: anywhere}
@media (max-width: 700px) {.grid-container {grid-template-columns: repeat(2, 1fr) !important}}"""


@dataclass(kw_only=True)
class AppConfig(Settings):
    """Options of this program."""

    pipeline: list[str] = setting(
        default_factory=lambda: ["weights/openmoji-128"], help="folders of saved pipelines to choose from"
    )
    reference: str | None = setting(None, "training images: npz, folder, openmoji or a `datasets` collection")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "torch device to run on")
    port: int = setting(7860, "port of this machine that the page is served on", at_least=1, at_most=65535)
    share: bool = setting(False, "a public address through gradio's servers: whoever has it can use the page")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)
        if not self.pipeline:
            raise ValueError("pipeline is empty: give the folder of at least one saved pipeline")
        if self.reference is not None:
            check_real_images(self.reference, "reference")


class Page:
    """The computations behind the page, with one pipeline loaded at a time."""

    def __init__(self, config: AppConfig):
        for folder in config.pipeline:
            if not (Path(folder) / "model_index.json").is_file():
                raise ValueError(f"expected folders of saved pipelines, {folder} has no model_index.json")
        self.config, self.folder, self.training = config, None, None
        pipe = self.open(config.pipeline[0])
        if config.reference is not None:
            self.training = TrainingImages(config.reference, pipeline_image_size(pipe), config.device)

    def open(self, folder: str) -> LightningDiTPipeline:
        """The pipeline in a folder, which stays loaded until another one is asked for."""
        if folder != self.folder:
            pipe = open_pipeline(folder, None, self.config.device)
            if not hasattr(pipe, "get_label_ids") or pipe.vae is None:
                raise ValueError(f"{folder} holds a {type(pipe).__name__}, expected a LightningDiTPipeline with a vae")
            self.folder, self.pipe, self.scheduler = folder, pipe, pipe.scheduler
        return self.pipe

    def names(self, folder: str) -> list[str]:
        """Names of a pipeline's classes; the index of a class without a name."""
        pipe = self.open(folder)
        known = pipe.config.id2label or {}
        return [known.get(str(index), str(index)) for index in range(pipe.transformer.config.num_classes)]

    def settings(self, folder: str) -> tuple[int, float, str, list[str]]:
        """Steps, guidance scale and solver that fit a pipeline, and the kinds of guidance it has."""
        pipe = self.open(folder)
        if student := pipe.transformer.config.get("student"):
            return default_steps(student), 1.0, "pipeline", ["auto"]
        return 15, 4.0, "unipc", guidance_kinds(pipe)

    def generate(
        self, folder: str, labels: list[str], each: int, advance: Callable | None = None, **sampler: Any
    ) -> tuple[Pictures, Pictures]:
        """Images of each label and, with a reference, the nearest training image of each.

        Args: `each`: images per label; `sampler`: fields of `SamplerConfig`. Raises: ValueError for wrong input.
        """
        config = build_config(SamplerConfig, sampler, "the page")
        pipe = self.open(folder)
        ids = [index for index in pipe.get_label_ids(labels or []) for _ in range(each)]
        if not 1 <= len(ids) <= MOST_IMAGES:
            raise ValueError(f"{len(labels)} classes with {each} images each, expected 1 to {MOST_IMAGES} images")
        pipe.scheduler = self.scheduler
        use_solver(pipe, config.solver)
        images = sample_numbers(pipe, ids, range(len(ids)), config.seed, advance, **config.sampler)
        names = self.names(folder)
        pictures = [(enlarged(p), names[k]) for p, k in zip(to_pil(images), ids, strict=True)]
        if self.training is None:
            return pictures, []
        found, distances = self.training.nearest(images)
        return pictures, [(enlarged(p), f"distance {d:.3f}") for p, d in zip(to_pil(found), distances, strict=True)]

    def reconstruct(self, folder: str, file: str | None) -> Pictures:
        """The centre crop of a picture, and what the autoencoder makes of it."""
        if file is None:
            raise ValueError("there is no picture yet: choose one first")
        pipe = self.open(folder)
        side = pipeline_image_size(pipe)[0]
        try:
            image = read_image(file)
        except UnreadableImageError as error:  # whose message names the uploaded copy
            raise ValueError(f"{Path(file).name} cannot be read as an image") from error
        original = pil_to_uint8(center_crop(image, side))[None]  # (1, 3, R, R)
        result = reconstruct(pipe.vae, original)
        given, made = map(enlarged, to_pil(torch.cat([original, result])))
        caption = f"reconstruction, {psnr(original, result).item():.1f} dB"
        return [(given, f"original, {side} x {side}"), (made, caption)]


def build_page(page: Page) -> Blocks:
    """The page: inputs, what they start, and one message for wrong input."""
    gradio = require("gradio", extra="app")
    folders, names = page.config.pipeline, page.names(page.config.pipeline[0])
    steps, scale, solver, kinds = page.settings(folders[0])

    def readable(function: Callable, *arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except INPUT_ERRORS as error:  # shown as HTML; other errors print their traceback
            raise gradio.Error(html.escape(str(error)), duration=None, print_exception=False) from error

    def generate(folder, labels, each, seed, steps, scale, solver, kind, progress=gradio.Progress()):  # noqa: B008
        done = itertools.count(1)
        advance = lambda: progress((next(done), None), desc="network", unit="evaluations")  # noqa: E731
        sampler = {"seed": seed, "num_inference_steps": steps, "guidance_scale": scale, "solver": solver}
        return readable(page.generate, folder, labels, each, advance, **sampler, guidance=kind)

    def of_pipeline(folder):
        names = readable(page.names, folder)
        *numbers, kinds = page.settings(folder)
        return (
            gradio.Dropdown(choices=names, value=names[:2], **several),
            *numbers,
            gradio.Dropdown(choices=kinds, value="auto"),
        )

    several = {"multiselect": True, "allow_custom_value": True}  # custom: an index or a synonym
    alone = {"concurrency_id": "pipeline", "concurrency_limit": 1}  # one request at a time
    with gradio.Blocks(title="vtp-diffusion", analytics_enabled=False) as blocks:
        gradio.Markdown("# vtp-diffusion")
        folder = gradio.Dropdown(folders, value=folders[0], label="Pipeline")
        with gradio.Tab("Generate"), gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                labels = gradio.Dropdown(names, value=names[:2], label="Classes", **several)
                each = gradio.Slider(1, 16, value=4, step=1, label="Images of each class")
                steps = gradio.Slider(1, 250, value=steps, step=1, label="Steps")
                scale = gradio.Slider(1, 10, value=scale, step=0.1, label="Guidance scale (1: none)")
                kind = gradio.Dropdown(kinds, value="auto", label="Guidance")
                solver = gradio.Dropdown(get_args(Solver), value=solver, label="Solver")
                seed = gradio.Number(0, label="Seed", precision=0)
                start = gradio.Button("Generate", variant="primary")
            with gradio.Column(scale=3, min_width=300):
                images = gradio.Gallery(label="Images", columns=4, height="auto")
                nearest = gradio.Gallery(label="Nearest", columns=4, height="auto", visible=page.training is not None)
        with gradio.Tab("Reconstruct"), gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                picture = gradio.File(label="Picture", type="filepath", file_types=["image"])
                give_back = gradio.Button("Reconstruct", variant="primary")
            with gradio.Column(scale=3, min_width=300):
                pair = gradio.Gallery(label="Original and reconstruction", columns=2, height="auto")
        sampling = [folder, labels, each, seed, steps, scale, solver, kind]
        start.click(generate, sampling, [images, nearest], api_name="generate", **alone)
        give_back.click(partial(readable, page.reconstruct), [folder, picture], pair, api_name="reconstruct", **alone)
        chosen = [labels, steps, scale, solver, kind]
        folder.change(of_pipeline, folder, chosen, api_name="of_pipeline", **alone)
    return blocks


def appearance() -> dict[str, Any]:
    """Arguments of `launch` for the page's look. Fonts are the browser's: none are downloaded."""
    theme = require("gradio", extra="app").themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return {"theme": theme, "css": STYLE, "quiet": True}


def main(argv: list[str] | None = None) -> None:
    config = parse_config(AppConfig, argv, __doc__)
    require("gradio", extra="app")
    blocks = build_page(Page(config))
    blocks.launch(server_port=config.port, share=config.share, prevent_thread_lock=True, **appearance())
    print(f"the page is at {blocks.share_url or blocks.local_url} (Ctrl-C ends it)", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    run(main)
