"""Pre-train a VTP tokenizer: contrastive, self-supervised and reconstruction objectives together, or some of them.

    python train_vtp/train.py --config tiny
    accelerate launch train_vtp/train.py --config openmoji
    accelerate launch train_vtp/train.py --config openmoji_reconstruction --data.source FOLDER --output_dir runs/mine

Every field of the configuration is also an option (--help lists them): --model.latent_channels 16, --data.limit 500,
--objectives reconstruction. The same command again resumes an interrupted run. The run folder ends with results.json;
vae/ with its latent statistics, for AutoencoderVTP.from_pretrained; and, if captions were trained on, vtp/ for
VTPModel.from_pretrained.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from vtp_diffusion.data.batches import AugmentationConfig, plain_batches
from vtp_diffusion.data.image_datasets import DataConfig
from vtp_diffusion.data.image_files import NAMED, left_out_line
from vtp_diffusion.data.streaming import first_batches
from vtp_diffusion.metrics.zero_shot import TEMPLATES, check_templates
from vtp_diffusion.pretraining.contrastive import ContrastiveConfig, ContrastiveObjective
from vtp_diffusion.pretraining.feature_evaluation import (
    MEASURED_IMAGES,
    evaluate_alignment,
    evaluate_features,
    unmeasured,
)
from vtp_diffusion.pretraining.inputs import Splits, check_streaming, count_left_out, open_splits, training_batches
from vtp_diffusion.pretraining.joint import (
    MicroBatch,
    VTPForPreTraining,
    check_share,
    checkpoint_blocks,
    compile_parts,
)
from vtp_diffusion.pretraining.reconstruction import (
    ReconstructionObjective,
    ReconstructionPartConfig,
    evaluate_reconstruction,
    measure_latent_statistics,
    reconstruction_grid,
)
from vtp_diffusion.pretraining.self_supervision import SelfSupervisionConfig, SelfSupervisionObjective
from vtp_diffusion.runtime.cli import run as run_program
from vtp_diffusion.runtime.config import Settings, config_to_dict, parse_config, setting
from vtp_diffusion.runtime.disk import numbers_line, replacing_saved, write_json
from vtp_diffusion.runtime.processes import main_alone, this_process
from vtp_diffusion.runtime.programs import IMAGES, data_options, print_end
from vtp_diffusion.training.accelerator import sharding_asked
from vtp_diffusion.training.config import TrainingConfig
from vtp_diffusion.training.loop import TrainingRun
from vtp_diffusion.training.optimisation import cosine_at
from vtp_diffusion.training.run_folder import RunFolder

if TYPE_CHECKING:
    from vtp_diffusion import AutoencoderVTP, VTPModel

STATISTICS_IMAGES = 50_000  # default limit of the images for the latent statistics: one process encodes them twice
# In the order in which they draw random numbers; each has its settings in a field of `Config` of the same name.
OBJECTIVES = {
    "contrastive": ContrastiveObjective,
    "self_supervision": SelfSupervisionObjective,
    "reconstruction": ReconstructionObjective,
}
CONFIGS = [file for file in sorted((Path(__file__).parent / "configs").glob("*.yaml")) if "decoder" not in file.name]


@dataclass(kw_only=True)
class ModelConfig(Settings):
    """Architecture of the autoencoder; its sample size is the resolution of the data."""

    patch_size: int = setting(16, "side of a token in pixels: the downsampling", at_least=1)
    latent_channels: int = setting(64, "width of the bottleneck", at_least=1)
    encoder_hidden_size: int = setting(384, "width of the encoder", at_least=1)
    encoder_num_layers: int = setting(12, "blocks of the encoder", at_least=1)
    encoder_num_attention_heads: int = setting(6, "heads of the encoder", at_least=1)
    decoder_hidden_size: int = setting(384, "width of the pixel decoder", at_least=1)
    decoder_num_layers: int = setting(12, "blocks of the pixel decoder", at_least=1)
    decoder_num_attention_heads: int = setting(6, "heads of the pixel decoder", at_least=1)
    encoder_qk_norm: bool = setting(False, "RMSNorm on the encoder's queries and keys")
    decoder_qk_norm: bool = setting(False, "RMSNorm on the decoder's queries and keys")
    rope_dtype: str = setting("float32", "float32, or bfloat16 as the released models")


@dataclass(kw_only=True)
class TextConfig(Settings):
    """The text tower and the space shared with images; the defaults are those of the released models."""

    text_hidden_size: int = setting(768, "width", at_least=1)
    text_num_layers: int = setting(12, "blocks", at_least=1)
    text_num_attention_heads: int = setting(12, "heads", at_least=1)
    text_context_length: int = setting(77, "tokens of a text; longer captions are cut", at_least=3)
    projection_dim: int = setting(768, "size of the shared space", at_least=1)


@dataclass(kw_only=True)
class Config(TrainingConfig):
    """Settings of this program."""

    objectives: tuple[Literal[tuple(OBJECTIVES)], ...] = setting(("reconstruction",), "objectives to train for")
    adam_weight_decay_end: float | None = setting(
        None, "weight decay at the end, reached along a cosine; none: constant", at_least=0
    )
    compile_stacks: bool = setting(
        False,
        "with compile and several objectives: compile whole encoders, not blocks; faster steps for small models",
        may_change=True,
    )
    cuda_graphs: bool = setting(
        False,
        "replay the passes of a step as CUDA graphs, on one GPU without micro-steps; graphs keep their memory during "
        "evaluation too, and are not used if there is too little",
        may_change=True,
    )
    checkpointed_share: float = setting(
        1.0, "share of blocks that gradient_checkpointing recomputes", may_change=True, above=0, at_most=1
    )
    data: DataConfig = setting(default_factory=DataConfig)
    augmentation: AugmentationConfig = setting(default_factory=AugmentationConfig)
    model: ModelConfig = setting(default_factory=ModelConfig)
    text: TextConfig = setting(default_factory=TextConfig)
    contrastive: ContrastiveConfig = setting(default_factory=ContrastiveConfig)
    self_supervision: SelfSupervisionConfig = setting(default_factory=SelfSupervisionConfig)
    reconstruction: ReconstructionPartConfig = setting(default_factory=ReconstructionPartConfig)
    validation_images: int = setting(
        16, "held-out images in the grid: originals above reconstructions", may_change=True, at_least=1
    )
    evaluation_images: int | None = setting(
        None, "images of each split to measure; none: all", may_change=True, at_least=1
    )
    latent_statistics_images: int | None = setting(
        None, "training images for the latent statistics; none: all, but at most 50,000", may_change=True, at_least=1
    )
    zero_shot_templates: tuple[str, ...] = setting(
        TEMPLATES, "prompts, {} being the name of the class", may_change=True
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives is {list(self.objectives)}, expected some of {', '.join(OBJECTIVES)}")
        resolution, patch = self.data.resolution, self.model.patch_size
        if resolution % patch:
            raise ValueError(f"data.resolution is {resolution}, expected a multiple of model.patch_size, {patch}")
        if "self_supervision" in self.objectives:
            self.self_supervision.check_sizes(resolution, patch)
        check_streaming(self)
        self.reconstruction = self.reconstruction.resolved(alone=self.objectives == ("reconstruction",))
        self.check_shares(processes=1)
        check_templates("zero_shot_templates", self.zero_shot_templates)

    def check_shares(self, processes: int) -> None:
        """Raises: ValueError unless every share of a process's batch in a micro-step is a whole number of samples."""
        for name in self.objectives:
            check_share(name, getattr(getattr(self, name), "share", 1), self.micro_batch_size(processes))

    def changeable_keys(self) -> set[str]:
        """As in every run, except for what the objectives depend on. Negatives, nearest neighbours, Sinkhorn-Knopp and
        centres are computed per micro-step, so gradient_accumulation_steps is fixed. Schedules of the teacher and the
        weight decay go by the share of training that is done, so max_train_steps is fixed."""
        keys = super().changeable_keys()
        if {"contrastive", "self_supervision"} & set(self.objectives):
            keys.discard("gradient_accumulation_steps")
        if "self_supervision" in self.objectives or self.adam_weight_decay_end is not None:
            keys.discard("max_train_steps")
        return keys


