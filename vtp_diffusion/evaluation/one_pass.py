"""One pass of a set of images through feature networks, and the record of it that metrics are computed from.

Images are never kept. A record has D float32 numbers per image and network if all features are needed (400 MB for
50,000 images of 2048 features, 200 MB for their logits), and 16 bytes of hash per image.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.image_datasets import DataConfig
from ..data.images import to_device
from ..data.npz import ImageSpool
from ..metrics.features import Extractor, FeatureMode
from ..metrics.frechet import GaussianStatistics, jackknife_group
from ..metrics.networks import FEATURE_NETWORKS, feature_network, network_names, weight_files
from ..runtime.config import Settings, setting
from ..runtime.processes import check_device, gather_objects, reading_processes, this_process
from ..runtime.reproducibility import random_stream
from .sources import FolderImages, ImageSource, PipelineImages, check_real_images, hashed_batches

ON_CUDA = torch.cuda.is_available()
USUAL_NETWORKS = ("vgg16", "efficientnet_lite0")


@dataclass(kw_only=True)
class ReferenceDataConfig(DataConfig):
    """How real images are read. `open_reference` sets source and resolution, and only then are all options checked."""

    source: str = setting(DataConfig.source, "not to be set: reference and floor_images decide")
    resolution: int = setting(DataConfig.resolution, "not to be set: the size of the images decides")

    def __post_init__(self) -> None:
        Settings.__post_init__(self)


@dataclass(kw_only=True)
class FeaturesConfig(Settings):
    """Settings of programs that measure distances: a reference, feature networks, and how they run."""

    reference: str = setting(help="real images: npz, folder, openmoji or a `datasets` collection")
    data: ReferenceDataConfig = setting(
        default_factory=ReferenceDataConfig,
        help="columns, hold-out and cache of data sets; reference and floor_images set the source",
    )
    feature_network: list[str] | None = setting(
        None,
        f"one or more of {', '.join(FEATURE_NETWORKS)}, vtp:FOLDER; fdr6: the six networks of FDr6; none: "
        f"{' and '.join(USUAL_NETWORKS)}, or the protocol's",
    )
    weights: list[str] = setting(
        default_factory=list, help="NETWORK=FILE: weights of a feature network; FILE alone where there is one network"
    )
    output: str = setting(help="FILE.json for the results")
    seed: int = setting(0, "of samples, labels and random subsets", at_least=0)
    feature_mode: FeatureMode = setting("exact", "exact: float32; fast: float16 inside the network")
    feature_batch_size: int = setting(256 if ON_CUDA else 32, "images a network sees at once", at_least=1)
    compile: bool = setting(False, "torch.compile the feature networks: pays only with very many images")
    num_workers: int = setting(reading_processes() if ON_CUDA else 0, "processes that read image files", at_least=0)
    device: str = setting("cuda" if ON_CUDA else "cpu", "torch device to run on")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)
        check_real_images(self.reference, "reference")
        if (self.data.source, self.data.resolution) != (DataConfig.source, DataConfig.resolution):
            raise ValueError(
                "data.source and data.resolution are decided by reference, floor_images and the size of the images: "
                f"got {self.data.source} and {self.data.resolution}"
            )
        if self.feature_network is None:
            self.feature_network = list(USUAL_NETWORKS)
        if not self.feature_network:
            raise ValueError(f"feature_network is empty, expected one or more of {', '.join(FEATURE_NETWORKS)}")
        self.feature_network = network_names(self.feature_network)
        _ = self.weight_files  # raises ValueError for words that are no NETWORK=FILE, and for unused networks

    @property
    def networks(self) -> list[str]:
        """The networks that images pass through."""
        return self.feature_network

    @property
    def weight_files(self) -> dict[str, str]:
        """Network -> file of its weights. Raises: as `weight_files`."""
        return weight_files(self.weights, self.feature_network, self.networks)


def open_networks(config: FeaturesConfig, names: list[str]) -> dict[str, Extractor]:
    """Network -> extractor, ready on the device. Raises what `feature_network` raises."""
    networks = {name: feature_network(name, config.weight_files.get(name)) for name in names}
    return {
        name: Extractor(network, config.device, config.feature_mode, config.compile, config.feature_batch_size)
        for name, network in networks.items()
    }


def settings_of(config: FeaturesConfig) -> dict:
    """The settings that result files record."""
    settings = asdict(config)
    for decided_elsewhere in ("source", "resolution"):
        del settings["data"][decided_elsewhere]
    return settings | {"processes": this_process()[1]}


def split_rule(config: FeaturesConfig, images: ImageSource | None) -> str:
    """In words, for result files: which images of its source are the reference.

    Args: `images`: of the reference, as `open_reference` returns them.
    """
    if config.reference.endswith(".npz"):
        return "the file as it is"
    if config.reference == "openmoji":
        return (
            f"train: by base emoji, a hash of its code and seed {config.data.holdout_seed} holds "
            f"{config.data.holdout:g} of them out"
        )
    whole = images.dataset.whole and Path(config.reference).is_dir()
    return "the whole folder, which has no splits" if whole else "train: the data set's own"


def batches_of_this_process(count: int, batch_size: int) -> list[range]:
    """The batches of this process, as ranges of 0 to `count` - 1: process r of P takes every P-th batch."""
    rank, processes = this_process()
    return [range(k, min(k + batch_size, count)) for k in range(rank * batch_size, count, processes * batch_size)]


@dataclass
class Wanted:
    """What to record of one output of a network.

    Attributes:
        groups: number of groups that the statistics are kept in, see `jackknife_group`; 0: no statistics.
        max_features: at most this many images, chosen at random, have their features kept; None: all.
    """

    groups: int
    max_features: int | None


class Record:
    """One output of one network over a set of images.

    Args:
        dim: width of the output, D.
        count: number of images of the set.
        wanted: what to record.
        seed: decides which features are kept, and the groups.
        device: of the statistics.
    """

    def __init__(self, dim: int, count: int, wanted: Wanted, seed: int, device: torch.device | str):
        self.groups = [GaussianStatistics(dim, device) for _ in range(wanted.groups)]
        self.kept = np.arange(count)
        if wanted.max_features is not None and wanted.max_features < count:
            self.kept = np.sort(random_stream("kept features", seed).permutation(count)[: wanted.max_features])
        self._group = jackknife_group(count, max(wanted.groups, 1), seed)
        self._chosen = np.zeros(count, dtype=bool)
        self._chosen[self.kept] = True
        self._positions: list[np.ndarray] = []
        # One tensor, since thousands of small ones take several times the memory. It stays on the device until
        # `gather`: copying to the CPU would wait for the network after every batch.
        self._rows, self._filled = torch.empty(len(self.kept), dim, device=device), 0

    def add(self, positions: Sequence[int], rows: torch.Tensor) -> None:
        """Add the output (B, D) for the images at these positions of the set."""
        positions = np.asarray(positions)
        for k, group in enumerate(self.groups):
            members = np.flatnonzero(self._group[positions] == k)
            if len(members):
                group.update(_take(rows, members))
        kept = np.flatnonzero(self._chosen[positions])
        self._positions.append(positions[kept])
        self._rows[self._filled : self._filled + len(kept)] = _take(rows, kept)  # from mps this copies to the CPU
        self._filled += len(kept)

    def gather(self) -> None:
        """Make this the record of all processes' images, on every process."""
        self.groups = list(map(gathered, self.groups))  # one at a time: each has 33 MB for 2048 features
        mine = np.concatenate([np.zeros(0, dtype=int), *self._positions]), self._rows[: self._filled].cpu()
        positions, rows = zip(*gather_objects(mine), strict=True)
        places, features = np.concatenate(positions), rows[0] if len(rows) == 1 else torch.cat(rows)
        if (np.diff(places) < 0).any():  # with one process they are in order already: that saves a copy of 400 MB
            features = features[torch.from_numpy(np.argsort(places, kind="stable"))]
        self._positions, self._rows = [self.kept], features

    @property
    def features(self) -> torch.Tensor:
        """(len(kept), D) float32 on the CPU, in the order of the images. After `gather`."""
        return self._rows

    @property
    def statistics(self) -> GaussianStatistics:
        """Statistics of all images."""
        return GaussianStatistics.merged(self.groups)


