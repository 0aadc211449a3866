"""How far generated images are from real ones: Fréchet distances with their floor and a control, near-duplicates.

    python eval/generation.py --images weights/openmoji-128 --num_images 1000 --guidance_scale 2.5 \\
        --reference openmoji --control untrained --nearest_neighbours pairs.png --output results.json

    python eval/generation.py --images samples.npz --reference FOLDER --feature_network inception \\
        --weights inception=weights-inception-2015-12-05-6726825d.pth --output fid.json

--images and --control take a folder of images, an npz (key arr_0, uint8 NHWC) or the folder of a pipeline, which is
sampled: image k with seed + k. --save_images keeps what was sampled, so that it can be measured elsewhere or again.
--reference and --floor_images take an npz, or a source of `vtp_diffusion.data` (a folder, openmoji, a `datasets`
collection), which is cropped to the size of the generated images.

Of every distance three numbers are given: to the whole reference; at the sizes at which real images can be compared
with real ones; and what real images get there, the floor. The last two belong together (`metrics/statistics.py`).
Without --floor_images the floor comes from two disjoint random parts of the reference, with it from real images
outside it. A control (images of an untrained network) shows what no learning gets. Variants that a data set draws less
often (skin tones) are left out of the reference of the distances; neighbours are looked for among all of it.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

import vtp_diffusion
from vtp_diffusion.config import parse_config
from vtp_diffusion.data import DataConfig, open_dataset
from vtp_diffusion.metrics import (
    FEATURE_NETWORKS,
    FeatureNetwork,
    GaussianStatistics,
    extract_features,
    feature_network,
    floor_of_halves,
    floor_of_images,
    frechet_distance,
    near_duplicate_threshold,
    nearest_neighbours,
    neighbour_grid,
    weight_files,
)
from vtp_diffusion.metrics.sources import (
    ArrayImages,
    DatasetImages,
    FolderImages,
    ImageSource,
    LabelRule,
    draw_labels,
    read_batches,
    sample_images,
)

NEIGHBOUR_NETWORK = "efficientnet_lite0"  # metrics/neighbours.py says why
UNTRAINED = "untrained"
CALIBRATION_IMAGES = 1000
PAIRS = 24


@dataclass
class GenerationConfig:
    images: str = field(metadata={"help": "folder of images, npz, or folder of a pipeline to sample"})
    reference: str = field(metadata={"help": "real images: npz, folder, openmoji or a `datasets` collection"})
    output: str = field(metadata={"help": "FILE.json for the results"})
    reference_split: str = field(default="train", metadata={"help": "split of the reference"})
    floor_images: str | None = field(default=None, metadata={"help": "real images outside the reference, as it"})
    floor_split: str = field(default="validation", metadata={"help": "split of the floor images"})
    data: DataConfig = field(
        default_factory=DataConfig,
        metadata={"help": "columns, hold-out and cache of both; reference and floor_images set the source"},
    )
    control: str | None = field(
        default=None,
        metadata={
            "help": "images or pipeline of an untrained network; untrained = the pipeline, its transformer reset"
        },
    )
    feature_network: list[str] = field(
        default_factory=lambda: ["vgg16", "efficientnet_lite0"],
        metadata={"help": f"one or more of {', '.join(FEATURE_NETWORKS)}"},
    )
    weights: list[str] = field(default_factory=list, metadata={"help": "NETWORK=FILE: weights of a feature network"})
    nearest_neighbours: str | None = field(
        default=None, metadata={"help": "FILE.png: count near-duplicates and show the nearest pairs"}
    )
    save_images: str | None = field(
        default=None, metadata={"help": "folder for what is sampled, generated.npz and control.npz, to measure again"}
    )
    num_images: int | None = field(
        default=None,
        metadata={"help": "images to sample, or of those there at random; none = all there"},
    )
    labels: LabelRule = field(default="random", metadata={"help": "classes of sampled images"})
    num_inference_steps: int = field(default=50, metadata={"help": "evaluations of the network an image"})
    guidance_scale: float = field(default=1.0, metadata={"help": "1 is no guidance"})
    guidance_interval: tuple[float, float] = field(
        default=(0.0, 1.0), metadata={"help": "times between which guidance is on, 0 is noise and 1 is data"}
    )
    seed: int = field(default=0, metadata={"help": "of samples, labels and random subsets"})
    batch_size: int = field(default=32, metadata={"help": "images at once"})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "precision in which a pipeline is sampled; features are always float32"}
    )
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "torch device to run on"}
    )

    def __post_init__(self) -> None:
        if not self.output.endswith(".json"):
            raise ValueError(f"output must be a FILE.json, got {self.output}")
        if self.nearest_neighbours is not None and not self.nearest_neighbours.endswith(".png"):
            raise ValueError(f"nearest_neighbours must be a FILE.png, got {self.nearest_neighbours}")
        if (self.data.source, self.data.resolution) != (DataConfig.source, DataConfig.resolution):
            raise ValueError(
                "data.source and data.resolution are decided by reference, floor_images and the size of the images: "
                f"got {self.data.source} and {self.data.resolution}"
            )
        if not self.feature_network:
            raise ValueError(f"feature_network is empty, expected one or more of {', '.join(FEATURE_NETWORKS)}")
        for name in self.feature_network:
            if name not in FEATURE_NETWORKS:
                raise ValueError(f"feature network {name!r} is unknown; known: {', '.join(FEATURE_NETWORKS)}")
        weight_files(self.weights)
        if self.batch_size < 1 or (self.num_images is not None and self.num_images < 2):
            raise ValueError(
                f"batch_size must be at least 1 and num_images 2, got {self.batch_size} and {self.num_images}"
            )
        if self.control == UNTRAINED and not is_pipeline(self.images):
            raise ValueError(f"control {UNTRAINED} resets the network of a pipeline, images {self.images} is none")
        if self.save_images is not None and not any(is_pipeline(s) for s in (self.images, self.control or "")):
            raise ValueError(
                f"save_images keeps what is sampled: neither {self.images} nor {self.control} is a pipeline"
            )
        for source in (self.images, self.control):
            if source is not None and is_pipeline(source) and self.num_images is None:
                raise ValueError(f"{source} is a pipeline: num_images must say how many images to sample")


def is_pipeline(source: str) -> bool:
    return (Path(source) / "model_index.json").is_file()


def open_images(source: str) -> ImageSource:
    path = Path(source)
    if path.is_dir():
        return FolderImages(path)
    if path.suffix == ".npz" and path.is_file():
        return ArrayImages.from_npz(path)
    raise ValueError(f"{source} is neither a folder of images, nor an npz file, nor a folder of a pipeline")


def open_reference(data: DataConfig, source: str, split: str, size: tuple[int, int]) -> tuple[ImageSource, list[int]]:
    """Real images of the given height and width, and the indices of those that are no variants of others."""
    if source.endswith(".npz"):
        images = ArrayImages.from_npz(source)
        if image_size(images) != size:
            raise ValueError(f"{source} holds images of {image_size(images)}, the generated ones are {size}")
        return images, list(range(len(images)))
    if size[0] != size[1]:
        raise ValueError(f"the generated images are {size}: a data set can only be cropped to squares")
    dataset = open_dataset(replace(data, source=source, resolution=size[0]), split)
    return DatasetImages(dataset), torch.nonzero(dataset.weights == dataset.weights.max()).flatten().tolist()


def open_wanted(config: GenerationConfig, source: str) -> ImageSource | DiffusionPipeline:
    if source == UNTRAINED:
        return load_pipeline(config, config.images, reset=True)
    return load_pipeline(config, source) if is_pipeline(source) else open_images(source)


def load_pipeline(config: GenerationConfig, folder: str, reset: bool = False) -> DiffusionPipeline:
    """The pipeline of a folder; `reset` gives its transformer the random weights it is constructed with."""
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, config.dtype)).to(config.device)
    if pipe.vae is None:
        raise ValueError(f"{folder} has no autoencoder: it makes latents, and images are compared here")
    if reset:
        torch.manual_seed(config.seed)
        untrained = type(pipe.transformer).from_config(pipe.transformer.config)
        pipe.transformer = untrained.eval().to(config.device, pipe.dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampling_settings(config: GenerationConfig, pipe: DiffusionPipeline) -> dict:
    """What decides sampled images beside seeds, labels and the sampler's arguments: the weights and the scheduler."""
    weights = {}
    for name in ("vae", "transformer"):
        digest = hashlib.sha256()
        for key, tensor in sorted(getattr(pipe, name).state_dict().items()):
            digest.update(
                f"{key} {tuple(tensor.shape)}".encode() + tensor.float().cpu().contiguous().numpy().tobytes()
            )
        weights[name] = digest.hexdigest()[:16]
    scheduler = {"class": type(pipe.scheduler).__name__, "shift": pipe.scheduler.config.get("shift")}
    return {"weights": weights, "scheduler": scheduler, "labels": config.labels, "dtype": str(pipe.dtype)}