def build(config: Config) -> "tuple[VTPForPreTraining, AutoencoderVTP | VTPModel]":
    """The objectives, and the model that checkpoints hold: with a text tower only where one is trained."""
    from vtp_diffusion import AutoencoderVTP, VTPModel

    architecture = {"sample_size": config.data.resolution, **vars(config.model)}
    with_text = "contrastive" in config.objectives
    model = VTPModel(**architecture, **vars(config.text)) if with_text else AutoencoderVTP(**architecture)
    if config.gradient_checkpointing:
        checkpoint_blocks(model, config.checkpointed_share)
    kinds = {name: kind for name, kind in OBJECTIVES.items() if name in config.objectives}
    objectives = {name: kind.build(getattr(config, name), model) for name, kind in kinds.items()}
    return VTPForPreTraining(model.autoencoder if with_text else model, objectives), model


def check_data(config: Config, dataset) -> None:
    """Raises: ValueError if captions are trained on and the training images, of a stream the measured ones, have
    none."""
    if "contrastive" in config.objectives and not any((caption or "").strip() for caption in dataset.captions):
        data = config.data
        some = f"in its first {len(dataset)} images, " if data.streaming else ""
        if Path(data.source).is_dir():
            hint = "those of a folder are the names of its classes, which are sub-folders"
        else:
            hint = f"data.caption_column, which names their column, is {data.caption_column or 'none'}"
        raise ValueError(f"{data.source} has no captions, {some}which the contrastive objective needs: {hint}")


