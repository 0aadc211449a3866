"""Judges beside the distances of one network: FDr6, and what held-out images must be."""

from dataclasses import asdict

import numpy as np

from ..metrics.fdr6 import PUBLISHED_CONSTANTS, SIX, check_counts, fdr6
from ..metrics.features import Extractor
from ..metrics.frechet import GaussianStatistics, frechet_distance
from ..metrics.neighbours import MEMORISED_QUANTILE, check_held_out
from .measurement import MEASURED, JudgesConfig
from .one_pass import ImageRecord

PUBLISHED = "published for ImageNet at 256 px: 50,000 validation images, features in bfloat16"


def check_floor(records: dict[str, ImageRecord]) -> None:
    """Refuse floor images that are also in the reference. The baseline of distances and of memorisation is what images
    outside of the reference get; copies, pixel for pixel, would bring it towards 0.

    Raises: ValueError: the share of copies is at least the quantile of memorisation.
    """
    copies, count = _shared(records["floor"], records["reference"]), len(records["floor"].keys)
    if copies >= MEMORISED_QUANTILE * count:
        raise ValueError(
            f"{copies} of {count} floor_images are also in the reference, pixel for pixel: expected images "
            "outside of the reference"
        )


def shared_images(records: dict[str, ImageRecord]) -> dict[str, dict[str, int]]:
    """Set of measured images -> set of real ones -> how many of the former are in the latter, pixel for pixel."""
    real = [name for name in ("reference", "floor") if name in records]
    measured = [name for name in MEASURED if name in records]
    return {a: {b: _shared(records[a], records[b]) for b in real} for a in measured}


def _shared(images: ImageRecord, others: ImageRecord) -> int:
    return int(np.isin(images.keys, others.keys).sum())


def check_sizes(config: JudgesConfig, counts: dict[str, int], extractors: dict[str, Extractor]) -> None:
    """Refuse too few images before any is sampled or read. Raises: ValueError naming the set and the metric.

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

    Args: `distances`: rows of `Measurement`; `statistics`: of the reference, for networks whose statistics are read
        from files.
    """
    constants, source = PUBLISHED_CONSTANTS, PUBLISHED
    if config.computes_constants:
        floor = {name: records["floor"].outputs[name]["features"].statistics for name in SIX}
        real = {
            name: statistics.get(name, {}).get("features") or records["reference"].outputs[name]["features"].statistics
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
        # however the six correlate, the deviation of their mean is at most the mean of their deviations
        spread = sum(rows[name]["spread"]["value"] / constants[name] for name in SIX) / len(SIX)
        results[images] = asdict(found) | {"spread_at_most": spread, "num_images": rows[SIX[0]]["num_images"]}
    return results
