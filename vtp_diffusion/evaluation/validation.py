"""Validation during training: sample grid and quick Fréchet distance, beside its real-vs-real baseline."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..data.image_datasets import DataConfig, ImageDataset, open_dataset
from ..data.images import image_grid
from ..generation.sampler_config import GuidanceConfig
from ..generation.sampling import draw_labels, initial_noise
from ..metrics.features import extract_features
from ..metrics.frechet import floor_of_halves
from ..metrics.networks import FEATURE_NETWORKS, feature_network
from ..runtime.config import Settings, build_config, setting
from ..runtime.processes import gather_objects, this_process
from ..runtime.reproducibility import random_stream
from .sources import DatasetImages, ImageSource, PipelineImages, image_batches, pipeline_image_size

if TYPE_CHECKING:
    from ..generation.pipeline_lightning_dit import LightningDiTPipeline
    from ..training.loop import TrainingRun


@dataclass(kw_only=True)
class DistanceConfig(Settings):
    """Settings of the quick distance: too few images for a number to publish, enough to follow training."""

    num_images: int = setting(0, "samples, of random classes; 0: no distance is measured", at_least=0)
    network: str = setting("vgg16", f"feature network: one of {', '.join(FEATURE_NETWORKS)}, vtp:FOLDER")
    weights: str | None = setting(None, "file of its weights; none: from the installed package or the download cache")
    reference: DataConfig | None = setting(
        None,
        "real images, at the resolution of the samples; none: those that the latents were made from, or that training "
        "encodes",
    )
    batch_size: int = setting(32, "images at once", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.num_images == 1:
            raise ValueError("distance.num_images is 1, expected 0 or at least 2 images")


@dataclass(kw_only=True)
class ValidationConfig(GuidanceConfig):
    """Settings of validations, which sample with the EMA weights, each time from the same noise."""

    labels: list[int | str] = setting(default_factory=list, help="class indices or names, one image each")
    num_inference_steps: int = setting(50, "Euler steps", at_least=1)
    seed: int = setting(0, "of the noise; that of image k follows from seed and k", at_least=0)
    distance: DistanceConfig = setting(default_factory=DistanceConfig)

    @property
    def sampler(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call."""
        return {"num_inference_steps": self.num_inference_steps} | self.guidance_arguments


def check_validation(config: ValidationConfig, pipeline: "LightningDiTPipeline") -> None:
    """Raises: ValueError: labels that are no classes of the pipeline, or guidance that it does not support."""
    try:
        pipeline.get_label_ids(config.labels or [0])
    except ValueError as error:  # most often labels of a configuration that was written for other images
        raise ValueError(f"validation.labels are not classes of these images: {error}") from error
    if config.guidance == "autoguidance":
        raise ValueError(
            "validation.guidance is autoguidance, expected another kind: the guide (guide.step, guide.transformer) "
            "joins the pipeline when training has ended"
        )
    try:
        config.check_pipeline(pipeline, config.num_inference_steps)
    except ValueError as error:
        raise ValueError(f"validation.{error}") from error


def sample_grid(config: ValidationConfig, pipeline: "LightningDiTPipeline") -> Image.Image:
    """One labelled image for each validation label, image k from its `initial_noise`."""
    indices = pipeline.get_label_ids(config.labels)
    latents = initial_noise(pipeline, range(len(indices)), config.seed)
    images = pipeline(class_labels=indices, latents=latents, **config.sampler).images
    names = [pipeline.config.id2label[str(index)].split(",")[0] for index in indices]
    return image_grid(images, columns=min(8, len(images)), labels=names)


def open_real_images(
    reference: DataConfig | None, resolution: int, metadata: dict[str, Any] | None
) -> tuple[ImageDataset, str]:
    """The training split of a reference, or without one the images that latents were made from; and their source.

    Args: `metadata`: of the latents; its `data` has the settings, split and fingerprint of their images.
    Raises: ValueError: no reference, and the latents do not say which images they are of, or these have changed.
    """
    if reference is not None:
        dataset = open_dataset(replace(reference, resolution=resolution), "train")
        return dataset, reference.data_files or reference.source
    given = (
        "distance.num_images is given without distance.reference: expected the images that the latents were made from"
    )
    advice = "give --validation.distance.reference.source and what else tells the real images"
    made_of = (metadata or {}).get("data")
    if made_of is None:
        raise ValueError(f"{given}, but the latents do not say which these are: {advice}")
    known = {field.name for field in fields(DataConfig)} & made_of.keys()
    try:
        config = build_config(DataConfig, {name: made_of[name] for name in known}, "latents.json", "data.")
        dataset = open_dataset(replace(config, resolution=resolution), made_of["split"])
    except ValueError as error:
        raise ValueError(f"{given}, but these cannot be opened: {advice}. {error}") from error
    if made_of["fingerprint"] not in (dataset.fingerprint, *dataset.older_fingerprints):
        raise ValueError(f"{given}, but {made_of['source']} holds other images now: {advice}")
    return dataset, config.data_files or config.source