def without_caption(captions: list[str]) -> int:
    return sum(not (caption or "").strip() for caption in captions)


def announce(config: Config, splits: Splits) -> None:
    """Print what the data lack, before anything is trained on them."""
    for name, dataset in splits.measured.items():
        if skipped := dataset.skipped:
            print(f"{name}: {left_out_line(skipped)}")
    captions = getattr(splits.training, "captions", [])  # those of a stream are counted as they come
    if "contrastive" in config.objectives and (count := without_caption(captions)):
        print(f"{count} of {len(captions)} training images have no caption: contrastive learning leaves them out")
    for sentence in unmeasured(splits, "contrastive" in config.objectives):
        print(sentence)


def start_run(config: Config, folder: RunFolder, splits: Splits, objective: VTPForPreTraining, model) -> TrainingRun:
    """The run, new or resumed, of an objective that is compiled if the configuration says so."""
    if config.mixed_precision != "no":
        torch.set_float32_matmul_precision("high")
    if config.compile:
        compile_parts(objective, config.compile_stacks)
    return TrainingRun(
        config,
        folder,
        objective,
        model,
        "vtp" if hasattr(model, "autoencoder") else "vae",
        splits.training.training_fingerprint,
        not_saved=("objectives.reconstruction.perceptual.",),
        flops_per_image=sum(objective.flops(config.data.resolution).values()),
        in_parts=len(config.objectives) > 1,
        cuda_graphs=config.cuda_graphs,
        older_fingerprints=splits.training.older_fingerprints,
    )


def training_inputs(run: TrainingRun, config: Config, objective: VTPForPreTraining, batches) -> Iterator[list[dict]]:
    """A list of inputs, one entry for each objective, micro-step by micro-step."""
    for micro_step, columns in zip(run.micro_steps, batches, strict=False):  # a stream does not end
        inputs = objective.draw_inputs(MicroBatch(run, micro_step, columns, config.augmentation))
        yield objective.one_by_one(inputs)


def measure(config: Config, model: "AutoencoderVTP | VTPModel", splits: Splits, name: str, perceptual) -> dict:
    """Measures of a split: those of the features, and those of the objectives that are trained."""
    autoencoder, dataset = getattr(model, "autoencoder", model), splits.measured[name]
    values, limit = {}, config.evaluation_images
    if "reconstruction" in config.objectives:
        batches = plain_batches(dataset, autoencoder.device, limit=limit)
        values |= evaluate_reconstruction(autoencoder, batches, perceptual)
    others = splits.train if name != "train" else None
    values |= evaluate_features(autoencoder, dataset, others, limit)
    if "contrastive" in config.objectives:
        values |= evaluate_alignment(model, dataset, config.zero_shot_templates, limit)
    return values


def validate(run: TrainingRun, config: Config, model, splits: Splits, perceptual, step: int, counts: dict) -> None:
    """Report the measures on held-out images and `counts`, with a grid of originals above their reconstructions."""
    name, dataset = splits.validated
    values = {f"{name}_{key}": value for key, value in measure(config, model, splits, name, perceptual).items()}
    picture = None
    if "reconstruction" in config.objectives:
        picture = reconstruction_grid(getattr(model, "autoencoder", model), dataset, config.validation_images)
    run.report(step, values | counts, picture)


def latent_statistics(run: TrainingRun, config: Config, autoencoder, splits: Splits) -> dict:
    """Mean and standard deviation of each latent channel over training images and their mirror images, and the number
    of images."""
    limit, counts = config.latent_statistics_images or STATISTICS_IMAGES, []
    if config.data.streaming:
        batches = first_batches(splits.training, limit, run.device, config.dataloader_num_workers)
    else:
        batches = plain_batches(splits.training, run.device, limit)

    def both_ways():
        for images in batches:
            counts.append(len(images))
            yield images
            yield images.flip(3)

    mean, std = measure_latent_statistics(autoencoder, both_ways())
    return {"latents_mean": mean, "latents_std": std, "latent_statistics_images": sum(counts)}