def gathered(statistics: GaussianStatistics) -> GaussianStatistics:
    """The statistics of all processes' samples, on every process."""
    if this_process()[1] == 1:
        return statistics
    return GaussianStatistics.merged([part.to(statistics.device) for part in gather_objects(statistics.to("cpu"))])


@dataclass
class ImageRecord:
    """Everything recorded of a set of images.

    Attributes:
        outputs: network -> output -> record.
        duplicates: number of images that equal an earlier one, pixel for pixel.
        example: positions of one such pair, or None.
        sha256: hash of the hashes of all images in order, which identifies the set.
        keys: (count,) the first 8 bytes of every image's hash, to find images that two sets share.
    """

    outputs: dict[str, dict[str, Record]]
    duplicates: int
    example: tuple[int, int] | None
    sha256: str
    keys: np.ndarray


Part = tuple[Sequence[int], torch.Tensor, list[bytes]]  # positions in the set, uint8 images (B, 3, H, W), hashes


def rebatched(parts: Iterable[Part], size: int) -> Iterator[Part]:
    """The same images in batches of `size`, of which only the last may be smaller."""
    positions, pieces, hashes = [], [], []
    for part in parts:
        if not positions and len(part[0]) == size:
            yield part  # not copied
            continue
        positions, hashes = [*positions, *part[0]], hashes + part[2]
        pieces.append(part[1])
        if len(positions) < size:
            continue
        images, whole = torch.cat(pieces), len(positions) - len(positions) % size
        for k in range(0, whole, size):
            yield positions[k : k + size], images[k : k + size], hashes[k : k + size]
        positions, pieces, hashes = positions[whole:], [images[whole:]], hashes[whole:]
    if positions:
        yield positions, torch.cat(pieces), hashes


