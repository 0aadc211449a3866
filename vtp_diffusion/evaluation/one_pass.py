"""One pass of a set of images through feature networks, and the record of it that metrics are computed from.

Images are never kept. Per image and network that are D float32 numbers where neighbours are looked for (400 MB for
50,000 images of 2048 features, 200 MB for their logits), and 16 bytes of hash.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

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
from .sources import ImageSource, PipelineImages, check_real_images, read_batches

ON_CUDA = torch.cuda.is_available()
USUAL_NETWORKS = ("vgg16", "efficientnet_lite0")


@dataclass(kw_only=True)
class ReferenceDataConfig(DataConfig):
    """How real images are read. What goes with their source is checked where that is known, see `open_reference`."""

    source: str = setting(DataConfig.source, "not to be set: reference and floor_images decide")
    resolution: int = setting(DataConfig.resolution, "not to be set: the size of the images decides")

    def __post_init__(self) -> None:
        Settings.__post_init__(self)


@dataclass(kw_only=True)
class FeaturesConfig(Settings):
    """What programs that measure distances have: a reference, feature networks, and how they run."""

    reference: str = setting(help="real images: npz, folder, openmoji or a `datasets` collection")
    data: ReferenceDataConfig = setting(
        default_factory=ReferenceDataConfig,
        help="columns, hold-out and cache of data sets; reference and floor_images set the source",
    )
    feature_network: list[str] | None = setting(
        None,
        f"one or more of {', '.join(FEATURE_NETWORKS)}, vtp:FOLDER; fdr6: six of them, for FDr6; none: "
        f"{' and '.join(USUAL_NETWORKS)}, or as the protocol says",
    )
    weights: list[str] = setting(
        default_factory=list, help="NETWORK=FILE: weights of a feature network; FILE alone where there is one network"
    )
    output: str = setting(help="FILE.json for the results")
    seed: int = setting(0, "of samples, labels and random subsets", at_least=0)
    feature_mode: FeatureMode = setting("exact", "exact: float32; fast: float16 inside the network")
    feature_batch_size: int = setting(256 if ON_CUDA else 32, "images a network sees at once", at_least=1)
    compile: bool = setting(ON_CUDA, "torch.compile the feature networks")
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
        _ = self.weight_files  # refuses words that are no NETWORK=FILE, and networks that are not used

    @property
    def networks(self) -> list[str]:
        """Those that images pass through."""
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
    """How the images of the reference's split were told from the others.

    Args: `images`: those of the reference, as `open_reference` gives them.
    """
    if config.reference.endswith(".npz"):
        return "the file as it is"
    if config.reference == "openmoji":
        return (
            f"train: by base emoji, a hash of its code and seed {config.data.holdout_seed} holds "
            f"{config.data.holdout:g} of them out"
        )
    return "the whole folder, which has no splits" if images.dataset.whole else "train: the data set's own"


def batches_of_this_process(count: int, batch_size: int) -> list[range]:
    """Places of `count` images in batches, which the processes take in turns: those of this one."""
    rank, processes = this_process()
    return [range(k, min(k + batch_size, count)) for k in range(rank * batch_size, count, processes * batch_size)]


@dataclass
class Wanted:
    """What is to be remembered of one output of a network.

    Attributes:
        groups: into how many groups the statistics are kept, see `jackknife_group`; 0 is no statistics.
        kept: features of how many images at most are kept, a random choice; None is all.
    """

    groups: int
    kept: int | None


class Record:
    """One output of one network over a set of images.

    Args:
        dim: width of the output, D.
        count: number of images that will come.
        wanted: what to remember.
        seed: decides whose features are kept, and the groups.
        device: of the statistics.
    """

    def __init__(self, dim: int, count: int, wanted: Wanted, seed: int, device: torch.device | str):
        self.groups = [GaussianStatistics(dim, device) for _ in range(wanted.groups)]
        self.kept = np.arange(count)
        if wanted.kept is not None and wanted.kept < count:
            self.kept = np.sort(random_stream("kept features", seed).permutation(count)[: wanted.kept])
        self._group = jackknife_group(count, max(wanted.groups, 1), seed)
        self._chosen = np.zeros(count, dtype=bool)
        self._chosen[self.kept] = True
        self._positions: list[np.ndarray] = []
        # One block, since thousands of small ones cost several times their size. On that device until `gather`: a copy
        # would wait for the network after every batch.
        self._rows, self._filled = torch.empty(len(self.kept), dim, device=device), 0

    def add(self, positions: Sequence[int], rows: torch.Tensor) -> None:
        """Rows (B, D) of the images at these places of the set."""
        positions = np.asarray(positions)
        for k, group in enumerate(self.groups):
            members = np.flatnonzero(self._group[positions] == k)
            if len(members):
                group.update(_take(rows, members))
        kept = np.flatnonzero(self._chosen[positions])
        self._positions.append(positions[kept])
        self._rows[self._filled : self._filled + len(kept)] = _take(rows, kept)  # mps: to the CPU, as its statistics
        self._filled += len(kept)

    def gather(self) -> None:
        """Make this the record of all processes' images, on every process."""
        self.groups = list(map(gathered, self.groups))  # one at a time: 33 MB each of 2048 features
        mine = np.concatenate([np.zeros(0, dtype=int), *self._positions]), self._rows[: self._filled].cpu()
        positions, rows = zip(*gather_objects(mine), strict=True)
        places, features = np.concatenate(positions), rows[0] if len(rows) == 1 else torch.cat(rows)
        if (np.diff(places) < 0).any():  # processes take turns; one has them in order, and 400 MB need no copy
            features = features[torch.from_numpy(np.argsort(places, kind="stable"))]
        self._positions, self._rows = [self.kept], features

    @property
    def features(self) -> torch.Tensor:
        """(len(kept), D) float32 on the CPU, in the order of the images. After `gather`."""
        return self._rows

    @property
    def statistics(self) -> GaussianStatistics:
        """Of all images."""
        return GaussianStatistics.merged(self.groups)


