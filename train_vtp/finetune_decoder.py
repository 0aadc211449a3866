"""Fine-tune the pixel decoder of a VTP tokenizer with a GAN loss; encoder, bottleneck and latents stay as they are.
With --adversarial.discriminator none there is no GAN: the decoder is only trained on for its reconstructions.

    python train_vtp/finetune_decoder.py --config finetune_decoder_tiny
    accelerate launch train_vtp/finetune_decoder.py --config finetune_decoder_openmoji
    accelerate launch train_vtp/finetune_decoder.py --config finetune_decoder_large --vae vtp-large

`--vae` is an AutoencoderVTP folder or the run folder of train_vtp/train.py. Every field of the configuration is also
an option (--help lists them). The same command again resumes an interrupted run. The run folder ends with vae/, whose
latents are those of the given autoencoder, so that a generator trained on them still works, and results.json: PSNR and
LPIPS before and after, and the signs of collapse that were seen, if any. The averaged decoder of the last validation
before any such sign is kept in decoder_before_collapse.safetensors; if PSNR falls by 3 dB, the run ends and vae/ gets
that decoder (--stop_on_collapse false: training goes on).
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vtp_diffusion.data.batches import AugmentationConfig, plain_batches
from vtp_diffusion.data.image_datasets import DataConfig
from vtp_diffusion.metrics.lpips import LPIPS
from vtp_diffusion.models.image_size import settle_resolution
from vtp_diffusion.models.latent_space import autoencoder_identity
from vtp_diffusion.models.loading import find_autoencoder, load_saved
from vtp_diffusion.pretraining.adversarial import AdversarialConfig, AdversarialDecoding
from vtp_diffusion.pretraining.collapse import collapse_signs, harmful, has_fallen
from vtp_diffusion.pretraining.discriminators import smallest_image
from vtp_diffusion.pretraining.inputs import Splits, check_streaming, count_left_out, open_splits, training_batches
from vtp_diffusion.pretraining.joint import MicroBatch
from vtp_diffusion.pretraining.reconstruction import (
    ReconstructionConfig,
    ReconstructionObjective,
    evaluate_reconstruction,
    reconstruction_grid,
)
from vtp_diffusion.runtime.cli import run as run_program
from vtp_diffusion.runtime.config import config_to_dict, parse_config, setting
from vtp_diffusion.runtime.disk import replacing, replacing_saved, write_json
from vtp_diffusion.runtime.processes import gather_objects, main_alone
from vtp_diffusion.runtime.programs import IMAGES, data_options, print_end
from vtp_diffusion.training.accelerator import sharding_asked
from vtp_diffusion.training.compilation import compile_modules
from vtp_diffusion.training.config import TrainingConfig
from vtp_diffusion.training.loop import TrainingRun
from vtp_diffusion.training.run_folder import RunFolder

if TYPE_CHECKING:
    from vtp_diffusion import AutoencoderVTP

SOUND = "decoder_before_collapse.safetensors"  # in the run folder
CONFIGS = sorted((Path(__file__).parent / "configs").glob("finetune_decoder*.yaml"))


@dataclass(kw_only=True)
class Config(TrainingConfig):
    """Settings of this program."""

    vae: str = setting(help="folder of an AutoencoderVTP, or of a run of train_vtp/train.py")
    data: DataConfig = setting(default_factory=DataConfig)
    augmentation: AugmentationConfig = setting(default_factory=AugmentationConfig)
    reconstruction: ReconstructionConfig = setting(default_factory=ReconstructionConfig)
    adversarial: AdversarialConfig = setting(default_factory=AdversarialConfig)
    validation_images: int = setting(
        16, "held-out images in the grid: originals above reconstructions", may_change=True, at_least=1
    )
    stop_on_collapse: bool = setting(
        True, "end the run when PSNR has fallen, with the decoder from before", may_change=True
    )
    evaluation_images: int | None = setting(
        None, "images of each split to measure; none: all", may_change=True, at_least=1
    )

    def __post_init__(self):
        super().__post_init__()
        check_streaming(self)
        if self.mixed_precision == "fp16":
            raise ValueError(
                "mixed_precision is fp16, expected no or bf16: the adaptive weight comes from unscaled gradients"
            )
        if self.reconstruction.weight != 1:
            raise ValueError(
                f"reconstruction.weight is {self.reconstruction.weight}, expected 1: set adversarial.weight instead"
            )
        if self.adversarial.discriminator != "none" and self.adversarial.start_step >= self.max_train_steps:
            raise ValueError(
                f"adversarial.start_step is {self.adversarial.start_step}, expected less than max_train_steps, "
                f"{self.max_train_steps}"
            )
        layers, resolution = self.adversarial.patch_layers, self.data.resolution
        if self.adversarial.discriminator == "patch" and resolution < smallest_image(layers):
            raise ValueError(
                f"adversarial.patch_layers is {layers} with a data.resolution of {resolution}, expected fewer layers, "
                f"or {smallest_image(layers)} pixels: the discriminator has no patch to judge"
            )


def training_inputs(run: TrainingRun, config: Config, objective: AdversarialDecoding, batches) -> Iterator[dict]:
    """Inputs of the objective, micro-step by micro-step; everything random is keyed by the place in the run."""
    for micro_step, columns in zip(run.micro_steps, batches, strict=False):  # a stream does not end
        batch = MicroBatch(run, micro_step, columns, config.augmentation)
        adversarial = micro_step // config.gradient_accumulation_steps >= config.adversarial.start_step
        noise = objective.reconstruction.draw_noise(batch, objective.autoencoder)
        yield {"images": batch.augmented, "adversarial": adversarial, **noise}


def measure(autoencoder: "AutoencoderVTP", dataset, config: Config, perceptual) -> dict[str, float | None]:
    """PSNR and LPIPS of the reconstructions of a split, as of `evaluate_reconstruction`."""
    batches = plain_batches(dataset, autoencoder.device, limit=config.evaluation_images)
    return evaluate_reconstruction(autoencoder, batches, perceptual)


def psnr_name(splits: Splits) -> str:
    """Name in the log of the PSNR that shows a collapse."""
    return f"{splits.validated[0]}_psnr"


def validate(run: TrainingRun, config: Config, autoencoder, splits: Splits, perceptual, step: int) -> None:
    """Report PSNR and LPIPS on held-out images, a grid of originals above reconstructions, and signs of collapse. As
    long as there are no harmful ones, the decoder is saved."""
    name, dataset = splits.validated
    measured = measure(autoencoder, dataset, config, perceptual)
    values = {f"{name}_{key}": value for key, value in measured.items()}
    log = [*(run.folder.read_log() if step > 0 else []), {"step": step} | values]
    signs = collapse_signs(log, config.adversarial.start_step, psnr_name(splits))
    for sign in signs:
        if sign["step"] > step - config.validation_steps:  # the others were printed before
            print(f"sign of collapse at step {sign['step']}: {sign['sign']} ({sign['value']:.4g})")
    if not harmful(signs):
        with replacing(run.folder.path / SOUND) as unfinished:
            save_file(autoencoder.decoder.state_dict(), unfinished, metadata={"step": str(step)})
    run.report(step, values, reconstruction_grid(autoencoder, dataset, config.validation_images))


def collapsed(run: TrainingRun, config: Config, splits: Splits) -> bool:
    """Whether the run should end, by the last validation; the same on every process."""
    fallen = run.is_main and has_fallen(run.folder.read_log(), psnr_name(splits))
    return config.stop_on_collapse and any(gather_objects(fallen))


def sound_decoder(run: TrainingRun, reference: "AutoencoderVTP") -> "tuple[AutoencoderVTP, int]":
    """The autoencoder with the decoder from before the collapse, on the run's device, and the step of that decoder."""
    autoencoder, step = copy.deepcopy(reference).to(run.device), 0
    if (run.folder.path / SOUND).is_file():  # else there were signs from the start: keep the given decoder
        with safe_open(run.folder.path / SOUND, "pt") as file:
            step = int(file.metadata()["step"])
            autoencoder.decoder.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    return autoencoder, step