class QuickDistance:
    """Fréchet distance of N samples to N real images, and the floor: that of N other real images to the same N.

    Both have the same bias, which is large at such sizes, so they may be compared with each other but with no other
    number. The real images are 2 N random ones of the reference, without variants. The processes share the work, and
    the result does not depend on their number.

    Args: `metadata`: of what is trained on, for `open_real_images`.
    Attributes: `reference_text`: the reference in words.
    Raises:
        ValueError: a reference of fewer than 2 N images, more processes than images, or an unknown feature network;
            as `open_real_images`.
    """

    def __init__(self, config: DistanceConfig, seed: int, resolution: int, metadata: dict[str, Any] | None = None):
        self.config, self.seed = config, seed
        if config.num_images < this_process()[1]:
            raise ValueError(
                f"distance.num_images is {config.num_images}, which {this_process()[1]} processes cannot share: "
                "expected at least one image each"
            )
        dataset, source = open_real_images(config.reference, resolution, metadata)
        self.network = feature_network(config.network, config.weights)
        self.reference = DatasetImages(dataset)
        originals = torch.nonzero(~dataset.variants).flatten().numpy()
        if len(originals) < 2 * config.num_images:
            raise ValueError(
                f"distance.num_images is {config.num_images}: the floor takes twice as many real images, "
                f"{source} has {len(originals)}"
            )
        self.reference_text = f"{len(originals)} images of {source}"
        chosen = random_stream("reference images", seed).permutation(originals)[: 2 * config.num_images]
        self.chosen = sorted(chosen.tolist())
        self._reference_features: torch.Tensor | None = None

    def measure(self, pipeline: "LightningDiTPipeline", device: torch.device, **sampler: float) -> dict[str, float]:
        """The distance under its name, its floor, the number of images and the reference. All processes must call
        this."""
        count, classes = self.config.num_images, pipeline.transformer.config.num_classes
        labels = draw_labels("random", count, classes, self.seed)
        samples = PipelineImages(pipeline, labels, self.seed, self.config.batch_size, **sampler)
        generated = self._features(samples, range(count), device)
        if self._reference_features is None:
            self._reference_features = self._features(self.reference, self.chosen, device)
        self.network.cpu()  # training needs the GPU memory
        floor, name = floor_of_halves(generated, self._reference_features, self.seed), self.network.distance_name
        values = {name: floor.generated, f"{name}_floor": floor.real, f"{name}_images": floor.sizes[0]}
        return values | {f"{name}_reference": self.reference_text}

    def _features(self, source: ImageSource, indices: Sequence[int], device: torch.device) -> torch.Tensor:
        """Features (N, D) on every process; each of the P processes computes those of every P-th image."""
        rank, processes = this_process()
        mine = list(indices)[rank::processes]
        parts = gather_objects(
            extract_features(self.network, image_batches(source, mine, self.config.batch_size), device)
        )
        features = torch.empty(len(indices), parts[0].shape[1])
        for k, part in enumerate(parts):
            features[k::processes] = part
        return features


def open_distance(
    config: ValidationConfig, pipeline: "LightningDiTPipeline", metadata: dict[str, Any] | None
) -> QuickDistance | None:
    """The Fréchet distance of validations, if the configuration asks for one. Args, Raises: as of `QuickDistance`."""
    if config.distance.num_images == 0:
        return None
    return QuickDistance(config.distance, config.seed, pipeline_image_size(pipeline)[0], metadata)


def report_validation(
    config: ValidationConfig,
    run: "TrainingRun",
    pipeline: "LightningDiTPipeline",
    distance: QuickDistance | None,
    step: int,
) -> None:
    """Report the quick distance and a sample grid of a pipeline with the EMA weights. All processes must call this."""
    values = {} if distance is None else distance.measure(pipeline, run.device, **config.sampler)
    draw = run.is_main and config.labels
    run.report(step, values, sample_grid(config, pipeline) if draw else None)


def validated_steps(
    run: "TrainingRun", distance: QuickDistance | None, validate: Callable[[int], None]
) -> Iterator[int]:
    """The steps of a run that trains a generator, with validations in between, if they report anything.

    Args: `validate`: called with the number of steps done, whenever a validation is due; also before the first step
        if the interrupted run missed its last one.
    """
    config = run.config
    watched = bool(config.validation.labels) or distance is not None
    if watched and run.validation_missed(None if distance is None else distance.network.distance_name):
        validate(run.first_step)
    for step in run.steps():
        yield step
        if watched and run.due(step, config.validation_steps):
            run.save_due(step)
            validate(step + 1)
