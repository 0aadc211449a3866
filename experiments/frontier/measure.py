"""Measure one generator of this experiment: every kind of guidance it has, each at its best scale.

Scales are chosen by FD-EffLite0, with a third of the images and noise of seed 1; results have seed 0. The reference is
the 1,725 base emoji of the training split, and images are sampled with their labels, one each.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from vtp_diffusion.data.folders import sorted_names
from vtp_diffusion.data.image_datasets import DataConfig, open_dataset
from vtp_diffusion.data.openmoji import openmoji_folder, read_metadata
from vtp_diffusion.evaluation.sources import DatasetImages, PipelineImages, image_batches
from vtp_diffusion.generation.cost import evaluation_counts
from vtp_diffusion.generation.fast_sampling import prepare_sampling
from vtp_diffusion.generation.sampler_config import SamplerConfig
from vtp_diffusion.generation.sampling import labels_by_name, open_pipeline
from vtp_diffusion.metrics.features import Extractor
from vtp_diffusion.metrics.frechet import GaussianStatistics, floor_of_halves, frechet_distance
from vtp_diffusion.metrics.networks import feature_network
from vtp_diffusion.metrics.scores import precision_recall
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import Settings, parse_config, setting
from vtp_diffusion.runtime.disk import read_json, read_log, replacing, write_json
from vtp_diffusion.runtime.experiments import check_names

NETWORKS = {"vgg16": "FD-VGG", "efficientnet_lite0": "FD-EffLite0"}
CHOSEN_BY = "efficientnet_lite0"
KINDS = ("none", "classifier_free", "interval", "autoguidance", "internal")


@dataclass(kw_only=True)
class Config(Settings):
    """Settings of this program."""

    reference: str = setting(help="safetensors file of the reference's features; is written where it is missing")
    pipeline: str | None = setting(None, "folder of the pipeline to measure; none: only write the reference")
    output: str | None = setting(None, "FILE for the results")
    log: str | None = setting(None, "log.jsonl of its training")
    scales_of: str | None = setting(None, "results whose scales are used; none: choose them")
    num_inference_steps: list[int] = setting(default_factory=lambda: [50], help="Euler steps", at_least=1)
    kinds: list[str] = setting(default_factory=list, help="of guidance; none given: all that the pipeline has")
    solver: Literal["pipeline", "euler", "unipc"] = setting("pipeline", "of the flow")
    limit: int | None = setting(None, "only so many images, for a rehearsal", at_least=8)
    batch_size: int = setting(250, "images sampled at once", at_least=1)
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "torch device to run on")

    def __post_init__(self):
        super().__post_init__()
        if self.pipeline is not None and self.output is None:
            raise ValueError("output is none, expected a file for the results")
        check_names("kinds", self.kinds, KINDS)


def guidance_settings(pipe) -> dict[str, list[dict]]:
    """Kind of guidance -> candidate settings of the pipeline's call."""
    if pipe.transformer.config.student is not None:
        return {"none": [{}]}  # the teacher's guidance is part of the student
    free = {"guidance": "classifier_free"}
    kinds = {
        "none": [{}],
        "classifier_free": [free | {"guidance_scale": scale} for scale in (2.0, 3.0, 4.0, 6.0)],
        "interval": [
            free | {"guidance_scale": scale, "guidance_interval": (low, 1.0)}
            for scale, low in ((2.5, 0.15), (3.5, 0.15), (5.0, 0.15), (7.0, 0.15), (10.0, 0.15))
        ],
    }
    if pipe.guidance_transformer is not None:
        kinds["autoguidance"] = [{"guidance": "autoguidance", "guidance_scale": s} for s in (1.25, 1.5, 2.0, 2.5, 3.0)]
    if pipe.transformer.config.base_head_layer is not None:
        kinds["internal"] = [
            {"guidance": "internal", "guidance_scale": scale, "guidance_interval": (0.0, 0.9)}
            for scale in (2.5, 3.5, 5.0, 7.0)
        ]
    return kinds


def write_reference(config: Config, extractors: dict[str, Extractor]) -> None:
    """Features (N, D) of the base emoji that generators are trained on, and their labels (N,)."""
    dataset = open_dataset(DataConfig(source="openmoji", resolution=128), "train")
    base = torch.nonzero(~dataset.variants).flatten().tolist()[: config.limit]
    parts = {name: [] for name in extractors}
    for images in image_batches(DatasetImages(dataset), base, 64):
        for name, extractor in extractors.items():
            parts[name].append(extractor(images)["features"].cpu())
    tensors = {name: torch.cat(features) for name, features in parts.items()}
    labels = torch.as_tensor(dataset.labels)[base].long()
    with replacing(Path(config.reference)) as unfinished:
        save_file(tensors | {"labels": labels}, unfinished)


