"""Reference statistics in the format of ADM's evaluator.

Arrays `mu, sigma` are mean and covariance of the features of FID, `mu_s, sigma_s` of those of sFID, over all images;
`arr_0` holds up to 10,000 of the images, for precision and recall. A file written here also names its network and
images, in `settings`; files without it, such as ADM's own, are of Inception. iMF's arrays are called `ref_mu,
ref_sigma`. `protocols.py` lists the published files.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data.npz import open_npz, write_npz
from ..metrics.features import Extractor, FeatureNetwork
from ..metrics.frechet import GaussianStatistics
from ..runtime.config import setting
from ..runtime.disk import check_output
from ..runtime.processes import this_process
from ..runtime.programs import print_end
from .measurement import JudgesConfig, wanted_outputs
from .one_pass import FeaturesConfig, ImageRecord, open_networks, record_source, settings_of, split_rule
from .printed_results import print_faults
from .protocols import OWN, check_reference
from .sources import ImageSource, image_batches, image_faults, open_reference

KEYS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(kw_only=True)
class ReferenceConfig(FeaturesConfig):
    """Settings of `make_reference`."""

    output: str = setting(help="FILE.npz for the statistics; with several networks FILE-NETWORK.npz for each")
    resolution: int = setting(256, "side that the images are cropped to", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for file in (self.output, *self.files.values()):
            check_output(str(file), ".npz")

    @property
    def files(self) -> dict[str, Path]:
        """Network -> file of its statistics: the output, or with several networks FILE-NETWORK.npz for each."""
        path, several = Path(self.output), len(self.feature_network) > 1
        names = {name: name.replace("/", "-").replace(":", "-") for name in self.feature_network}
        return {
            n: path.with_name(f"{path.stem}-{word}{path.suffix}") if several else path for n, word in names.items()
        }


def made_with(path: str | Path, file: dict[str, np.ndarray]) -> dict:
    """The settings in a file of statistics. Its network is Inception if it names none, as ADM's files."""
    try:
        settings = json.loads(str(file.get("settings", "{}")))
        return settings | {"network": {"name": "inception"} | settings.get("network", {})}
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
    made = made_with(path, file)["network"]
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


def check_statistics(config: JudgesConfig, reference: ImageRecord) -> None:
    """Refuse `reference_statistics` of other images than those of the reference. Files that do not tell theirs, such
    as ADM's, pass.

    Raises: ValueError naming the file.
    """
    files = {name: file for name, file in config.statistics_files.items() if file != config.reference}
    ours, known = reference.sha256, open_npz(config.reference) if files and config.reference.endswith(".npz") else {}
    if not known.keys().isdisjoint(("mu", "ref_mu")):  # of more images than it holds
        ours = made_with(config.reference, known).get("images")
    for name, file in files.items():
        theirs = made_with(file, open_npz(file)).get("images")
        if None not in (ours, theirs) and ours != theirs:
            raise ValueError(
                f"{file}, the statistics of the reference for {name}, is of other images, or of another size or "
                f"order: SHA-256 {theirs[:16]}, those of {config.reference} have {ours[:16]}. Make it of the same "
                "images with `eval/generation.py reference`"
            )


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


def make_reference(config: ReferenceConfig) -> None:
    """Statistics of a data set in ADM's format, a file for every network, in one pass."""
    extractors = open_networks(config, config.feature_network)
    opened = open_reference(config.data, config.reference, "train", (config.resolution,) * 2)
    if opened is None:
        raise ValueError(f"{config.reference} holds statistics already")
    source, base, _ = opened
    wanted = {name: wanted_outputs(extractor.network, "reference") for name, extractor in extractors.items()}
    found = record_source(config, "reference", source, base, extractors, wanted)
    faults = image_faults({"reference": (source, base)})
    if this_process()[0] > 0:
        return
    settings = {"settings": settings_of(config), "num_reference": len(base)}
    settings |= {"split_rule": split_rule(config, source), "duplicates": found.duplicates, **faults}
    for name, file in config.files.items():
        write_statistics(file, extractors[name].network, found, source, base, settings)
        kept = len(found.outputs[name]["features"].kept)
        print(f"statistics of {len(base)} images on {name} and {kept} of the images")
    print_faults(**faults)
    then = "eval/generation.py --images FOLDER --reference {} --output results.json"
    print_end([str(file) for file in config.files.values()], then, str(next(iter(config.files.values()))))