def gathered(statistics: GaussianStatistics) -> GaussianStatistics:
    """The statistics of all processes' samples, on every process."""
    if this_process()[1] == 1:
        return statistics
    return GaussianStatistics.merged([part.to(statistics.device) for part in gather_objects(statistics.to("cpu"))])


@dataclass
class ImageRecord:
    """Everything remembered of a set of images.

    Attributes:
        outputs: network -> output -> record.
        duplicates: number of images that equal an earlier one, pixel for pixel.
        example: places of one such pair, or None.
        sha256: of the hashes of all images in order: what identifies the set.
        keys: (count,) the first 8 bytes of every image's hash, which tell images apart.
    """

    outputs: dict[str, dict[str, Record]]
    duplicates: int
    example: tuple[int, int] | None
    sha256: str
    keys: np.ndarray


def record_images(
    batches: Iterable[tuple[Sequence[int], torch.Tensor, list[bytes]]],
    count: int,
    extractors: dict[str, Extractor],
    wanted: dict[str, dict[str, Wanted]],
    seed: int,
) -> ImageRecord:
    """Pass a set of images through all networks once.

    Args:
        batches: places in the set, uint8 images (B, 3, H, W) and their hashes, of this process; those of all processes
            are the set.
        count: size of the set.
        wanted: network -> output -> what to remember.
        seed: decides whose features are kept.
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
        shared: dict = {}  # the batch on the device, and resized: once for all networks
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
    """Where statistics of a network's features are computed: where the network runs, if that knows float64."""
    return torch.device("cpu") if extractor.device.type == "mps" else extractor.device


def _take(rows: torch.Tensor, places: np.ndarray) -> torch.Tensor:
    """Rows at the places, without waiting for the device to have computed them."""
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
) -> ImageRecord:
    """Pass a set of images through networks once, every process its batches of them.

    Args:
        name: what the progress bar calls it.
        source, kept: images, and the indices of those that count.
        extractors: network -> extractor.
        wanted: network -> output -> what to remember; a network that is not in it sees nothing.
        spool: where the images are written to on the way.
    """
    rank, step = this_process()[0], config.feature_batch_size
    places = batches_of_this_process(len(kept), step)
    indices = [kept[place] for batch in places for place in batch]
    pin = config.device.startswith("cuda")
    batches = read_batches(source, indices, step, config.num_workers, pin_memory=pin, hashed=True)
    verb = "sampling" if isinstance(source, PipelineImages) else "reading"

    def passing():
        with tqdm(total=len(indices), desc=f"{verb} {name}", unit="image", disable=rank > 0) as progress:
            for batch, (images, hashes) in zip(places, batches, strict=True):
                if spool is not None:
                    spool.write(batch, images.permute(0, 2, 3, 1).numpy())
                yield batch, images, hashes
                progress.update(len(batch))

    return record_images(passing(), len(kept), {n: extractors[n] for n in wanted}, wanted, config.seed)