def image_size(source: ImageSource | DiffusionPipeline) -> tuple[int, int]:
    if isinstance(source, DiffusionPipeline):
        dit = source.transformer.config
        latents = torch.zeros(1, dit.in_channels, dit.sample_size, dit.sample_size, device=source.device)
        with torch.inference_mode():
            return tuple(source.decode_latents(latents).shape[2:])
    return tuple(source.read([0]).shape[2:])


def images_to_compare(
    config: GenerationConfig, name: str, source: ImageSource | DiffusionPipeline, reference_labels: list[int] | None
) -> tuple[ImageSource, list[int]]:
    """The images and the indices of those that count: all, or a random subset; a pipeline makes them now."""
    if isinstance(source, DiffusionPipeline):
        made_with = sampling_settings(config, source)
        num_classes = source.transformer.config.num_classes
        labels = draw_labels(config.labels, config.num_images, num_classes, config.seed, reference_labels)
        with tqdm(total=len(labels), desc=f"sampling {name}") as progress:
            source = sample_images(
                source,
                labels,
                config.seed,
                config.batch_size,
                progress.update,
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                guidance_interval=config.guidance_interval,
            )
        source.settings |= made_with
        if config.save_images is not None:
            source.save_npz(Path(config.save_images) / f"{name}.npz")
    count = len(source) if config.num_images is None else config.num_images
    if count > len(source):
        raise ValueError(f"num_images is {count}, but the {name} images are {len(source)}")
    if count == len(source):
        return source, list(range(count))
    return source, sorted(np.random.default_rng(config.seed).permutation(len(source))[:count].tolist())


