"""Train a LightningDiT; the result is a diffusers pipeline.

    accelerate launch train_dit/train.py --config train_dit/configs/openmoji.yaml

It learns from the latents that train_dit/extract_latents.py wrote. With `latents: null` it learns online, from the
images of `data`: the autoencoder then runs in every step, on images changed as `augmentation` says.

Every field of the configuration is also an option (--help lists them): --learning_rate 1e-3, --model.num_layers 8.
The same command again resumes an interrupted run, with any number of processes that train_batch_size can be divided
among; while it runs, a second start in the same folder is refused. SIGTERM and SIGINT save and stop it. (`accelerate
launch` of one process does not pass SIGTERM on. Where only the launcher is told, as in a container, start one process
with python instead.) The run folder ends with pipeline/, which DiffusionPipeline.from_pretrained loads. Sharded
weights, for models that do not fit otherwise:

    accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 train_dit/train.py --config ...

Autoguidance (arXiv:2406.02507): with --guide.step 20000 the averaged weights of that step, with --guide.transformer
FOLDER a smaller transformer trained on the same latents becomes the pipeline's guidance_transformer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoModel, FlowMatchEulerDiscreteScheduler
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from vtp_diffusion import AutoencoderVTP, LightningDiTPipeline, LightningDiTTransformer2DModel
from vtp_diffusion.data.augmentation import AugmentationConfig
from vtp_diffusion.data.image_datasets import DataConfig, open_dataset
from vtp_diffusion.data.latent_shards import LatentDataset
from vtp_diffusion.evaluation.sources import pipeline_image_size
from vtp_diffusion.evaluation.validation import QuickDistance, ValidationConfig, sample_grid
from vtp_diffusion.generation.flow_matching import (
    dimension_shift,
    drop_labels,
    flow_matching_loss,
    interpolate,
    sample_times,
    shift_times,
    sums_by_time,
)
from vtp_diffusion.generation.latent_inputs import OnlineLatents, check_latents, class_names, stored_latents
from vtp_diffusion.models.latent_space import encode_raw, latent_statistics
from vtp_diffusion.runtime.cli import run as run_program
from vtp_diffusion.runtime.config import check_sizes, parse_config
from vtp_diffusion.runtime.disk import writing
from vtp_diffusion.runtime.processes import this_process
from vtp_diffusion.training.checkpoints import export_averaged
from vtp_diffusion.training.compilation import compile_modules
from vtp_diffusion.training.config import TrainingConfig
from vtp_diffusion.training.loop import TrainingRun
from vtp_diffusion.training.rates import forward_flops
from vtp_diffusion.training.run_folder import RunFolder

GUIDE = "guidance_transformer"  # as the pipeline and, until then, the run folder call it


@dataclass(kw_only=True)
class ModelConfig:
    """Architecture of the transformer; what the latents decide (channels, size) is taken from them."""

    num_classes: int | None = field(
        default=None, metadata={"help": "classes; none: as many as the training data names"}
    )
    patch_size: int = field(default=1, metadata={"help": "latent pixels a side of a token"})
    num_layers: int = field(default=28, metadata={"help": "blocks"})
    num_attention_heads: int = field(default=16, metadata={"help": "heads; the width is heads x head dimension"})
    attention_head_dim: int = field(default=72, metadata={"help": "channels of a head"})
    qk_norm: bool = field(default=False, metadata={"help": "RMSNorm on queries and keys"})

    def __post_init__(self):
        check_sizes(self, "model")


@dataclass(kw_only=True)
class GuideConfig:
    """The weaker network that the pipeline guides with (autoguidance, arXiv:2406.02507), if any."""

    step: int | None = field(default=None, metadata={"help": "the averaged weights of this step of the run"})
    transformer: str | None = field(default=None, metadata={"help": "folder of a transformer trained elsewhere"})

    def __post_init__(self):
        if self.step is not None and self.transformer is not None:
            raise ValueError(
                f"guide.step is {self.step} and guide.transformer {self.transformer}, expected one of them"
            )


@dataclass(kw_only=True)
class Config(TrainingConfig):
    """Settings of this program."""

    # Where these two lie may change: what is in them is compared with the checkpoint (latents) and the latents (vae).
    vae: str = field(metadata={"help": "folder of the autoencoder that made the latents", "may_change": True})
    latents: str | None = field(
        metadata={
            "help": "folder of latent shards, as train_dit/extract_latents.py writes them; none: train online",
            "may_change": True,
        }
    )
    data: DataConfig | None = field(
        default=None, metadata={"help": "online: the images; with latents: what they have to be made from"}
    )
    augmentation: AugmentationConfig = field(
        default_factory=AugmentationConfig, metadata={"help": "online: changes of the images, besides random_flip"}
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    initial_transformer: str | None = field(
        default=None,
        metadata={"help": "folder of a saved transformer to start from, as transformer_ema/; None = fresh"},
    )
    class_dropout_prob: float = field(default=0.1, metadata={"help": "share of labels replaced by the null class"})
    time_distribution: Literal["logit_normal", "uniform"] = field(
        default="logit_normal", metadata={"help": "of the training times, before time_shift"}
    )
    time_mu: float = field(default=-0.5, metadata={"help": "of the logit-normal times; -0.75 in VTP-Large's training"})
    time_sigma: float = field(
        default=1.25, metadata={"help": "of the logit-normal times; 1.0 in VTP-Large's training"}
    )
    time_shift: float | Literal["dimensions"] = field(
        default=1.0,
        metadata={
            "help": "shift s of the training times, 1 is none; dimensions: by the size of the latents, as in RAE"
        },
    )
    cosine_loss: bool = field(default=True, metadata={"help": "add 1 - cosine similarity of the velocities"})
    random_flip: bool = field(default=True, metadata={"help": "mirror half of the images"})
    shift: float | Literal["dimensions"] = field(
        default=0.3, metadata={"help": "time shift s that the pipeline samples with, as time_shift"}
    )
    guide: GuideConfig = field(default_factory=GuideConfig, metadata={"may_change": True})
    save_dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "weights in pipeline/"})
    validation: ValidationConfig = field(
        default_factory=ValidationConfig, metadata={"help": "sample grids and distances", "may_change": True}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob is {self.class_dropout_prob}, expected a number in [0, 1]")
        for name in ("time_sigma", "time_shift", "shift"):
            value = getattr(self, name)
            if value != "dimensions" and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, expected a positive number")
        if self.guide.step is not None and not 0 < self.guide.step <= self.max_train_steps:
            raise ValueError(f"guide.step is {self.guide.step}, expected a step from 1 to {self.max_train_steps}")
        if self.latents is None and self.data is None:
            raise ValueError("latents is none: training online needs data (data.source, data.resolution)")
        if self.latents is not None and self.augmentation != AugmentationConfig():
            raise ValueError("augmentation changes images while training online: with latents it can do nothing")


class FlowMatchingObjective(nn.Module):
    """Velocity loss of LightningDiT (arXiv:2501.01423): mean squared error, plus 1 - cosine similarity."""

    def __init__(self, transformer: LightningDiTTransformer2DModel, cosine_loss: bool):
        super().__init__()
        self.transformer, self.cosine_loss = transformer, cosine_loss

    def forward(
        self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`latents`, `noise`: (B, C, h, w); `times`: (B,) in [0, 1]; `labels`: (B,), dropped already."""
        return self.losses(latents, noise, times, labels)

    def losses(self, latents, noise, times, labels) -> dict[str, torch.Tensor]:
        """`forward` without what accelerate wraps around it: this is what is compiled."""
        prediction = self.transformer(interpolate(latents, noise, times), times, labels, return_dict=False)[0]
        squared_errors, cosines = flow_matching_loss(prediction, latents, noise)  # (B,), (B,)
        by_time = sums_by_time(squared_errors.detach(), times)
        squared_error, cosine = squared_errors.mean(), cosines.mean()
        total = squared_error + cosine if self.cosine_loss else squared_error
        return {"loss": total, "squared_error": squared_error, "cosine": cosine, "squared_error_by_time": by_time}