def finish(run: TrainingRun, config: Config, model, splits: Splits, perceptual, left_out: dict) -> dict:
    """Write vae/ and vtp/ with the latent statistics in the configuration, then measure and write results.json."""
    autoencoder, statistics = getattr(model, "autoencoder", model), {}
    if "reconstruction" in config.objectives:
        statistics = latent_statistics(run, config, autoencoder, splits)
        autoencoder.register_to_config(**{name: statistics[name] for name in ("latents_mean", "latents_std")})
    (run.folder.path / "results.json").unlink(missing_ok=True)  # of fewer steps
    with replacing_saved(run.folder.path / "vae") as unfinished:  # before the measurements, which may take hours
        autoencoder.save_pretrained(unfinished)
    if model is not autoencoder:
        with replacing_saved(run.folder.path / "vtp") as unfinished:
            model.save_pretrained(unfinished, max_shard_size="1TB")
    autoencoder.register_to_config(latents_mean=None, latents_std=None)  # measured as in validations, to the last bit
    results = {"steps": config.max_train_steps} | run.summary()
    results["parameters"] = sum(p.numel() for p in autoencoder.parameters())
    for name, dataset in splits.measured.items():
        measured = measure(config, model, splits, name, perceptual)
        images = min(len(dataset), config.evaluation_images or len(dataset))
        results[name] = measured | {"images": images, "data": dataset.fingerprint}
        results[name]["feature_images"] = min(images, MEASURED_IMAGES)  # of k-NN, rank, zero-shot and retrieval
        results[name]["without_caption"] = without_caption(dataset.captions)
        if not config.data.streaming:
            skipped = dataset.skipped
            results[name] |= {"unreadable": len(skipped), "first_unreadable": skipped[:NAMED]}
    results |= statistics
    results["left_out"] = left_out
    results["configuration"] = config_to_dict(config)
    write_json(run.folder.path / "results.json", results)
    return results


def print_written(config: Config, run: TrainingRun) -> None:
    vae, *others = (run.folder.path / name for name in ("vae", "vtp", "results.json"))
    print(f"the autoencoder is in {vae}{run.skipped_note}")
    then = "train_dit/extract_latents.py --vae {} --data.source {} --data.resolution {} --output_dir latents"
    written = [run.folder.path, vae, *(path for path in others if path.exists())]
    images = data_options(config.data, *IMAGES)
    print_end(written, then, vae, config.data.source, config.data.resolution, more=images)


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__, CONFIGS)
    if sharding_asked():  # refused here, since reconstruction alone would only fail at its first validation
        raise ValueError(
            "FSDP was asked for, expected none: the teacher and the text tower are not trained sharded, and one "
            "process evaluates, with whole weights"
        )
    config.check_shares(this_process()[1])  # before anything is written to the folder
    folder = RunFolder(config.output_dir, config)
    splits = open_splits(config.data, config.evaluation_images, config.train_batch_size)
    if this_process()[0] == 0:  # only the main process measures, and holds the images of a stream to measure
        check_data(config, splits.train)
    torch.manual_seed(config.seed)
    objective, model = build(config)
    run = start_run(config, folder, splits, objective, model)
    if run.is_main:
        announce(config, splits)
    perceptual = getattr(dict(objective.objectives).get("reconstruction"), "perceptual", None)
    length = config.text.text_context_length if "contrastive" in config.objectives else None
    batches = training_batches(run, splits.training, length)
    inputs = training_inputs(run, config, objective, batches)

    def report(step: int, validation_due: bool) -> None:
        left_out = count_left_out(run, splits.training, batches)
        counts = {f"left_out/{reason}": float(count) for reason, count in left_out.items() if count}

        def evaluate() -> None:
            with run.averaged_weights():
                validate(run, config, model, splits, perceptual, step, counts)

        if validation_due:
            main_alone(evaluate)
        else:
            run.report(step, counts)

    if run.validation_missed(f"{splits.validated[0]}_"):
        report(run.first_step, validation_due=True)
    for step in run.steps():
        done = step / config.max_train_steps
        if config.adam_weight_decay_end is not None:
            decay = cosine_at(done, config.adam_weight_decay, config.adam_weight_decay_end)
            run.optimisation.set_weight_decay(decay)
        counted = run.optimise(step, inputs)
        objective.after_step(done, counted)
        validation_due = run.due(step, config.validation_steps)
        if validation_due:
            run.save_due(step)
        if validation_due or run.due(step, config.checkpointing_steps):
            report(step + 1, validation_due)
    left_out = count_left_out(run, splits.training, batches)

    def complete() -> None:
        with run.averaged_weights():
            results = finish(run, config, model, splits, perceptual, left_out)
        for name in splits.measured:
            print(f"{name}: {numbers_line(results[name])}")
        print_written(config, run)

    main_alone(complete)
    run.end()


if __name__ == "__main__":
    run_program(main)
