"""Train a LightningDiT; the result is a diffusers pipeline.

    python train_dit/train.py --config tiny
    accelerate launch train_dit/train.py --config openmoji
    accelerate launch train_dit/train.py --config vtp_large_xl --latents latents/mine --output_dir runs/mine

It learns from the latents that train_dit/extract_latents.py wrote. With --latents none it learns online, from the
images of `data`: the autoencoder then runs in every step, on images changed as `augmentation` says.

Every field of the configuration is also an option (--help lists them): --learning_rate 1e-3, --model.num_layers 8.
The same command again resumes an interrupted run, with any number of processes that train_batch_size can be divided
among; while it runs, a second start in the same folder is refused. SIGTERM and SIGINT save and stop it, with status
143 and 130. (`accelerate launch` of one process does not pass SIGTERM on: where only the launcher gets it, as in a
container, start one process with python instead.) The run folder ends with pipeline/, which
DiffusionPipeline.from_pretrained loads. Sharded weights, for models that do not fit otherwise:

    accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 train_dit/train.py --config ...

Autoguidance (arXiv:2406.02507): --guide.step 20000 makes the EMA weights of that step the pipeline's
guidance_transformer, --guide.transformer FOLDER a smaller transformer trained on the same latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from vtp_diffusion.data.batches import AugmentationConfig
from vtp_diffusion.data.image_datasets import DataConfig
from vtp_diffusion.evaluation.validation import ValidationConfig
from vtp_diffusion.generation.autoguidance import GuideConfig, check_guide, open_guide, save_guide
from vtp_diffusion.generation.fused_training import FusedConfig, use_fused_blocks, wanted_graphs, why_blocks_are_plain
from vtp_diffusion.generation.objective import (
    FlowMatchingConfig,
    FlowMatchingObjective,
    TimeShift,
    resolve_shift,
    training_inputs,
)
from vtp_diffusion.generation.transformer_config import ModelConfig, build_transformer
from vtp_diffusion.runtime.cli import run as run_program
from vtp_diffusion.runtime.config import parse_config, setting
from vtp_diffusion.runtime.programs import print_end
from vtp_diffusion.training.config import TrainingConfig

if TYPE_CHECKING:
    from vtp_diffusion import LightningDiTPipeline
    from vtp_diffusion.data.latent_shards import LatentDataset
    from vtp_diffusion.evaluation.validation import QuickDistance
    from vtp_diffusion.generation.latent_inputs import OnlineLatents
    from vtp_diffusion.training.loop import TrainingRun

CONFIGS = [file for file in sorted((Path(__file__).parent / "configs").glob("*.yaml")) if "distill" not in file.name]
NEXT = "pipelines/generate.py --pipeline {} --num_images 16 --output samples.png"


@dataclass(kw_only=True)
class Config(TrainingConfig, FlowMatchingConfig, FusedConfig):
    """Settings of this program."""

    # These two paths may change, since the contents are compared: latents with the checkpoint, vae with the latents.
    vae: str = setting(help="folder of the autoencoder that made the latents", may_change=True)
    latents: str | None = setting(
        help="folder of latent shards, as train_dit/extract_latents.py writes them; none: train online",
        may_change=True,
    )
    verify_latents: bool = setting(False, "first compare every shard with the SHA-256 in it", may_change=True)
    data: DataConfig | None = setting(
        None,
        "online: the images; with latents nothing of it is read, but their resolution and exif_orientation have to be "
        "those given here",
    )
    augmentation: AugmentationConfig = setting(
        default_factory=AugmentationConfig, help="online: changes of the images, besides random_flip"
    )
    random_flip: bool = setting(True, "mirror half of the images")
    model: ModelConfig = setting(default_factory=ModelConfig)
    initial_transformer: str | None = setting(
        None,
        "folder of a saved transformer to start from, such as transformer_ema/; with another number of classes it "
        "gets new class embeddings; none: new weights",
    )
    shift: TimeShift = setting(0.3, "time shift s that the pipeline samples with; values as of time_shift", above=0)
    guide: GuideConfig = setting(default_factory=GuideConfig, may_change=True)
    optimizer: Literal["adamw", "muon"] = setting("adamw", "muon: for the matrices inside blocks, AdamW for the rest")
    save_dtype: Literal["float32", "bfloat16"] = setting("float32", "precision of the weights in pipeline/")
    validation: ValidationConfig = setting(
        default_factory=ValidationConfig, help="sample grids and distances", may_change=True
    )

    def __post_init__(self):
        super().__post_init__()
        from vtp_diffusion.training.accelerator import sharding_asked

        if self.optimizer == "muon" and sharding_asked():
            raise ValueError(
                "optimizer is muon, which takes whole matrices: expected adamw with sharded weights (FSDP)"
            )
        if self.optimizer == "muon" and self.mixed_precision == "fp16":
            raise ValueError(
                "optimizer is muon and mixed_precision fp16, whose loss scaler skips steps: expected bf16"
            )
        if self.guide.step is not None and self.guide.step > self.max_train_steps:
            raise ValueError(f"guide.step is {self.guide.step}, expected a step from 1 to {self.max_train_steps}")
        if self.latents is None and self.data is None:
            raise ValueError("latents is none: training online needs data (data.source, data.resolution)")
        if self.latents is None and self.verify_latents:
            raise ValueError("verify_latents is true with latents none, expected false: there are no shards to verify")
        if self.latents is not None and self.augmentation != AugmentationConfig():
            raise ValueError("augmentation changes images while training online: with latents it can do nothing")


def open_training_data(config: Config, vae) -> LatentDataset | OnlineLatents:
    """Latent shards that fit the autoencoder, or without any the images, which training encodes."""
    from vtp_diffusion.data.image_datasets import open_dataset
    from vtp_diffusion.data.latent_shards import LatentDataset
    from vtp_diffusion.generation.latent_inputs import (
        OnlineLatents,
        check_latents,
        class_names,
        empty_classes_note,
        latent_shape,
    )
    from vtp_diffusion.models.image_size import settle_resolution
    from vtp_diffusion.models.latent_space import latent_statistics
    from vtp_diffusion.runtime.processes import this_process

    if config.latents is not None:
        dataset = LatentDataset(config.latents, verify=config.verify_latents)
        check_latents(dataset, vae, config.data)
    else:
        latent_statistics(vae)  # refuses an autoencoder that should have them and does not
        settle_resolution(config.data, vae)  # only to say if it is not the autoencoder's
        latent_shape(vae, config.data.resolution)  # refuses a resolution before images are read
        dataset = OnlineLatents(open_dataset(config.data, "train"), vae, config.data, config.augmentation)
    dataset.id2label = class_names(dataset, config.model.num_classes)
    if (note := empty_classes_note(dataset, dataset.id2label)) and this_process()[0] == 0:
        print(note)
    return dataset


def latent_batches(run: TrainingRun, config: Config, dataset: LatentDataset | OnlineLatents) -> Iterator[dict]:
    """Raw latents and labels on the device, for every micro-step still to do."""
    from vtp_diffusion.generation.latent_inputs import OnlineLatents, stored_latents

    sampler = run.batch_sampler(len(dataset), dataset.weights)
    common = (sampler, config.random_flip, run.device, config.keep_on_device, config.dataloader_num_workers)
    if not isinstance(dataset, OnlineLatents):
        return stored_latents(dataset, *common)
    return dataset.batches(*common, config.mixed_precision, config.compile)


def build_objective(config: Config, transformer: nn.Module) -> FlowMatchingObjective:
    """The objective. With `compile` it is one compiled graph, or with several processes, which wrap or shard the
    blocks, one graph for these."""
    from vtp_diffusion.runtime.processes import this_process
    from vtp_diffusion.training.compilation import compile_modules

    objective = FlowMatchingObjective(transformer, config.cosine_loss)
    if config.mixed_precision != "no":
        torch.set_float32_matmul_precision("high")
    if config.compile and this_process()[1] == 1:
        objective.losses = torch.compile(objective.losses)
    elif config.compile:
        compile_modules(transformer, transformer._repeated_blocks)
    return objective


def build_pipeline(config: Config, vae, transformer, dataset, guide=None) -> LightningDiTPipeline:
    """The pipeline that samples as the configuration says."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from vtp_diffusion import LightningDiTPipeline
    from vtp_diffusion.generation.flow_matching import scheduler_shift

    scheduler = FlowMatchEulerDiscreteScheduler(shift=scheduler_shift(resolve_shift(config.shift, dataset.shape)))
    pipeline = LightningDiTPipeline(
        vae=vae, transformer=transformer, scheduler=scheduler, guidance_transformer=guide, id2label=dataset.id2label
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def validate(config: Config, run: TrainingRun, vae, dataset, distance: QuickDistance | None, step: int) -> None:
    """A sample grid and a quick distance of the EMA weights."""
    from vtp_diffusion.evaluation.validation import report_validation

    with run.averaged_model() as model:
        report_validation(config.validation, run, build_pipeline(config, vae, model, dataset), distance, step)


def save_pipeline(
    config: Config, run: TrainingRun, pipeline: LightningDiTPipeline, dataset, distance: QuickDistance | None
) -> None:
    """Write pipeline/ with its model card."""
    from vtp_diffusion.generation.model_card import save_with_card

    source = "latents of training images" if config.latents else "training images, encoded in every step"
    folder = save_with_card(
        config,
        run,
        pipeline,
        dataset,
        data=f"{len(dataset)} {source}",
        reference=distance and distance.reference_text,
        times=config.times_text,
        time_shift=f"{resolve_shift(config.time_shift, dataset.shape):.4g}",
        shift=f"{resolve_shift(config.shift, dataset.shape):.4g}",
    )
    print_end([run.folder.path, folder], NEXT + config.validation.guidance_words, folder)


def print_left_out(run: TrainingRun, dataset: OnlineLatents) -> None:
    """Print which images could not be read since the program was started; every process has to call this."""
    from vtp_diffusion.data.image_files import left_out_line
    from vtp_diffusion.runtime.processes import gather_objects

    if keys := sorted(set().union(*gather_objects(dataset.images.skipped))):
        run.accelerator.print(left_out_line(keys))


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__, CONFIGS)
    from vtp_diffusion.evaluation.validation import check_validation, open_distance, validated_steps
    from vtp_diffusion.models.loading import load_autoencoder
    from vtp_diffusion.training.loop import TrainingRun
    from vtp_diffusion.training.optimisation import muon_groups
    from vtp_diffusion.training.rates import forward_flops
    from vtp_diffusion.training.run_folder import RunFolder

    folder = RunFolder(config.output_dir, config)  # first, since it refuses early and writes nothing
    plain = why_blocks_are_plain(config, config.compile)
    vae = load_autoencoder(config.vae)
    dataset = open_training_data(config, vae)
    torch.manual_seed(config.seed)
    num_classes = len(dataset.id2label)
    transformer = build_transformer(
        config.model,
        dataset.shape,
        num_classes,
        config.class_dropout_prob,
        config.initial_transformer,
        empty=bool(folder.checkpoints()),  # a checkpoint replaces the weights, or the run is refused
    )
    transformer.eval()  # labels are dropped in training_inputs, keyed by the step; in train mode it would drop again
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    pipeline = build_pipeline(config, vae, transformer, dataset)
    check_validation(config.validation, pipeline)
    check_guide(config.guide, folder, transformer)
    distance = open_distance(config.validation, pipeline, dataset.metadata)
    blank = torch.zeros(1, *dataset.shape), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    flops = 3 * forward_flops(transformer, *blank)  # a backward pass has twice the products of a forward pass
    objective = build_objective(config, transformer)
    run = TrainingRun(
        config,
        folder,
        objective,
        transformer,
        "transformer",
        dataset.fingerprint,
        groups=muon_groups(transformer, objective, config.adam_weight_decay) if config.optimizer == "muon" else None,
        flops_per_image=flops,
        fingerprint_of=("images and autoencoder",) if config.latents is None else ("data",),
        cuda_graphs=wanted_graphs(config, config.compile),
        older_fingerprints=dataset.older_fingerprints,
    )
    if config.latents is not None:  # images were described as they were opened
        run.accelerator.print(dataset.describe())
    use_fused_blocks(config, run, plain)
    vae.to(run.device)
    inputs = training_inputs(run, config, latent_batches(run, config, dataset), vae, dataset.shape, num_classes)
    for step in validated_steps(run, distance, partial(validate, config, run, vae, dataset, distance)):
        run.optimise(step, inputs)
        if step + 1 == config.guide.step:  # before this step's checkpoint: a run resumed from it needs the guide
            save_guide(run, step + 1)
    if config.latents is None:
        print_left_out(run, dataset)
    with run.averaged_model() as model:
        if run.is_main:
            pipeline = build_pipeline(config, vae, model, dataset, open_guide(config.guide, folder))
            save_pipeline(config, run, pipeline, dataset, distance)
    run.end()


if __name__ == "__main__":
    run_program(main)