def openmoji_classes() -> list[str]:
    """The names of the reference's classes: a pipeline may number them otherwise, or have more."""
    return sorted_names({row["subcategory"] for row in read_metadata(openmoji_folder(128))})


def features_of(pipe, labels, seed: int, config: Config, extractors, settings: dict) -> tuple[dict, float]:
    """Network -> features (N, D) of samples of these labels, and the seconds that sampling took an image."""
    source = PipelineImages(pipe, labels, seed, config.batch_size, **settings)
    parts, seconds = {name: [] for name in extractors}, 0.0
    for start in range(0, len(labels), config.batch_size):
        began = time.perf_counter()
        images = source.read(range(start, min(start + config.batch_size, len(labels))))
        seconds += time.perf_counter() - began
        for name, extractor in extractors.items():
            parts[name].append(extractor(images)["features"])  # stay on the device, where distances are fast
    return {name: torch.cat(features) for name, features in parts.items()}, seconds / len(labels)


def statistics(features: torch.Tensor) -> GaussianStatistics:
    """Mean and covariance, made where the features are."""
    return GaussianStatistics.of(features, device=features.device)


def report(features: dict, reference: dict, known: dict[str, GaussianStatistics]) -> dict:
    """Distances, the pair at equal sizes with its real-vs-real baseline, precision and recall; `known`: statistics of
    the whole reference."""
    found = {}
    for network, name in NETWORKS.items():
        pair = floor_of_halves(features[network], reference[network], seed=0, prepare=statistics)
        found[name] = frechet_distance(known[network], statistics(features[network]))
        found[f"{name}_pair"] = {
            "images": pair.sizes,
            "generated": [pair.generated, pair.generated_deviation],
            "real": [pair.real, pair.real_deviation],
        }
    found["precision"], found["recall"] = precision_recall(features[CHOSEN_BY], reference[CHOSEN_BY])
    return found


def passes(pipe, settings: dict, steps: int) -> int:
    """Evaluations of networks for an image."""
    count, inside = evaluation_counts(pipe, steps, settings.get("guidance_interval", (0.0, 1.0)))
    return count + (inside if settings.get("guidance", "internal") != "internal" else 0)


def measure(config: Config, pipe, reference: dict, extractors) -> list[dict]:
    """One row for each kind of guidance and number of steps."""
    labels, rows = labels_by_name(pipe, reference["labels"].tolist(), openmoji_classes()), []
    known = {network: statistics(reference[network]) for network in NETWORKS}
    chosen = read_json(Path(config.scales_of))["rows"] if config.scales_of else []
    for steps in config.num_inference_steps:
        for kind, candidates in guidance_settings(pipe).items():
            if config.kinds and kind not in config.kinds:
                continue
            earlier = [row["settings"] for row in chosen if (row["kind"], row["steps"]) == (kind, steps)]
            tried, judge = [], {CHOSEN_BY: extractors[CHOSEN_BY]}
            for settings in [] if earlier or len(candidates) == 1 else candidates:
                call = settings | {"num_inference_steps": steps}
                found, _ = features_of(pipe, labels[::3], 1, config, judge, call)
                tried.append(frechet_distance(known[CHOSEN_BY], statistics(found[CHOSEN_BY])))
            best = earlier[0] if earlier else candidates[tried.index(min(tried)) if tried else 0]
            found, seconds = features_of(pipe, labels, 0, config, extractors, best | {"num_inference_steps": steps})
            row = {"kind": kind, "steps": steps, "settings": best, "passes": passes(pipe, best, steps)}
            row |= report(found, reference, known) | {"seconds_per_image": seconds}
            rows.append(row | {"tried": list(zip(candidates, tried, strict=False))})
            print(f"{kind}: {best}, FD-EffLite0 {row['FD-EffLite0']:.2f}, FD-VGG {row['FD-VGG']:.3f}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, __doc__)
    extractors = {name: Extractor(feature_network(name), config.device) for name in NETWORKS}
    if not Path(config.reference).is_file():
        write_reference(config, extractors)
    if config.pipeline is None:
        return
    reference = load_file(config.reference, device=config.device)
    sampler = SamplerConfig(solver=config.solver, num_inference_steps=config.num_inference_steps[0])
    pipe = open_pipeline(config.pipeline, sampler, config.device)
    how = prepare_sampling(pipe, sampler)
    training = read_log(Path(config.log)) if config.log else []
    rows = measure(config, pipe, reference, extractors)
    results = {
        "what": "samples with the labels of the base emoji of OpenMoji's training split, against those emoji",
        "images": len(reference["labels"]),
        "sampling": how,
        "device": torch.cuda.get_device_name() if config.device.startswith("cuda") else "CPU",
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
        "rows": rows,
        "training": training[-1:],
    }
    write_json(Path(config.output), results)


if __name__ == "__main__":
    run(main)