def measure(features: dict[str, torch.Tensor], network: FeatureNetwork, seed: int) -> list[dict]:
    """One row for the generated images and one for the control."""
    reference = features["reference"]
    rows = []
    for name in ("generated", "control"):
        if name not in features:
            continue
        if "floor" in features:
            floor = floor_of_images(features[name], reference, features["floor"], seed)
        else:
            floor = floor_of_halves(features[name], reference, seed)
        distance = frechet_distance(GaussianStatistics.of(features[name]), GaussianStatistics.of(reference))
        rows.append(
            {
                "distance": network.distance_name,
                "images": name,
                "value": distance,
                "num_images": len(features[name]),
                "num_reference": len(reference),
                "floor": asdict(floor),
            }
        )
    return rows


def count_near_duplicates(
    config: GenerationConfig,
    sources: dict[str, tuple[ImageSource, list[int]]],
    features: dict[str, torch.Tensor],
    base: list[int],
    network: FeatureNetwork,
) -> dict:
    """Shares of images that are near-duplicates of reference images; writes the picture of the nearest pairs."""

    def extract(images: torch.Tensor) -> torch.Tensor:
        return extract_features(network, images.split(config.batch_size), config.device)

    reference = sources["reference"][0]
    chosen = np.random.default_rng(config.seed).permutation(base)[:CALIBRATION_IMAGES].tolist()
    calibration = reference.read(chosen)
    threshold = near_duplicate_threshold(calibration, features["reference"][chosen], extract, config.seed)
    result = {"network": NEIGHBOUR_NETWORK, "threshold": threshold, "calibration_images": len(chosen)}
    for name in features.keys() - {"reference"}:
        distances, indices = nearest_neighbours(features[name], features["reference"])
        close = int((distances < threshold).sum())
        result[name] = {"near_duplicates": close, "num_images": len(distances), "share": close / len(distances)}
        if name == "generated":
            source, kept = sources[name]
            nearest = distances.argsort(stable=True)[:PAIRS].tolist()
            pairs = source.read([kept[i] for i in nearest]), reference.read(indices[nearest].tolist())
            picture = neighbour_grid(*pairs, distances[nearest])
    among, _ = nearest_neighbours(features["reference"][base], features["reference"][base], exclude_self=True)
    close = int((among < threshold).sum())
    result["reference"] = {"near_duplicates": close, "num_images": len(base), "share": close / len(base)}
    Path(config.nearest_neighbours).parent.mkdir(parents=True, exist_ok=True)
    picture.save(config.nearest_neighbours)
    return result