def open_training_data(config: Config, vae) -> LatentDataset | OnlineLatents:
    """Shards that fit the autoencoder, or without any the images themselves, to be encoded on the way."""
    if config.latents is not None:
        dataset = LatentDataset(config.latents)
        check_latents(dataset, vae, config.data)
    else:
        latent_statistics(vae)  # refuses an autoencoder that should have them and does not
        dataset = OnlineLatents(open_dataset(config.data, "train"), vae, config.data, config.augmentation)
    dataset.id2label = class_names(dataset, config.model.num_classes)
    return dataset


def build_transformer(config: Config, dataset: LatentDataset | OnlineLatents) -> LightningDiTTransformer2DModel:
    """A fresh network, or the one to start from.

    Raises: ValueError if that one has another architecture than the configuration and the latents ask for.
    """
    architecture = {
        "sample_size": dataset.shape[-1],
        "in_channels": dataset.shape[0],
        **vars(config.model),
        "num_classes": len(dataset.id2label),
    }
    if config.initial_transformer is None:
        transformer = LightningDiTTransformer2DModel(**architecture, class_dropout_prob=config.class_dropout_prob)
        transformer.initialize_weights()
        return transformer
    transformer = LightningDiTTransformer2DModel.from_pretrained(config.initial_transformer)
    if other := [
        f"{k} {transformer.config[k]} instead of {v}" for k, v in architecture.items() if transformer.config[k] != v
    ]:
        raise ValueError(f"initial_transformer {config.initial_transformer} does not fit: {', '.join(other)}")
    transformer.register_to_config(class_dropout_prob=config.class_dropout_prob)
    return transformer