def finish(
    run: TrainingRun, config: Config, autoencoder, step: int, reference, splits: Splits, perceptual, left_out: dict
) -> dict:
    """Write vae/ and results.json, for which the given autoencoder is measured in the same way.

    Args: `step`: of the decoder.
    """
    (run.folder.path / "results.json").unlink(missing_ok=True)  # of fewer steps
    with replacing_saved(run.folder.path / "vae") as unfinished:
        autoencoder.save_pretrained(unfinished)
    log = run.folder.read_log()
    results = {"steps": step, "steps_trained": log[-1]["step"]} | run.summary()
    for name, dataset in splits.measured.items():
        models = {"before": reference.to(run.device), "after": autoencoder}
        results[name] = {key: measure(model, dataset, config, perceptual) for key, model in models.items()}
        results[name] |= {"images": min(len(dataset), config.evaluation_images or len(dataset))}
        results[name] |= {"data": dataset.fingerprint}
    results["encoder_unchanged"] = all(
        torch.equal(old, autoencoder.state_dict()[key].to(old.device))
        for key, old in reference.state_dict().items()
        if not key.startswith("decoder.")
    )
    results["collapse"] = collapse_signs(log, config.adversarial.start_step, psnr_name(splits))
    results["left_out"] = left_out
    results["autoencoder_before"] = autoencoder_identity(reference)
    results["configuration"] = config_to_dict(config)
    write_json(run.folder.path / "results.json", results)
    return results


