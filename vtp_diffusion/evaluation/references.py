"""Reference statistics in the format of ADM's evaluator.

Arrays `mu, sigma` are mean and covariance of the features of FID, `mu_s, sigma_s` of those of sFID, over all images;
`arr_0` holds up to 10,000 of the images, for precision and recall. A file written here also names its network and
images, in `settings`; files without it, such as ADM's own, are of Inception. iMF's arrays are called `ref_mu,
ref_sigma`. `protocols.py` lists the published files.
"""

import json
from pathlib import Path

import numpy as np
import torch

from ..data.npz import open_npz, write_npz
from ..metrics.features import Extractor, FeatureNetwork
from ..metrics.frechet import GaussianStatistics
from .measurement import JudgesConfig
from .one_pass import ImageRecord
from .protocols import OWN, check_reference
from .sources import ImageSource, image_batches

KEYS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def _made_with(path: str | Path, file: dict[str, np.ndarray]) -> dict:
    """The network that a file of statistics names; a file without `settings`, such as ADM's, is of Inception."""
    try:
        settings = json.loads(str(file.get("settings", "{}")))
        return {"name": "inception"} | settings.get("network", {})
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: settings is not the JSON object that `reference` writes: {error}") from error


def read_statistics(
    path: str | Path, network: FeatureNetwork, device: torch.device | str = "cpu", protocol: str = OWN
) -> dict[str, GaussianStatistics]:
    """The statistics in a file: output of the network -> statistics; empty if the file holds images only.

    Raises: ValueError: no npz; statistics of another protocol, network or dimension; a mean without its covariance.
    """
    file = open_npz(path)
    check_reference(str(path), file, protocol)
    file = {name.removeprefix("ref_"): array for name, array in file.items()}
    if "mu" not in file:
        return {}
    made = _made_with(path, file)
    ours = network.describe()
    for key in ("name", "sha256", "preprocessing"):
        if key in made and made[key] != ours[key] and not (key == "name" and network.name.startswith("vtp:")):
            raise ValueError(
                f"{path} holds statistics of features of {made['name']} ({key} {made[key]}), the feature network "
                f"is {network.name} ({key} {ours[key]}): make others with `eval/generation.py reference`"
            )
    found = {}
    for output, (mean, covariance) in KEYS.items():
        if output not in network.output_dims or mean not in file:
            continue
        dim = network.output_dims[output]
        if covariance not in file:
            raise ValueError(f"{path} holds {mean} without {covariance}: expected both")
        if file[mean].shape != (dim,) or file[covariance].shape != (dim, dim):
            raise ValueError(
                f"{path}: {mean} and {covariance} are {file[mean].shape} and {file[covariance].shape}, expected "
                f"statistics of the {dim} features of {network.name}"
            )
        moments = (torch.from_numpy(np.asarray(file[key], np.float64)) for key in (mean, covariance))
        try:
            found[output] = GaussianStatistics.from_moments(*moments, device=device)
        except ValueError as error:
            raise ValueError(f"{path}: {mean} and {covariance}: {error}") from error
    return found


def reference_statistics(
    config: JudgesConfig, extractors: dict[str, Extractor], protocol: str
) -> dict[str, dict[str, GaussianStatistics]]:
    """Network -> output -> statistics of the reference, for every network that has a file; the files must be those of
    the protocol.

    Raises: ValueError: as `read_statistics`, or a file of `reference_statistics` that holds images only.
    """
    found = {}
    for name, file in config.statistics_files.items():
        if not Path(file).is_file():
            raise ValueError(f"{file}, the statistics of the reference for {name}, is not there")
        found[name] = read_statistics(file, extractors[name].network, config.device, protocol)
        if not found[name] and file != config.reference:
            raise ValueError(f"{file} holds no statistics: make them with `eval/generation.py reference`")
    return found


def write_statistics(
    path: str | Path,
    network: FeatureNetwork,
    record: ImageRecord,
    source: ImageSource,
    indices: list[int],
    settings: dict,
) -> None:
    """Write a file for `read_statistics`: statistics, and the images whose features the record keeps.

    Args:
        record: of the images.
        source, indices: the images, and the indices of those that were measured.
        settings: where the images come from; the network is added, and both go into the file as JSON.
    """
    records = record.outputs[network.name]
    arrays = {"settings": np.array(json.dumps(settings | {"network": network.describe(), "images": record.sha256}))}
    for output, keys in KEYS.items():
        if output in records:
            statistics = records[output].statistics
            arrays |= zip(keys, (statistics.mean.cpu().numpy(), statistics.covariance.cpu().numpy()), strict=True)
    kept = [indices[k] for k in records["features"].kept]
    batches = (batch.permute(0, 2, 3, 1).numpy() for batch in image_batches(source, kept, batch_size=256))
    write_npz(path, len(kept), source.size, batches, **arrays)