def latent_batches(run: TrainingRun, config: Config, dataset: LatentDataset | OnlineLatents) -> Iterator[dict]:
    """Raw latents and labels on the device, for every micro-step still to do."""
    sampler = run.batch_sampler(len(dataset), dataset.weights)
    common = (sampler, config.random_flip, run.device, config.keep_on_device, config.dataloader_num_workers)
    if isinstance(dataset, LatentDataset):
        return stored_latents(dataset, *common)
    encode = torch.compile(encode_raw) if config.compile else encode_raw
    return dataset.batches(*common, config.mixed_precision, encode)


def time_shift(value: float | Literal["dimensions"], dataset: LatentDataset | OnlineLatents) -> float:
    return dimension_shift(math.prod(dataset.shape)) if value == "dimensions" else value


def training_inputs(
    run: TrainingRun, config: Config, dataset: LatentDataset | OnlineLatents, vae, null: int
) -> Iterator[dict]:
    """What the objective is called with, micro-step by micro-step; everything random is keyed by the position in the
    run, whatever the number of processes."""

    shift = time_shift(config.time_shift, dataset)

    def draw(count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        place = {"generator": generator, "device": run.device}
        noise = torch.randn(count, *dataset.shape, **place)
        if config.time_distribution == "uniform":
            times = torch.rand(count, **place)
        else:
            times = sample_times(count, config.time_mu, config.time_sigma, **place)
        return {"noise": noise, "times": shift_times(times, shift), "drop": torch.rand(count, **place)}

    mean, std = (s.to(run.device) for s in latent_statistics(vae))  # (1, C, 1, 1)
    for micro_step, batch in zip(run.micro_steps, latent_batches(run, config, dataset), strict=True):
        random = run.draw(micro_step, draw)
        yield {
            "latents": (batch["latents"].float() - mean) / std,
            "noise": random["noise"],
            "times": random["times"],
            "labels": drop_labels(batch["labels"], config.class_dropout_prob, null, random=random["drop"]),
        }


def build_pipeline(config: Config, vae, transformer, dataset, guide=None) -> LightningDiTPipeline:
    """The pipeline that samples as the configuration says; upstream's time shift s is a scheduler shift of 1/s."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / time_shift(config.shift, dataset))
    pipeline = LightningDiTPipeline(
        vae=vae, transformer=transformer, scheduler=scheduler, guidance_transformer=guide, id2label=dataset.id2label
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_guide(config: Config, folder: RunFolder, transformer: LightningDiTTransformer2DModel) -> None:
    """Raises: ValueError if the guide is one of other latents or classes, or its step is over without it."""
    step, checkpoints = config.guide.step, folder.checkpoints()
    if step is not None and checkpoints and checkpoints[-1][0] >= step and not (folder.path / GUIDE).is_dir():
        raise ValueError(
            f"guide.step is {step}, but the run goes on after step {checkpoints[-1][0]} and has no {GUIDE}/: name a "
            "checkpoint's transformer_ema as guide.transformer"
        )
    if config.guide.transformer is not None:
        other, own = LightningDiTTransformer2DModel.load_config(config.guide.transformer), transformer.config
        keys = ("sample_size", "in_channels", "num_classes")
        if different := [f"{k} {other.get(k)} instead of {own[k]}" for k in keys if other.get(k) != own[k]]:
            raise ValueError(f"guide.transformer {config.guide.transformer} does not fit: {', '.join(different)}")


def open_guide(config: Config, run: TrainingRun) -> LightningDiTTransformer2DModel | None:
    if config.guide.transformer is None and config.guide.step is None:
        return None
    return LightningDiTTransformer2DModel.from_pretrained(config.guide.transformer or run.folder.path / GUIDE)


def validate(config: Config, run: TrainingRun, vae, dataset, distance: QuickDistance | None, step: int) -> None:
    """A grid and a distance of the averaged weights, guided without a classifier where the settings ask for it."""
    with run.averaged_model() as model:
        pipeline = build_pipeline(config, vae, model, dataset)
        values = {} if distance is None else distance.measure(pipeline, run.device, **config.validation.sampler)
        draw = run.is_main and config.validation.labels
        run.report(step, values, sample_grid(config.validation, pipeline, run.device) if draw else None)


def save_pipeline(config: Config, run: TrainingRun, pipeline: LightningDiTPipeline, dataset) -> Path:
    """Write pipeline/ with its model card."""
    folder = run.folder.path / "pipeline"
    if config.save_dtype == "bfloat16":
        pipeline.to(dtype=torch.bfloat16)
    with writing(folder, "The run is over and its last checkpoint there: the same command writes it again"):
        pipeline.save_pretrained(folder)
    # diffusers' load_or_create_model_card wants a Hub repository and a network, its template leaves gaps: written here
    known = dataset.metadata or {}
    data = ModelCardData(
        library_name="diffusers", pipeline_tag="unconditional-image-generation", license=known.get("license")
    )
    text = card_text(config, run, dataset, type(pipeline.vae).__name__)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}", ignore_metadata_errors=False)
    tags = ["class-to-image", "lightning-dit"] + ["vtp"] * isinstance(pipeline.vae, AutoencoderVTP)
    populate_model_card(card, tags=tags).save(folder / "README.md")
    return folder


def card_text(config: Config, run: TrainingRun, dataset, autoencoder: str) -> str:
    """Body of the model card: what the model is, how it is used, how it was trained, what it can draw.

    Args: `autoencoder`: name of its class.
    """
    model, sampling = config.model, config.validation
    names = list(dataset.id2label.values())
    classes = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    parameters = sum(p.numel() for p in run.optimisation.parameters) / 1e6
    source = "latents of training images" if config.latents else "training images, encoded in every step"
    times = (
        "uniform" if config.time_distribution == "uniform" else f"logit-normal ({config.time_mu}, {config.time_sigma})"
    )
    guide = "classifier-free"
    if config.guide.step is not None:
        guide = f"by its own averaged weights of step {config.guide.step} (autoguidance, arXiv:2406.02507)"
    elif config.guide.transformer is not None:
        guide = "by a weaker transformer (autoguidance, arXiv:2406.02507)"
    attribution = (dataset.metadata or {}).get("attribution")
    attribution = f"\n## Training images\n\n{attribution}\n" if attribution else ""
    vtp = autoencoder == AutoencoderVTP.__name__
    tokenizer = "the tokenizer after VTP\n  (arXiv:2512.13687)" if vtp else f"the latents are of\n  {autoencoder}"
    return f"""# LightningDiT on {"VTP" if vtp else autoencoder} latents

Class labels to images: a LightningDiT ({parameters:.1f} M parameters) on the latents of the autoencoder in `vae/`.
{len(names)} classes: {classes}.

## Use

```python
import vtp_diffusion  # registers the classes with diffusers
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this folder")
settings = {{"guidance_scale": {sampling.guidance_scale}, "num_inference_steps": {sampling.num_inference_steps}}}
images = pipeline(class_labels=[0], **settings).images
```

## Training

- `train_dit/train.py` of vtp-diffusion; the method is LightningDiT's (arXiv:2501.01423), {tokenizer}.
- {model.num_layers} layers, {model.num_attention_heads} heads of {model.attention_head_dim}, patch {model.patch_size}.
- {len(dataset)} {source}; {config.max_train_steps} steps of {run.images_per_step} latents,
  {run.log.seconds:.0f} s ({run.log.median_rate():.0f} a second){run.skipped_note}.
- AdamW, learning rate {config.learning_rate} ({config.lr_scheduler}); averaged weights with decay {config.ema_decay}.
- Times: {times}, shift {time_shift(config.time_shift, dataset):.4g}; class dropout {config.class_dropout_prob}.
- Sampling with time shift {time_shift(config.shift, dataset):.4g}; guidance: {guide}.

## Limits

It draws the classes it was trained on, at the resolution it was trained at, and may repeat training images.
{attribution}"""


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    folder = RunFolder(config.output_dir, config)
    vae = AutoModel.from_pretrained(config.vae).eval().requires_grad_(False)
    dataset = open_training_data(config, vae)
    torch.manual_seed(config.seed)
    transformer = build_transformer(config, dataset)
    transformer.eval()  # labels are dropped in training_inputs, keyed by the step; in train mode it would drop again
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    pipeline = build_pipeline(config, vae, transformer, dataset)
    pipeline.get_label_ids(config.validation.labels or [0])
    check_guide(config, folder, transformer)
    distance = None
    if config.validation.distance.num_images > 0:
        distance = QuickDistance(config.validation.distance, config.validation.seed, pipeline_image_size(pipeline)[0])

    if config.mixed_precision != "no":
        torch.set_float32_matmul_precision("high")
    objective = FlowMatchingObjective(transformer, config.cosine_loss)
    blank = torch.zeros(1, *dataset.shape), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    flops = 3 * forward_flops(transformer, *blank)  # a backward pass is two forward passes' products
    if config.compile and this_process()[1] == 1:
        objective.losses = torch.compile(objective.losses)
    elif config.compile:
        compile_modules(transformer, transformer._repeated_blocks)
    run = TrainingRun(
        config, folder, objective, transformer, "transformer", dataset.fingerprint, flops_per_image=flops
    )
    vae.to(run.device)
    inputs = training_inputs(run, config, dataset, vae, transformer.config.num_classes)
    watched = bool(config.validation.labels) or distance is not None
    if watched and run.validation_missed(None if distance is None else distance.network.distance_name):
        validate(config, run, vae, dataset, distance, run.first_step)
    for step in run.steps():
        run.optimise(step, inputs)
        if step + 1 == config.guide.step:  # before the checkpoint: a run that goes on after it needs the guide
            export_averaged(run.model, run.optimisation.average, run.folder.path / GUIDE)
        if watched and run.due(step, config.validation_steps):
            run.save_due(step)
            validate(config, run, vae, dataset, distance, step + 1)
    with run.averaged_model() as model:
        if run.is_main:
            pipeline = build_pipeline(config, vae, model, dataset, open_guide(config, run))
            print(f"the pipeline is in {save_pipeline(config, run, pipeline, dataset)}{run.skipped_note}")
    run.end()


if __name__ == "__main__":
    run_program(main)
