"""Copies of training images among generated ones: near-duplicates, the nearest pairs, and the memorised share.

A generator's decoder changes every image a little, a copy of a training image too. So real images pass through the
same autoencoder before they are compared (`decoded_sources`): held-out ones show how near images lie that are no
copies, and training images show how many copies are found.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..metrics.features import Extractor
from ..metrics.neighbours import (
    NEIGHBOUR_NETWORK,
    memorised,
    near_duplicate_threshold,
    nearest_neighbours,
    neighbour_grid,
)
from ..models.loading import load_autoencoder
from ..runtime.reproducibility import random_stream
from .measurement import DECODED_FLOOR, DECODED_REFERENCE, MEASURED, JudgesConfig
from .one_pass import FeaturesConfig, ImageRecord, statistics_device
from .sources import ImageSource, ReconstructedImages, chosen_images

COPIED_IMAGES = 500
CALIBRATION_IMAGES = 1000
PAIRS = 24


def open_decoder(folder: str | None, images: Any, device: torch.device | str) -> torch.nn.Module | None:
    """The autoencoder that decoded the generated images, or None if it is not known.

    Args: `folder`: of an autoencoder or a pipeline; None: that of `images`, if this is a pipeline.
    Raises: as `load_autoencoder`.
    """
    if folder is None:
        return getattr(images, "vae", None)
    inner = Path(folder) / "vae"
    return load_autoencoder(inner if inner.is_dir() else folder).to(device)


def decoded_sources(
    real: dict[str, tuple[ImageSource, list[int]]], vae: torch.nn.Module | None, seed: int
) -> dict[str, tuple[ImageSource, list[int]]]:
    """Real images after the autoencoder: all of the floor, and a random part of the reference, which are copies as a
    generator with this decoder would draw them. Nothing without an autoencoder.

    Args: `real`: name -> images, and the indices of those that are measured.
    """
    if vae is None:
        return {}
    decoded = {}
    if "floor" in real:
        floor, kept = real["floor"]
        decoded[DECODED_FLOOR] = ReconstructedImages(floor, vae), kept
    source, base = real["reference"]
    chosen = chosen_images(min(COPIED_IMAGES, len(base)), len(base), seed, "")
    return decoded | {DECODED_REFERENCE: (ReconstructedImages(source, vae), [base[k] for k in chosen])}


def measure_memorisation(
    config: JudgesConfig, records: dict[str, ImageRecord], extractors: dict[str, Extractor]
) -> list[dict]:
    """The memorised share of every measured set of images on every network, for result files."""
    results = []
    for network in config.feature_network:
        device = statistics_device(extractors[network])
        features = {n: record.outputs[network]["features"].features.to(device) for n, record in records.items()}
        training = torch.cat([features[name] for name in ("reference", "variants") if name in features])
        held_out = features.get(DECODED_FLOOR, features["floor"])
        for images in (name for name in MEASURED if name in features):
            found = memorised(features[images], held_out, training, features.get(DECODED_REFERENCE))
            results.append({"network": network, "images": images} | asdict(found))
    return results


def count_near_duplicates(
    config: FeaturesConfig,
    sources: dict[str, tuple[ImageSource, list[int]]],
    records: dict[str, ImageRecord],
    extractors: dict[str, Extractor],
) -> tuple[dict, Image.Image]:
    """Shares of images that are near-duplicates of reference images, for result files; and a picture of the nearest
    pairs.

    Args: `sources`: name -> images, and the indices of those that are measured.
    """
    extractor = extractors[NEIGHBOUR_NETWORK]

    def extract(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([extractor(batch)["features"].cpu() for batch in images.split(config.feature_batch_size)])

    features = {n: r.outputs[NEIGHBOUR_NETWORK]["features"].features for n, r in records.items()}
    reference, base = sources["reference"]
    keys = torch.cat([features["reference"], *(features[n] for n in ("variants",) if n in features)])
    key_indices = torch.tensor(base + (sources["variants"][1] if "variants" in sources else []))
    chosen = random_stream("calibration images", config.seed).permutation(len(base))[:CALIBRATION_IMAGES].tolist()
    calibration = reference.read([base[k] for k in chosen])
    threshold = near_duplicate_threshold(calibration, features["reference"][chosen], extract, config.seed)
    result = {"network": NEIGHBOUR_NETWORK, "threshold": threshold, "calibration_images": len(chosen)}
    for name in features:  # not over a set, whose order would change from run to run
        if name in ("reference", "variants"):
            continue
        distances, indices = nearest_neighbours(features[name], keys)
        close = int((distances < threshold).sum())
        result[name] = {"near_duplicates": close, "num_images": len(distances), "share": close / len(distances)}
        if name == "generated":
            source, kept = sources[name]
            nearest = distances.argsort(stable=True)[:PAIRS]
            shown = source.read([kept[k] for k in nearest.tolist()])
            picture = neighbour_grid(shown, reference.read(key_indices[indices[nearest]].tolist()), distances[nearest])
    among, _ = nearest_neighbours(features["reference"], features["reference"], exclude_self=True)
    close = int((among < threshold).sum())
    result["reference"] = {"near_duplicates": close, "num_images": len(base), "share": close / len(base)}
    return result, picture