def record_images(
    batches: Iterable[Part],
    count: int,
    extractors: dict[str, Extractor],
    wanted: dict[str, dict[str, Wanted]],
    seed: int,
) -> ImageRecord:
    """Pass a set of images through all networks once.

    Args:
        batches: of this process. Together the processes read the whole set.
        count: size of the set.
        wanted: network -> output -> what to record.
        seed: decides which features are kept.
    Raises: ValueError: features that are not finite.
    """
    outputs = {
        name: {
            output: Record(extractor.network.output_dims[output], count, want, seed, statistics_device(extractor))
            for output, want in wanted[name].items()
        }
        for name, extractor in extractors.items()
    }
    hashes: dict[int, bytes] = {}
    for positions, images, digests in batches:
        hashes.update(zip(positions, digests, strict=True))
        shared: dict = {}  # all networks share the batch, copied to the device and resized
        for name, records in outputs.items():
            found = extractors[name](images, shared)
            for output, record in records.items():
                record.add(positions, found[output])
    for record in (record for records in outputs.values() for record in records.values()):
        record.gather()
    everyones = {place: digest for part in gather_objects(hashes) for place, digest in part.items()}
    if len(everyones) != count:
        raise ValueError(f"{len(everyones)} of {count} images were read")
    ordered = [everyones[place] for place in range(count)]
    example = next(_pairs(ordered), None)
    joined = b"".join(ordered)
    keys = np.frombuffer(joined, np.uint64).reshape(count, -1)[:, 0]
    return ImageRecord(outputs, count - len(set(ordered)), example, hashlib.sha256(joined).hexdigest(), keys)


def statistics_device(extractor: Extractor) -> torch.device:
    """The device for statistics of features: that of the network, but the CPU for mps, which has no float64."""
    return torch.device("cpu") if extractor.device.type == "mps" else extractor.device


def _take(rows: torch.Tensor, places: np.ndarray) -> torch.Tensor:
    """The rows at these places, without a synchronisation of the device."""
    return rows[to_device(torch.from_numpy(places), rows.device)]


def _pairs(hashes: list[bytes]) -> Iterator[tuple[int, int]]:
    first: dict[bytes, int] = {}
    for place, digest in enumerate(hashes):
        if digest in first:
            yield first[digest], place
        first.setdefault(digest, place)


def record_source(
    config: FeaturesConfig,
    name: str,
    source: ImageSource,
    kept: list[int],
    extractors: dict[str, Extractor],
    wanted: dict[str, dict[str, Wanted]],
    spool: ImageSpool | None = None,
    distinct: bool = False,
) -> ImageRecord:
    """Pass a set of images through networks once; the processes share its batches. A pipeline samples in batches of
    its own size, whatever that of the networks is.

    Args:
        name: of the set, for the progress bar.
        source, kept: images, and the indices of those that are measured.
        extractors: network -> extractor.
        wanted: network -> output -> what to record; networks that are missing in it are not run.
        spool: the images are also written to it.
        distinct: an image that equals an earlier one is an error: within a process as soon as it is read.
    Raises: ValueError: such an image; what `record_images` raises.
    """
    rank, samples = this_process()[0], isinstance(source, PipelineImages)
    step = source.batch_size if samples else config.feature_batch_size
    places = batches_of_this_process(len(kept), step)
    indices = [kept[place] for batch in places for place in batch]
    pin = config.device.startswith("cuda")
    batches = hashed_batches(source, indices, step, config.num_workers, pin_memory=pin)
    verb = "sampling" if samples else "reading"

    def equal(pair: tuple[int, int]) -> ValueError:
        names = [str(source.files[kept[k]].name if isinstance(source, FolderImages) else kept[k]) for k in pair]
        return ValueError(
            f"the {name} images hold one twice: {names[1]} equals {names[0]} (numbers count from 0). Fewer would be "
            "measured than N says: remove equal ones, or give --allow_duplicates"
        )

    def passing():
        seen: dict[bytes, int] = {}
        with tqdm(total=len(indices), desc=f"{verb} {name}", unit="image", disable=rank > 0) as progress:
            for batch, (images, hashes) in zip(places, batches, strict=True):
                for place, digest in zip(batch, hashes, strict=True) if distinct else ():
                    if (first := seen.setdefault(digest, place)) != place:
                        raise equal((first, place))
                if spool is not None:
                    spool.write(batch, images.permute(0, 2, 3, 1).numpy())
                yield batch, images, hashes
                progress.update(len(batch))

    full = rebatched(passing(), config.feature_batch_size)
    found = record_images(full, len(kept), {n: extractors[n] for n in wanted}, wanted, config.seed)
    if distinct and found.example is not None:  # read by two processes
        raise equal(found.example)
    return found
