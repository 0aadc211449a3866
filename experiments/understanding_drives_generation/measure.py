"""Measure a generator at several steps of its training, in one process: features of real images are computed once.

    python experiments/understanding_drives_generation/measure.py --run RUN_FOLDER --steps 1000 3000 \\
        --reference openmoji --data.cache_dir runs/emoji --num_images 2000 --output results/generator-all-0

Writes OUTPUT-STEP.json for every step, with the distances and scores of eval/generation.py, and with --picture the
first 64 samples of the last step. Every generator draws the same labels, as frequent as in the reference, from the
same noise, so that a place in the picture is the same for all. The step is that of a checkpoint, whose averaged
weights are taken. --control adds a transformer of random weights to the first step.

"distances" are to real images and contain what the decoder loses. "distances_to_reconstructions" are to the same
images after the generator's own autoencoder: they tell how well the latents are generated.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from vtp_diffusion.evaluation.measurement import Measurement, wanted_outputs
from vtp_diffusion.evaluation.one_pass import FeaturesConfig, open_networks, record_source, statistics_device
from vtp_diffusion.evaluation.sources import PipelineImages, ReconstructedImages, open_reference, pipeline_image_size
from vtp_diffusion.generation.fast_sampling import prepare_sampling
from vtp_diffusion.generation.sampler_config import SamplerConfig
from vtp_diffusion.generation.sampling import draw_labels, labels_by_name, open_pipeline, reset_networks
from vtp_diffusion.models.latent_space import autoencoder_identity
from vtp_diffusion.models.loading import load_autoencoder, load_saved
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import parse_config, setting
from vtp_diffusion.runtime.disk import check_output, write_picture, write_results

SIDE, COLUMNS, ROWS = 48, 16, 4  # pixels of an image in the picture, images
DECODED = "_to_reconstructions"  # ending of what is measured against the reference after the autoencoder


@dataclass(kw_only=True)
class Config(FeaturesConfig, SamplerConfig):
    """Settings of this program."""

    run: str = setting(help="run folder of train_dit/train.py")
    steps: list[int] = setting(help="of its checkpoints", at_least=1)
    vae: str | None = setting(None, "autoencoder that decodes instead of the run's; their latents must be the same")
    output: str = setting(help="beginning of the files of results: OUTPUT-STEP.json")
    picture: str | None = setting(None, "FILE.png for samples of the last step")
    split: Literal["train", "validation"] = setting("train", "of the reference")
    control: bool = setting(False, "measure a transformer of random weights as well, in the first step's file")
    num_images: int = setting(2000, "images sampled", at_least=10)

    def __post_init__(self):
        super().__post_init__()
        if self.picture is not None:
            check_output(self.picture, ".png", "picture")
        missing = [step for step in self.steps if not self.transformer(step).is_dir()]
        if missing:
            raise ValueError(
                f"{self.run} has no checkpoint of step {missing[0]}: expected some of its checkpoint-STEP"
            )

    def transformer(self, step: int) -> Path:
        return Path(self.run) / f"checkpoint-{step}" / "transformer_ema"


def measured_pipelines(config: Config) -> Iterator[tuple[int, str, object]]:
    """Step, "generated" or "control", and the pipeline with the transformer that is to be measured."""
    pipe = open_pipeline(str(Path(config.run) / "pipeline"), config, config.device)
    if config.vae is not None:
        own, given = autoencoder_identity(pipe.vae, decoder=False), load_autoencoder(config.vae)
        if autoencoder_identity(given, decoder=False) != own:
            raise ValueError(f"vae {config.vae} makes other latents than the autoencoder of {config.run}")
        pipe.register_modules(vae=given.to(device=config.device, dtype=pipe.dtype))
    kind = type(pipe.transformer)
    for place, step in enumerate(sorted(config.steps)):
        if config.control and place == 0:
            reset_networks(pipe, config.seed)
            yield step, "control", pipe
        pipe.transformer = load_saved(kind, config.transformer(step), dtype=pipe.dtype).eval().to(config.device)
        yield step, "generated", pipe


def samples_picture(source: PipelineImages) -> Image.Image:
    """The first samples, made smaller."""
    picture = Image.new("RGB", (SIDE * COLUMNS, SIDE * ROWS), "white")
    images = source.read(range(min(len(source), COLUMNS * ROWS))).permute(0, 2, 3, 1).numpy()
    for place, image in enumerate(images):
        small = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        picture.paste(small, (place % COLUMNS * SIDE, place // COLUMNS * SIDE))
    return picture


def measured(config: Config, extractors: dict, name: str, images, reference) -> dict[str, list]:
    """Distances and scores of images against a reference, both as `record_source` returns them."""
    found: dict[str, list] = {"distances": [], "scores": []}
    for extractor in extractors.values():
        records, device = {"reference": reference, name: images}, statistics_device(extractor)
        rows = Measurement(extractor.network, name, records, {}, config.seed, device).run()
        found["distances"] += rows.distances
        found["scores"] += rows.scores
    return found


def measure(config: Config) -> None:
    extractors = open_networks(config, config.feature_network)
    references, results = {}, {"sampling": {}}
    for step, name, pipe in measured_pipelines(config):
        if not references:
            real, base, _ = open_reference(config.data, config.reference, config.split, pipeline_image_size(pipe))
            wanted = outputs(extractors, "reference")
            references[""] = record_source(config, "reference", real, base, extractors, wanted)
            decoded = ReconstructedImages(real, pipe.vae)
            references[DECODED] = record_source(config, "reconstructions", decoded, base, extractors, wanted)
            theirs = labels_by_name(pipe, [real.labels[k] for k in base], real.dataset.label_names)
            classes = pipe.transformer.config.num_classes
            labels = draw_labels("reference", config.num_images, classes, config.seed, theirs)
        source = PipelineImages(pipe, labels, config.seed, config.batch_size, **config.sampler)
        print(f"step {step}, {name}: {prepare_sampling(pipe, config)}")
        everyone = list(range(len(source)))
        record = record_source(config, name, source, everyone, extractors, outputs(extractors, name))
        results["sampling"][name] = source.settings | {"labels": "reference"}
        for ending, reference in references.items():
            for kind, rows in measured(config, extractors, name, record, reference).items():
                results[kind + ending] = results.get(kind + ending, []) + rows
        if name == "generated":
            results |= {"step": step, "networks": [e.network.describe() for e in extractors.values()]}
            results |= {"num_reference": len(base), "fingerprint": real.dataset.fingerprint}
            write_results(f"{config.output}-{step}.json", "generation", config, results)
            found = (f"{row['distance']} {row['value']:.3f}" for row in results["distances"] if row["images"] == name)
            print(f"step {step}: {', '.join(found)}")
            results = {"sampling": {}}
    if config.picture is not None:
        write_picture(Path(config.picture), samples_picture(source))


def outputs(extractors: dict, part: str) -> dict:
    """Network -> output -> what is to be remembered of a set of images."""
    return {name: wanted_outputs(extractor.network, part) for name, extractor in extractors.items()}


def main(argv: list[str] | None = None) -> None:
    measure(parse_config(Config, argv, __doc__))


if __name__ == "__main__":
    run(main)
