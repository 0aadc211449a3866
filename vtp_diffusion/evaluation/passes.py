"""What evaluation programs do with images before anything is measured: open them, and pass them through networks."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.image_datasets import DataConfig
from ..data.npz import ImageSpool, NpzImages
from ..metrics.extraction import FEATURE_NETWORKS, Extractor, FeatureMode, feature_network, network_name, weight_files
from ..runtime.processes import check_device, reading_processes, this_process
from .records import ImageRecord, Wanted, record_images
from .references import holds_images
from .sources import DatasetImages, ImageSource, PipelineImages, open_measured, read_batches

ON_CUDA = torch.cuda.is_available()


@dataclass(kw_only=True)
class FeaturesConfig:
    """What both commands have: a reference, feature networks, and how they run."""

    reference: str = field(metadata={"help": "real images: npz, folder, openmoji or a `datasets` collection"})
    reference_split: str = field(default="train", metadata={"help": "split of the reference"})
    data: DataConfig = field(
        default_factory=DataConfig,
        metadata={"help": "columns, hold-out and cache of data sets; reference and floor_images set the source"},
    )
    feature_network: list[str] = field(
        default_factory=lambda: ["vgg16", "efficientnet_lite0"],
        metadata={"help": f"one or more of {', '.join(FEATURE_NETWORKS)}, vtp:FOLDER"},
    )
    weights: list[str] = field(
        default_factory=list, metadata={"help": "NETWORK=FILE: weights of a feature network; FILE if there is one"}
    )
    output: str = field(metadata={"help": "FILE for the results"})
    seed: int = field(default=0, metadata={"help": "of samples, labels and random subsets"})
    feature_mode: FeatureMode = field(
        default="exact",
        metadata={"help": "float32 (on some GPUs by metrics/convolution.py), or float16 inside"},
    )
    feature_batch_size: int = field(default=256 if ON_CUDA else 32, metadata={"help": "images a network sees at once"})
    compile: bool = field(default=ON_CUDA, metadata={"help": "torch.compile the feature networks"})
    num_workers: int = field(
        default=reading_processes() if ON_CUDA else 0, metadata={"help": "processes that read image files"}
    )
    device: str = field(default="cuda" if ON_CUDA else "cpu", metadata={"help": "torch device to run on"})

    def __post_init__(self) -> None:
        check_device(self.device)
        if (self.data.source, self.data.resolution) != (DataConfig.source, DataConfig.resolution):
            raise ValueError(
                "data.source and data.resolution are decided by reference, floor_images and the size of the images: "
                f"got {self.data.source} and {self.data.resolution}"
            )
        if not self.feature_network:
            raise ValueError(f"feature_network is empty, expected one or more of {', '.join(FEATURE_NETWORKS)}")
        self.feature_network = [network_name(name) for name in self.feature_network]
        weight_files(self.weights, self.feature_network)
        if self.feature_batch_size < 1 or self.num_workers < 0:
            raise ValueError(
                "feature_batch_size must be at least 1 and num_workers 0, "
                f"got {self.feature_batch_size} and {self.num_workers}"
            )


def open_networks(config: FeaturesConfig, names: list[str]) -> dict[str, Extractor]:
    """Network -> extractor, ready on the device. Raises what `feature_network` raises."""
    files = weight_files(config.weights, config.feature_network)
    networks = {name: feature_network(name, files.get(name)) for name in names}
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


def open_reference(
    data: DataConfig, source: str, split: str, size: tuple[int, int]
) -> tuple[ImageSource, list[int], list[int]] | None:
    """Real images of the given height and width, and the indices of those that are no variants of others and of those
    that are. None if the source holds statistics only."""
    if source.endswith(".npz"):
        if not holds_images(source):
            return None
        images = NpzImages(source)
        if images.size != size:
            raise ValueError(f"{source} holds images of {images.size}, expected {size}, the size of what is measured")
        return images, list(range(len(images))), []
    if size[0] != size[1]:
        raise ValueError(f"the generated images are {size}: a data set can only be cropped to squares")
    images = open_measured(replace(data, source=source, resolution=size[0]), split)
    weights = images.dataset.weights
    is_base = weights == weights.max()
    base, variants = (torch.nonzero(chosen).flatten().tolist() for chosen in (is_base, ~is_base))
    return images, base, variants


def chosen_images(num_images: int | None, count: int, seed: int, found: str) -> list[int]:
    """Indices of the images that are measured, in order: all `count` of them (None), or a random subset.

    A subset is random because folders are sorted by class: the first images would be those of the first classes.

    Args: `found`: in words, how many images of what there are.
    Raises: ValueError: more are wanted than there are.
    """
    wanted = count if num_images is None else num_images
    if wanted > count:
        raise ValueError(f"num_images is {wanted}, but {found}")
    if wanted == count:
        return list(range(count))
    return sorted(np.random.default_rng(seed).permutation(count)[:wanted].tolist())


def subset_rule(chosen: Sequence[int], count: int, seed: int) -> str:
    """How `chosen_images` chose, in the words of result files."""
    return "all" if len(chosen) == count else f"a random subset of {count}, seed {seed}"


def image_faults(sources: dict[str, tuple[ImageSource, Sequence[int]]]) -> dict[str, dict]:
    """What is wrong with the images that count, of every source that is a data set, once all processes have read their
    part of them; all of them must ask.

    Images that are smaller than they are measured are no error: a model of 32 px may well have learned from 28.

    Args: `sources`: name -> images, and the indices of those that count.
    Returns: "skipped": name -> keys of those that cannot be read and are left out; "enlarged": name -> how many are
        smaller.
    """
    datasets = {name: source for name, source in sources.items() if isinstance(source[0], DatasetImages)}
    return {
        "skipped": {name: images.dataset.skipped for name, (images, _) in datasets.items()},
        "enlarged": {name: images.count_enlarged(kept) for name, (images, kept) in datasets.items()},
    }


def fault_lines(skipped: list[str], enlarged: int, resolution: int) -> Iterator[str]:
    """What a program that measures one data set says of the images that it lacks or had to enlarge."""
    if skipped:
        yield f"{len(skipped)} more cannot be read and are left out, the first is {skipped[0]}"
    if enlarged:
        yield f"{enlarged} of them are smaller than {resolution} px and were enlarged"


def split_rule(config: FeaturesConfig) -> str:
    """How the images of the reference's split were told from the others."""
    if config.reference.endswith(".npz"):
        return "the file as it is"
    if config.reference == "openmoji":
        return (
            f"{config.reference_split}: by base emoji, a hash of its code and seed {config.data.holdout_seed} holds "
            f"{config.data.holdout:g} of them out"
        )
    return f"{config.reference_split}: the data set's own"


def batches_of_this_process(count: int, batch_size: int) -> list[range]:
    """Places of `count` images in batches, which the processes take in turns: those of this one."""
    rank, processes = this_process()
    return [range(k, min(k + batch_size, count)) for k in range(rank * batch_size, count, processes * batch_size)]


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
