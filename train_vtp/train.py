"""Train a VTP tokenizer on images; the result is a diffusers autoencoder.

    accelerate launch train_vtp/train.py --config train_vtp/configs/openmoji.yaml

Every field of the configuration is also an option (--help lists them): --model.latent_channels 16, --data.limit 500.
The same command again resumes an interrupted run. The run folder ends with vae/, which AutoencoderVTP.from_pretrained
loads, its latent statistics inside, and results.json.
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from vtp_diffusion import AutoencoderVTP
from vtp_diffusion.batches import image_batches, plain_batches
from vtp_diffusion.config import config_to_dict, parse_config
from vtp_diffusion.data import AugmentationConfig, DataConfig, augment_images, open_dataset
from vtp_diffusion.losses import LPIPS
from vtp_diffusion.pretraining import (
    ReconstructionConfig,
    ReconstructionObjective,
    VTPForPreTraining,
    evaluate_reconstruction,
    measure_latent_statistics,
    reconstruction_grid,
)
from vtp_diffusion.run_folder import RunFolder
from vtp_diffusion.training import TrainingRun
from vtp_diffusion.training_config import TrainingConfig

MEASURES = {"psnr", "lpips"}


@dataclass(kw_only=True)
class ModelConfig:
    """Architecture of the autoencoder; its sample size is the resolution of the data."""

    patch_size: int = field(default=16, metadata={"help": "pixels a side of a token: the downsampling"})
    latent_channels: int = field(default=64, metadata={"help": "width of the bottleneck"})
    encoder_hidden_size: int = field(default=384, metadata={"help": "width of the encoder"})
    encoder_num_layers: int = field(default=12, metadata={"help": "blocks of the encoder"})
    encoder_num_attention_heads: int = field(default=6, metadata={"help": "heads of the encoder"})
    decoder_hidden_size: int = field(default=384, metadata={"help": "width of the pixel decoder"})
    decoder_num_layers: int = field(default=12, metadata={"help": "blocks of the pixel decoder"})
    decoder_num_attention_heads: int = field(default=6, metadata={"help": "heads of the pixel decoder"})
    encoder_qk_norm: bool = field(default=False, metadata={"help": "RMSNorm on the encoder's queries and keys"})
    decoder_qk_norm: bool = field(default=False, metadata={"help": "RMSNorm on the decoder's queries and keys"})
    rope_dtype: str = field(default="float32", metadata={"help": "float32, or bfloat16 as the released models"})


@dataclass(kw_only=True)
class Config(TrainingConfig):
    """Settings of this program."""

    data: DataConfig = field(default_factory=DataConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    validation_images: int = field(
        default=16,
        metadata={"help": "held-out images in the grid: originals above reconstructions", "may_change": True},
    )

    def __post_init__(self):
        super().__post_init__()
        resolution, patch = self.data.resolution, self.model.patch_size
        if patch < 1 or resolution % patch:
            raise ValueError(f"data.resolution is {resolution}, expected a multiple of model.patch_size, {patch}")
        if self.validation_images < 1:
            raise ValueError(f"validation_images is {self.validation_images}, expected a positive number")

    def changeable_keys(self) -> set[str]:
        return super().changeable_keys() | {"data.cache_dir"}  # where renderings are kept, not what they are


def training_inputs(run: TrainingRun, config: Config, objective: VTPForPreTraining, dataset) -> Iterator[dict]:
    """Inputs of every objective, micro-step by micro-step; everything random is keyed by the micro-step."""
    sampler = run.batch_sampler(len(dataset), dataset.weights)
    batches = image_batches(dataset, sampler, run.device, config.keep_on_device, config.dataloader_num_workers)
    reconstruction = objective.objectives["reconstruction"]
    for micro_step, batch in zip(run.micro_steps, batches, strict=True):
        generator = run.generator(micro_step)
        images = augment_images(batch["image"], config.augmentation, generator)
        random = reconstruction.draw(objective.autoencoder, images, generator)
        yield {"reconstruction": {"images": images, **random}}


def validate(
    run: TrainingRun, config: Config, autoencoder: AutoencoderVTP, datasets: dict, perceptual, step: int
) -> None:
    """PSNR and LPIPS on held-out images, and a grid of originals with their reconstructions below."""
    name, dataset = list(datasets.items())[-1]
    measured = evaluate_reconstruction(autoencoder, plain_batches(dataset, run.device), perceptual)
    values = {f"{name}_{key}": value for key, value in measured.items()}
    run.report(step, values, reconstruction_grid(autoencoder, dataset, config.validation_images))


def finish(run: TrainingRun, config: Config, autoencoder: AutoencoderVTP, datasets: dict, perceptual) -> dict:
    """Measure, put the latent statistics into the configuration, write vae/ and results.json."""
    results = {"steps": config.max_train_steps, "images_per_step": run.images_per_step, "seconds": run.seconds}
    results["images_per_second"] = statistics.median(run.rates[1:] or run.rates or [0.0])
    results["parameters"] = sum(p.numel() for p in autoencoder.parameters())
    for name, dataset in datasets.items():
        measured = evaluate_reconstruction(autoencoder, plain_batches(dataset, run.device), perceptual)
        results[name] = measured | {"images": len(dataset), "data": dataset.fingerprint}
    mean, std = measure_latent_statistics(autoencoder, plain_batches(datasets["train"], run.device, flips=True))
    autoencoder.register_to_config(latents_mean=mean, latents_std=std)
    autoencoder.save_pretrained(run.folder.path / "vae")
    results |= {"latents_mean": mean, "latents_std": std, "configuration": config_to_dict(config)}
    (run.folder.path / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    folder = RunFolder(config.output_dir, config)
    torch.manual_seed(config.seed)
    autoencoder = AutoencoderVTP(sample_size=config.data.resolution, **vars(config.model))
    if config.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    settings = config.reconstruction
    perceptual = LPIPS("vgg", settings.lpips_trunk) if settings.lpips > 0 else None
    datasets = {"train": open_dataset(config.data, "train"), "held_out": open_dataset(config.data, "validation")}
    if datasets["held_out"].fingerprint == datasets["train"].fingerprint:
        del datasets[
            "held_out"
        ]  # a plain folder has no validation split: nothing measured on it may be called held-out

    if config.mixed_precision != "no":
        torch.set_float32_matmul_precision("high")
    objective = VTPForPreTraining(autoencoder, {"reconstruction": ReconstructionObjective(settings, perceptual)})
    if config.compile:
        objective.losses = torch.compile(objective.losses)
    frozen = ("objectives.reconstruction.perceptual.",)
    run = TrainingRun(config, folder, objective, autoencoder, "vae", datasets["train"].fingerprint, not_saved=frozen)
    inputs = training_inputs(run, config, objective, datasets["train"])
    for step in run.steps():
        run.optimise(step, inputs)
        if run.is_main and run.due(step, config.validation_steps):
            with run.averaged_weights():
                validate(run, config, autoencoder, datasets, perceptual, step + 1)
    if run.is_main:
        with run.averaged_weights():
            results = finish(run, config, autoencoder, datasets, perceptual)
        for name in datasets:
            print(
                f"{name}: " + ", ".join(f"{key} {results[name][key]:.3f}" for key in results[name].keys() & MEASURES)
            )
        print(f"the autoencoder is in {folder.path / 'vae'}")
    run.end()


if __name__ == "__main__":
    main()