def open_autoencoder(config: Config) -> "tuple[AutoencoderVTP, AutoencoderVTP]":
    """The autoencoder to fine-tune, and the given one, which stays as it is.

    Raises: ValueError: there is none that can be loaded, or the resolution of the data does not suit it.
    """
    from vtp_diffusion import AutoencoderVTP

    source = find_autoencoder(config.vae)
    autoencoder, reference = (load_saved(AutoencoderVTP, source).eval() for _ in range(2))
    settle_resolution(config.data, autoencoder)
    if config.data.resolution % autoencoder.spatial_compression_ratio:
        raise ValueError(
            f"data.resolution is {config.data.resolution}, expected a multiple of the patch size of {source}, "
            f"{autoencoder.spatial_compression_ratio}"
        )
    if config.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    return autoencoder, reference


def start_run(
    config: Config, folder: RunFolder, autoencoder: "AutoencoderVTP", perceptual, fingerprint: str, older: list[str]
) -> TrainingRun:
    """The run, new or resumed; its networks are compiled if the configuration says so.

    Args: `older`: as `older_fingerprints` of `TrainingRun`.
    """
    if config.mixed_precision != "no":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    reconstruction = ReconstructionObjective(config.reconstruction, perceptual)
    objective = AdversarialDecoding(autoencoder, reconstruction, config.adversarial)
    if config.compile:
        compile_networks(autoencoder, perceptual, encoder=config.adversarial.discriminator != "features")
    return TrainingRun(
        config,
        folder,
        objective,
        autoencoder,
        "vae",
        fingerprint,
        not_saved=("reconstruction.perceptual.",),
        groups=objective.parameter_groups(config),
        fingerprint_of=("data", "autoencoder weights"),
        older_fingerprints=older,
    )


def compile_networks(autoencoder: "AutoencoderVTP", perceptual, encoder: bool) -> None:
    """Compile the networks with one backward pass per step: the discriminator has two, since a gradient is taken at
    the pixels."""
    for part in (autoencoder.decoder, autoencoder.encoder) if encoder else (autoencoder.decoder,):
        compile_modules(part, autoencoder._repeated_blocks)
    if perceptual is not None:
        perceptual.compile()


def print_written(config: Config, run: TrainingRun, split: str) -> None:
    vae, *others = (run.folder.path / name for name in ("vae", "results.json", SOUND))
    print(f"the autoencoder is in {vae}{run.skipped_note}")
    then = "eval/reconstruction.py --vae {} --data.source {} --split {} --data.resolution {} --output results.json"
    written = [run.folder.path, vae, *(path for path in others if path.exists())]
    images = data_options(config.data, *IMAGES, "validation_files")
    print_end(written, then, vae, config.data.source, split, config.data.resolution, more=images)


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__, CONFIGS)
    if sharding_asked():
        raise ValueError(
            "FSDP was asked for, expected none: the decoder and its discriminator are trained with whole weights only"
        )
    folder = RunFolder(config.output_dir, config)
    autoencoder, reference = open_autoencoder(config)
    trunk = config.reconstruction.lpips_trunk
    perceptual = LPIPS("vgg", trunk) if config.reconstruction.lpips > 0 else None
    splits = open_splits(config.data, config.evaluation_images, config.train_batch_size)
    images, weights = splits.training, autoencoder_identity(reference)["weights"]
    fingerprint, *older = (f"{name}-{weights}" for name in (images.training_fingerprint, *images.older_fingerprints))
    run = start_run(config, folder, autoencoder, perceptual, fingerprint, older)

    def evaluate(step: int) -> None:
        with run.averaged_weights():  # at step 0 the initial ones
            validate(run, config, autoencoder, splits, perceptual, step)

    if run.first_step == 0 or run.validation_missed(psnr_name(splits)):
        main_alone(partial(evaluate, run.first_step))
    batches = training_batches(run, splits.training)
    inputs = training_inputs(run, config, run.bare, batches)
    fallen = collapsed(run, config, splits)
    for step in () if fallen else run.steps():
        run.optimise(step, inputs)
        if run.due(step, config.validation_steps):
            run.save_due(step)
            main_alone(partial(evaluate, step + 1))
            if fallen := collapsed(run, config, splits):
                run.save(step + 1)  # so that the same command ends in the same way
                break
    left_out = count_left_out(run, splits.training, batches)

    def complete() -> None:
        with run.averaged_weights():
            trained, of_step = autoencoder, config.max_train_steps
            if fallen:
                trained, of_step = sound_decoder(run, reference)
                print(f"PSNR has fallen, training ends: vae/ gets the decoder of step {of_step}, before the signs")
            results = finish(run, config, trained, of_step, reference, splits, perceptual, left_out)
        for name in splits.measured:
            before, after = results[name]["before"], results[name]["after"]
            changes = (
                f"{k} {before[k]:.3f} -> {after[k]:.3f}" for k in before if None not in (before[k], after.get(k))
            )
            print(f"{name}: {', '.join(changes)}")
        print_written(config, run, "train" if splits.held_out is None else "validation")

    main_alone(complete)
    run.end()


if __name__ == "__main__":
    run_program(main)
