"""Judges beside the distances of one network: FDr6 and the memorised share; `--metrics` and their other settings."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ..metrics.features import Extractor
from ..metrics.frechet import GaussianStatistics, frechet_distance
from ..metrics.neighbours import MEMORISED_QUANTILE, check_held_out, memorised
from ..metrics.networks import network_name
from ..metrics.six import PUBLISHED_CONSTANTS, SIX, check_counts, fdr6
from ..runtime.config import setting
from .measurement import MEASURED, wanted_outputs
from .one_pass import FeaturesConfig, ImageRecord, Wanted, statistics_device
from .references import read_statistics

PUBLISHED = "published for ImageNet at 256 px: 50,000 validation images, features in bfloat16"


@dataclass(kw_only=True)
class JudgesConfig(FeaturesConfig):
    """What is measured beside every network's distances and scores."""

    floor_images: str | None = setting(None, "real images outside the reference, as it")
    metrics: list[Literal["mind", "memorisation"]] = setting(
        default_factory=list,
        help="further ones: mind, the sliced Wasserstein distance; memorisation, images nearer to the reference than "
        "floor_images are",
    )
    fdr6_constants: Literal["published", "computed"] = setting(
        "published", "what FDr6 divides by; computed: distances of floor_images to the reference"
    )
    reference_statistics: list[str] = setting(
        default_factory=list, help="NETWORK=FILE.npz: statistics of the reference for a network, made by `reference`"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        statistics_files(self)
        if self.fdr6_constants == "computed" and not self.has_fdr6:
            missing = ", ".join(name for name in SIX if name not in self.feature_network)
            raise ValueError(f"fdr6_constants is computed, but feature_network lacks {missing}: name fdr6, all six")
        if self.floor_images is None and (self.memorisation or self.computes_constants):
            what = "metrics memorisation" if self.memorisation else "fdr6_constants computed"
            raise ValueError(f"{what} needs floor_images: real images that the generator was not trained on")

    @property
    def has_fdr6(self) -> bool:
        return set(SIX) <= set(self.feature_network)

    @property
    def computes_constants(self) -> bool:
        return self.fdr6_constants == "computed"

    @property
    def memorisation(self) -> bool:
        return "memorisation" in self.metrics


def statistics_files(config: JudgesConfig) -> dict[str, str]:
    """Network -> npz of the reference's statistics: of `reference_statistics`, else the reference if it is one.

    Raises:
        ValueError: a word that is no NETWORK=FILE, or one for a network that is not measured.
    """
    files = dict.fromkeys(config.feature_network, config.reference) if config.reference.endswith(".npz") else {}
    for word in config.reference_statistics:
        name, _, file = word.partition("=")
        if not file or network_name(name) not in config.feature_network:
            known = ", ".join(config.feature_network)
            raise ValueError(f"reference_statistics must be NETWORK=FILE.npz with one of {known}, got {word!r}")
        files[network_name(name)] = file
    return files


def reference_statistics(
    config: JudgesConfig, extractors: dict[str, Extractor], protocol: str
) -> dict[str, dict[str, GaussianStatistics]]:
    """Network -> output -> statistics that files hold of the reference; with a protocol they are its own.

    Raises:
        ValueError: what `read_statistics` raises, or a file of `reference_statistics` that holds images only.
    """
    found: dict[str, dict[str, GaussianStatistics]] = {name: {} for name in config.feature_network}
    for name, file in statistics_files(config).items():
        if not Path(file).is_file():
            raise ValueError(f"{file}, the statistics of the reference for {name}, is not there")
        found[name] = read_statistics(file, extractors[name].network, config.device, protocol)
        if not found[name] and file != config.reference:
            raise ValueError(f"{file} holds no statistics: make them with `eval/generation.py reference`")
    return found


def wanted_of(
    config: JudgesConfig, part: str, extractors: dict[str, Extractor], neighbours: str | None
) -> dict[str, dict[str, Wanted]]:
    """Network -> output -> what is to be remembered of a set of images.

    Args:
        neighbours: the network that near-duplicates are looked for on, if they are.
    """
    all_features = {name for name in extractors if name == neighbours or config.memorisation}
    wanted = {
        name: wanted_outputs(extractor.network, part, all_features=name in all_features)
        for name, extractor in extractors.items()
        if part != "variants" or name in all_features
    }
    if part == "floor" and config.computes_constants:
        for name in SIX:
            wanted[name]["features"].groups = 1
    return wanted


def check_floor(records: dict[str, ImageRecord]) -> None:
    """Refuse floor images that are reference images: distances and memorisation are measured against what images
    outside the reference get, and so many copies (pixel for pixel) would make that nothing.

    Raises:
        ValueError: a share of copies as large as the quantile of memorisation.
    """
    floor = records["floor"].keys
    copies = int(np.isin(floor, records["reference"].keys).sum())
    if copies >= MEMORISED_QUANTILE * len(floor):
        raise ValueError(
            f"{copies} of {len(floor)} floor_images are also in the reference, pixel for pixel: expected real images "
            "outside it"
        )


def check_sizes(config: JudgesConfig, counts: dict[str, int], extractors: dict[str, Extractor]) -> None:
    """Refuse too few images before any is made or read. Raises: ValueError naming the set and what needs more.

    Args: `counts`: name of a set of images -> how many.
    """
    if config.has_fdr6:
        named = ("generated", "control", "reference") + ("floor",) * config.computes_constants
        sizes = {name: counts[name] for name in named if name in counts}
        check_counts(sizes, {name: extractors[name].network.dim for name in SIX})
    if config.memorisation:
        check_held_out(counts["floor"])


def measure_fdr6(
    config: JudgesConfig,
    distances: list[dict],
    records: dict[str, ImageRecord],
    statistics: dict[str, dict[str, GaussianStatistics]],
    extractors: dict[str, Extractor],
) -> dict:
    """FDr6 of every measured set of images, for result files.

    Args:
        distances: rows of `Measurement`.
        statistics: of the reference where files hold them.
    """
    constants, source = PUBLISHED_CONSTANTS, PUBLISHED
    if config.computes_constants:
        floor = {name: records["floor"].outputs[name]["features"].statistics for name in SIX}
        real = {
            name: statistics[name].get("features") or records["reference"].outputs[name]["features"].statistics
            for name in SIX
        }
        constants = {name: frechet_distance(real[name], floor[name]) for name in SIX}
        source = f"computed of {floor[SIX[0]].count} floor images"
    titles = {name: extractors[name].network.distance_name for name in SIX}
    results = {"constants_from": source}
    for images in (name for name in MEASURED if name in records):
        rows = {
            row["network"]: row
            for row in distances
            if row["images"] == images and row["distance"] == titles.get(row["network"])
        }
        found = fdr6({name: row["value"] for name, row in rows.items()}, constants)
        # the deviation of a mean is at most the mean of the deviations, whatever correlates
        spread = sum(rows[name]["spread"]["value"] / constants[name] for name in SIX) / len(SIX)
        results[images] = asdict(found) | {"spread_at_most": spread, "num_images": rows[SIX[0]]["num_images"]}
    return results


def measure_memorisation(
    config: JudgesConfig, records: dict[str, ImageRecord], extractors: dict[str, Extractor]
) -> list[dict]:
    """The memorised share of every measured set of images on every network, for result files."""
    results = []
    for network in config.feature_network:
        device = statistics_device(extractors[network])
        features = {n: record.outputs[network]["features"].features.to(device) for n, record in records.items()}
        training = torch.cat([features[name] for name in ("reference", "variants") if name in features])
        for images in (name for name in MEASURED if name in features):
            found = memorised(features[images], features["floor"], training)
            results.append({"network": network, "images": images} | asdict(found))
    return results
