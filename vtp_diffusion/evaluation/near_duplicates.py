"""Near-duplicates of the reference among generated images: how many, and the nearest pairs."""

import torch
from PIL import Image

from ..metrics.features import Extractor
from ..metrics.neighbours import NEIGHBOUR_NETWORK, near_duplicate_threshold, nearest_neighbours, neighbour_grid
from ..runtime.reproducibility import random_stream
from .one_pass import FeaturesConfig, ImageRecord
from .sources import ImageSource

CALIBRATION_IMAGES = 1000
PAIRS = 24


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