def print_results(results: dict) -> None:
    print(f"\n{'':12} {'images':10} {'N':>7} {'distance':>10}   {'at equal sizes':>22} {'real (floor)':>20}  sizes")
    for row in results["distances"]:
        floor = row["floor"]
        print(
            f"{row['distance']:12} {row['images']:10} {row['num_images']:7} {row['value']:10.3f}   "
            f"{floor['generated']:12.3f} ± {floor['generated_deviation']:7.3f} "
            f"{floor['real']:10.3f} ± {floor['real_deviation']:7.3f}  "
            f"{floor['sizes'][0]} against {floor['sizes'][1]} ({floor['kind']})"
        )
    if "near_duplicates" in results:
        found = results["near_duplicates"]
        print(f"near-duplicates in the reference (cosine distance below {found['threshold']:.4f}):")
        for name in ("generated", "control", "floor", "reference"):
            if name in found:
                entry = found[name]
                print(f"{name:12} {entry['near_duplicates']} of {entry['num_images']} ({entry['share']:.1%})")


def collect_images(config: GenerationConfig) -> tuple[dict[str, tuple[ImageSource, list[int]]], list[int]]:
    """Name -> images and the indices of those that count; and those of the reference that are no variants.

    Everything is opened and compared before a pipeline makes the first image.
    """
    wanted = {"generated": config.images} | ({"control": config.control} if config.control is not None else {})
    opened = {name: open_wanted(config, source) for name, source in wanted.items()}
    size = image_size(opened["generated"])
    if image_size(opened.get("control", opened["generated"])) != size:
        raise ValueError(f"control images are {image_size(opened['control'])}, the generated ones are {size}")
    reference, base = open_reference(config.data, config.reference, config.reference_split, size)
    sources = {"reference": (reference, list(range(len(reference))))}
    if config.floor_images is not None:
        sources["floor"] = open_reference(config.data, config.floor_images, config.floor_split, size)
    labels = [reference.labels[i] for i in base] if isinstance(reference, DatasetImages) else None
    for name, source in opened.items():
        sources[name] = images_to_compare(config, name, source, labels)
    return sources, base


def main() -> None:
    config = parse_config(GenerationConfig, description=__doc__)
    names = dict.fromkeys(config.feature_network + [NEIGHBOUR_NETWORK] * (config.nearest_neighbours is not None))
    files = weight_files(config.weights)
    networks = {name: feature_network(name, files.get(name)) for name in names}
    sources, base = collect_images(config)

    settings = asdict(config)
    for decided_elsewhere in ("source", "resolution"):
        del settings["data"][decided_elsewhere]
    results = {
        "settings": settings,
        "versions": {"vtp_diffusion": vtp_diffusion.__version__} | {p: version(p) for p in ("torch", "diffusers")},
        "image_size": image_size(sources["generated"][0]),
        "counts": {name: len(kept) for name, (_, kept) in sources.items()} | {"reference_without_variants": len(base)},
        "sampling": {n: s.settings for n, (s, _) in sources.items() if isinstance(s, ArrayImages) and s.settings},
        "fingerprints": {n: s.dataset.fingerprint for n, (s, _) in sources.items() if isinstance(s, DatasetImages)},
        "networks": [network.describe() for network in networks.values()],
        "distances": [],
    }
    for name, network in networks.items():
        neighbours = name == NEIGHBOUR_NETWORK and config.nearest_neighbours is not None
        features = {}
        for part, (source, kept) in sources.items():
            if part == "reference" and not neighbours:
                kept = base  # the distances leave variants out
            batches = read_batches(source, kept, config.batch_size)
            progress = tqdm(batches, total=math.ceil(len(kept) / config.batch_size), desc=f"{name}: {part}")
            features[part] = extract_features(network, progress, config.device)
        if name in config.feature_network:
            without_variants = features["reference"][base] if neighbours else features["reference"]
            results["distances"] += measure(features | {"reference": without_variants}, network, config.seed)
        if neighbours:
            results["near_duplicates"] = count_near_duplicates(config, sources, features, base, network)
        network.cpu()
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    Path(config.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print_results(results)
    print(f"results: {config.output}")


if __name__ == "__main__":
    main()
