"""How far generated images are from real ones: FID, sFID, Inception score, precision, recall, density, coverage, KID;
the same on other networks; with real-vs-real baselines ("floors"), spreads, a control and near-duplicates.

    python eval/generation.py --images weights/openmoji-128 --num_images 1000 --guidance_scale 4 \\
        --reference openmoji --control untrained --nearest_neighbours pairs.png --output results.json

    python eval/generation.py --images samples.npz --num_images 50000 --reference VIRTUAL_imagenet256_labeled.npz \\
        --feature_network inception --weights weights-inception-2015-12-05-6726825d.pth --output fid.json

    accelerate launch eval/generation.py --images PIPELINE --num_images 50000 --reference FILE.npz ...

    python eval/generation.py reference --reference FOLDER --resolution 256 --feature_network inception \\
        --output reference.npz

    python eval/generation.py --images samples.npz --reference data/train --floor_images data/validation \\
        --feature_network fdr6 --metrics mind memorisation --output judges.json

    python eval/generation.py compare A.json B.json
    python eval/generation.py reach RUN_FOLDER 20

--images and --control take a folder of images, an npz (key arr_0, uint8 NHWC) or the folder of a pipeline, which is
sampled while it is measured; image k depends only on the seed and k. Only --save_images writes the samples, to be
measured again or elsewhere. --reference and --floor_images take an npz, or a source of `data.source`
(a folder, openmoji, a `datasets` collection), which is cropped to the size of the generated images. An npz may hold
the statistics of ADM's evaluator; `generation.py reference` makes such a file.
`generation.py compare` prints the differences between two results, or the reasons why they do not compare;
`generation.py reach` says how much training a distance took (E@FID-k), from the log of train_dit/train.py.
--protocol measures as one of the published protocols for FID-50K does (`evaluation/protocols.py`).

With inception (the weights of 2015, whose hash is checked) the numbers are those of ADM's evaluator, which papers
quote: FID, sFID, Inception score, precision and recall. Density and coverage are those of arXiv:2002.09797, KID is the
unbiased estimate of arXiv:1801.01401, not multiplied by 1000. On other networks (vgg16, efficientnet_lite0, and
vtp:FOLDER, the encoder of a saved VTP) the same metrics have the network's name and are no FID.

--feature_network fdr6 measures on the six networks of FDr6 (`metrics/timm_networks.py`, `metrics/fdr6.py`): FDr6 is
the mean of their Fréchet distances, each divided by that of validation images. MIND (`metrics/mind.py`) is a distance
for few images. Memorisation is the share of images nearer to a training image than all but 5 % of --floor_images are.
For it and for near-duplicates real images pass through the generator's autoencoder first, and training images too: of
these copies, as a generator would draw them, most should be found (`evaluation/copies.py`).

Every distance is given as three numbers: to the whole reference, with its standard error; at sizes at which real
images can be compared with real ones; and that of real images at these sizes, the floor. Compare the last two
(`metrics/frechet.py`). The floor is measured between two disjoint random parts of the reference, or with
--floor_images between those and the reference. A control shows the numbers of an untrained network. Variants that a
data set draws less often (skin tones) are left out of the reference, but neighbours are also looked for among them.

Features are kept in memory, images are not: 0.7 GB for 50,000 images on inception, whatever their size, and as much
again while neighbours are looked for; no other memory grows with the number of images. Equal images are counted; in a
folder or an npz they are an error, since some file is there twice. Real images that cannot be read
(--data.skip_unreadable) are left out and counted, smaller ones are enlarged and counted.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vtp_diffusion.data.npz import ImageSpool, NpzImages
from vtp_diffusion.evaluation import protocols
from vtp_diffusion.evaluation.comparison import compare_files
from vtp_diffusion.evaluation.convergence import reach_line
from vtp_diffusion.evaluation.copies import count_near_duplicates, decoded_sources, measure_memorisation, open_decoder
from vtp_diffusion.evaluation.judges import check_floor, check_sizes, measure_fdr6, shared_images
from vtp_diffusion.evaluation.measurement import MEASURED, JudgesConfig, Measurement, wanted_of
from vtp_diffusion.evaluation.one_pass import (
    ImageRecord,
    open_networks,
    record_source,
    settings_of,
    split_rule,
    statistics_device,
)
from vtp_diffusion.evaluation.printed_results import print_results
from vtp_diffusion.evaluation.references import ReferenceConfig, check_statistics, make_reference, reference_statistics
from vtp_diffusion.evaluation.sources import (
    DatasetImages,
    FolderImages,
    ImageSource,
    PipelineImages,
    chosen_images,
    image_faults,
    open_reference,
    pipeline_image_size,
    subset_rule,
)
from vtp_diffusion.generation.cost import COST, sampling_cost
from vtp_diffusion.generation.sampler_config import SamplerConfig
from vtp_diffusion.generation.sampling import LabelRule, draw_labels, labels_by_name, open_pipeline, reset_networks
from vtp_diffusion.metrics.features import Extractor
from vtp_diffusion.metrics.neighbours import NEIGHBOUR_NETWORK
from vtp_diffusion.runtime.cli import run
from vtp_diffusion.runtime.config import parse_config, setting
from vtp_diffusion.runtime.disk import check_output, file_sha256, write_picture, write_results
from vtp_diffusion.runtime.processes import join_processes, this_process
from vtp_diffusion.runtime.programs import print_end_of_evaluation, unknown_word

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

UNTRAINED = "untrained"
SUBCOMMANDS = ("reference", "compare", "reach")
# settings that only sampling uses; the seed is also that of random subsets
SAMPLING = (*(field.name for field in fields(SamplerConfig) if field.name != "seed"), "labels")


@dataclass(kw_only=True)
class GenerationConfig(JudgesConfig, SamplerConfig):
    """Settings of this program."""

    images: str = setting(help="folder of images, npz, or folder of a pipeline to sample")
    control: str | None = setting(
        None, "images or pipeline of an untrained network; untrained: the pipeline with random transformer weights"
    )
    nearest_neighbours: str | None = setting(None, "FILE.png: count near-duplicates and show the nearest pairs")
    autoencoder: str | None = setting(
        None,
        "folder of the autoencoder, or of its pipeline, that decoded the images: real images pass through it before "
        "copies are looked for; none: that of images, if this is a pipeline",
    )
    allow_duplicates: bool = setting(False, "measure a folder or npz even if it holds an image twice")
    save_images: str | None = setting(None, "folder for the samples, generated.npz and control.npz, to measure again")
    num_images: int | None = setting(
        None, "images to sample, or to choose at random from those given; none: all given images", at_least=3
    )
    protocol: protocols.ProtocolName = setting(
        "own", "published protocol of FID-50K: it fixes reference, network, labels and number of images"
    )
    labels: LabelRule | None = setting(None, "classes of sampled images; none: random, or as the protocol says")
    batch_size: int = setting(32, "images sampled at once", at_least=1)

    def __post_init__(self) -> None:
        samples = self.samples
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        unused = [] if samples else [name for name in changed if name in SAMPLING]
        # one that is not there is named later, as such
        if unused and all(Path(source).exists() for source in (self.images, self.control) if source is not None):
            raise ValueError(
                f"{', '.join(unused)}: settings of sampling, but neither images {self.images} nor control "
                f"{self.control} is a pipeline: leave them out"
            )
        if self.protocol != protocols.OWN:
            protocols.follow_protocol(self)
        self.labels = (self.labels or "random") if samples else None
        super().__post_init__()
        check_output(self.output, evaluation="generation")
        if self.nearest_neighbours is not None:
            check_output(self.nearest_neighbours, ".png", "nearest_neighbours")
        if self.autoencoder is not None and not self.finds_copies:
            raise ValueError("autoencoder is for nearest_neighbours and metrics memorisation: expected one of them")
        if self.control == UNTRAINED and not is_pipeline(self.images):
            raise ValueError(
                f"control {UNTRAINED} resets the network of a pipeline, but images {self.images} is no pipeline"
            )
        if self.save_images is not None and not samples:
            raise ValueError(
                f"save_images keeps what is sampled: neither {self.images} nor {self.control} is a pipeline"
            )
        for name in () if self.save_images is None else MEASURED:
            file = Path(self.save_images) / f"{name}.npz"
            check_output(str(file), ".npz", "save_images")
            if file.exists():
                raise ValueError(f"save_images: {file} is there already, expected a folder without it")
        for source in (self.images, self.control):
            if source is not None and is_pipeline(source) and self.num_images is None:
                raise ValueError(f"{source} is a pipeline: num_images must say how many images to sample")

    @property
    def samples(self) -> bool:
        """Whether images are sampled; otherwise all are given."""
        return any(is_pipeline(source) for source in (self.images, self.control or ""))

    @property
    def finds_copies(self) -> bool:
        """Whether images are compared with single training images."""
        return self.nearest_neighbours is not None or self.memorisation

    @property
    def networks(self) -> list[str]:
        """The networks that images pass through, including the one that finds near-duplicates."""
        return list(dict.fromkeys(self.feature_network + [NEIGHBOUR_NETWORK] * (self.nearest_neighbours is not None)))


def is_pipeline(source: str) -> bool:
    return (Path(source) / "model_index.json").is_file()


def open_images(source: str) -> ImageSource:
    path = Path(source)
    if path.is_dir():
        return FolderImages(path)
    if path.suffix == ".npz" and path.is_file():
        return NpzImages(path)
    raise ValueError(f"{source} is neither a folder of images, nor an npz file, nor a folder of a pipeline")


def load_pipeline(config: GenerationConfig, folder: str, reset: bool = False) -> "DiffusionPipeline":
    """The pipeline of a folder; `reset`: with random weights."""
    pipe = open_pipeline(folder, config, config.device)
    if pipe.vae is None:
        raise ValueError(f"{folder} has no autoencoder: it makes latents, and images are compared here")
    if reset:
        reset_networks(pipe, config.seed)
    return pipe


def open_wanted(config: GenerationConfig, source: str) -> "ImageSource | DiffusionPipeline":
    if source == UNTRAINED:
        return load_pipeline(config, config.images, reset=True)
    return load_pipeline(config, source) if is_pipeline(source) else open_images(source)


def sampled(
    config: GenerationConfig, pipe: "DiffusionPipeline", reference: DatasetImages | None, base: list[int]
) -> PipelineImages:
    """The images that a pipeline will sample. `base`: indices of the reference's images without variants."""
    from vtp_diffusion.generation.fast_sampling import prepare_sampling

    num_classes, theirs = pipe.transformer.config.num_classes, None
    if reference is not None and config.labels == "reference":
        theirs = labels_by_name(pipe, [reference.labels[k] for k in base], reference.dataset.label_names)
    labels = draw_labels(config.labels, config.num_images, num_classes, config.seed, theirs)
    images = PipelineImages(
        pipe,
        labels,
        config.seed,
        config.batch_size,
        **config.sampler,
        **protocols.rounding_of(config.protocol),
    )
    images.settings |= {"labels": config.labels} | config.precision | sampling_cost(pipe, **config.sampler)
    speed = prepare_sampling(pipe, config)
    if this_process()[0] == 0:
        print(speed)
    return images


Sources = dict[str, tuple[ImageSource, list[int]]]


def _fingerprint(source: tuple | None) -> str | None:
    return source[0].dataset.fingerprint if source and isinstance(source[0], DatasetImages) else None


def collect_images(config: GenerationConfig) -> Sources:
    """Name -> images and the indices of those to measure, in the order in which they are to be read.

    Everything is opened and checked before a pipeline samples the first image.
    """
    wanted = {"generated": config.images} | ({"control": config.control} if config.control is not None else {})
    opened = {name: open_wanted(config, source) for name, source in wanted.items()}
    sizes = {
        name: source.size if hasattr(source, "size") else pipeline_image_size(source)
        for name, source in opened.items()
    }
    for name, source in opened.items():
        if config.protocol != protocols.OWN and getattr(source, "settings", None) is not None:
            protocols.check_samples(name, source.settings, config.protocol)
    size = sizes["generated"]
    if sizes.get("control", size) != size:
        raise ValueError(f"control images are {sizes['control']}, the generated ones are {size}")
    real: Sources = {}
    if config.floor_images is not None:
        floor = open_reference(config.data, config.floor_images, "validation", size)
        if floor is None:
            raise ValueError(f"floor_images {config.floor_images} holds statistics, expected images")
        real["floor"] = floor[0], floor[1]
    labelled, base = None, []
    reference = open_reference(config.data, config.reference, "train", size)
    if reference is not None:
        source, base, variants = reference
        real["reference"] = source, base
        if variants and config.finds_copies:
            real["variants"] = source, variants
        labelled = source if isinstance(source, DatasetImages) else None
    elif config.nearest_neighbours is not None or config.floor_images is not None:
        raise ValueError(f"{config.reference} holds statistics only: neighbours and floors need images")
    if "floor" in real and _fingerprint(real["floor"]) == _fingerprint(real.get("reference")) is not None:
        raise ValueError(
            f"floor_images {config.floor_images} and reference {config.reference} are the same images: expected "
            "images outside of the reference"
        )
    sources: Sources = {}
    for name, source in opened.items():
        if not hasattr(source, "size"):  # a pipeline, whose images are still to be made
            source = sampled(config, source, labelled, base)
        found = f"the {name} images are {len(source)}"
        sources[name] = source, chosen_images(config.num_images, len(source), config.seed, found)
    for name, (_, kept) in (sources | real).items():
        least = 3 if name in MEASURED else 2  # a jackknife leaves one out, and a covariance is of 2
        if name != "variants" and len(kept) < least:
            raise ValueError(f"the {name} images are {len(kept)}, expected at least {least}")
    if config.finds_copies:
        vae = open_decoder(config.autoencoder, opened["generated"], config.device)
        real |= decoded_sources(real, vae, config.seed)
    made = {name: entry for name, entry in sources.items() if isinstance(entry[0], PipelineImages)}
    given = {name: entry for name, entry in sources.items() if name not in made}
    return given | real | made  # sampling comes last, so that faulty files are found before it


def record_all(
    config: GenerationConfig, sources: Sources, extractors: dict[str, Extractor], wait: Callable[[], None]
) -> tuple[dict[str, ImageRecord], dict[str, ImageSpool]]:
    """Name -> record of every set of images, name -> samples for `save_images`. `wait`: waits for all processes."""
    records, spools, neighbours = {}, {}, NEIGHBOUR_NETWORK if config.nearest_neighbours is not None else None
    with contextlib.ExitStack() as interrupted:
        for name, (source, kept) in sources.items():
            spool = None
            if config.save_images is not None and isinstance(source, PipelineImages):
                spools[name] = spool = ImageSpool(Path(config.save_images) / f"{name}.npz", len(kept), source.size)
                interrupted.callback(spool.file.unlink, missing_ok=True)  # as large as all samples, and of no use
                if this_process()[0] == 0:
                    spool.create()
                wait()
            wanted = wanted_of(config, name, extractors, neighbours)
            distinct = name in MEASURED and not config.allow_duplicates and not isinstance(source, PipelineImages)
            records[name] = record_source(config, name, source, kept, extractors, wanted, spool, distinct)
            if name == "reference":
                check_statistics(config, records[name])
                if "floor" in records:
                    check_floor(records)
        interrupted.pop_all()
    return records, spools


def describe_images(config: GenerationConfig, sources: Sources, records: dict[str, ImageRecord]) -> dict:
    """For result files: how many images, their hashes, the settings that made them, the rules that chose them."""
    made = {name: source.settings for name, (source, _) in sources.items() if name in MEASURED and source.settings}
    files = {"images": config.images, "control": config.control, "reference": config.reference}
    files |= {"floor_images": config.floor_images}
    files |= {f"reference of {n}": f for n, f in config.statistics_files.items() if f != config.reference}
    reference = sources.get("reference")
    real, base = (None, None) if reference is None else (reference[0], len(reference[1]))
    counts = {name: len(kept) for name, (_, kept) in sources.items() if name != "variants"}
    counts |= {"reference": None if real is None else len(real), "reference_without_variants": base}
    protocol = {"name": config.protocol}
    if config.protocol != protocols.OWN:
        protocol = protocols.describe_protocol(config.protocol, made.get("generated"))
    return {
        "protocol": protocol,
        "image_size": list(sources["generated"][0].size),
        "counts": counts,
        "labels_rule": {name: made.get(name, {}).get("labels", "unknown") for name in records if name in MEASURED},
        "split_rule": split_rule(config, real),
        "subset_rule": {n: subset_rule(k, len(s), config.seed) for n, (s, k) in sources.items() if n in MEASURED},
        "duplicates": {name: found.duplicates for name, found in records.items()},
        "images_sha256": {name: found.sha256 for name, found in records.items()},
        "shared_images": shared_images(records),
        "files_sha256": {
            key: file_sha256(path) for key, path in files.items() if path is not None and path.endswith(".npz")
        },
        "converted": {n: s.converted for n, (s, _) in sources.items() if isinstance(s, FolderImages) and s.converted},
        "sampling": {name: {k: v for k, v in s.items() if k != "label_ids"} for name, s in made.items()},
        "fingerprints": {n: s.dataset.fingerprint for n, (s, _) in sources.items() if isinstance(s, DatasetImages)},
    }


def evaluate(config: GenerationConfig, wait: Callable[[], None]) -> None:
    if config.reference.endswith(".npz") and not Path(config.reference).is_file():
        raise ValueError(f"reference {config.reference} is not there")
    extractors = open_networks(config, config.networks)
    statistics = reference_statistics(config, extractors, config.protocol) if config.statistics_files else {}
    sources = collect_images(config)
    if config.has_fdr6 or config.memorisation:
        check_sizes(config, {name: len(kept) for name, (_, kept) in sources.items()}, extractors)
    records, spools = record_all(config, sources, extractors, wait)
    faults = image_faults({name: source for name, source in sources.items() if name != "variants"})
    if this_process()[0] > 0:
        return
    unused = () if config.samples else SAMPLING
    results = {"settings": {name: value for name, value in settings_of(config).items() if name not in unused}}
    results |= describe_images(config, sources, records) | faults
    results |= {"networks": [extractor.network.describe() for extractor in extractors.values()]}
    results |= {"distances": [], "kernel_distances": [], "scores": [], "not_measured": []}
    for network in config.feature_network:
        for name in MEASURED:
            if name not in records:
                continue
            arguments = (extractors[network].network, name, records, statistics.get(network, {}), config.seed)
            measured = Measurement(*arguments, statistics_device(extractors[network])).run()
            if "mind" in config.metrics:
                measured.measure_mind()
            cost = {key: value for key, value in results["sampling"].get(name, {}).items() if key in COST}
            for row in measured.distances + measured.kernel_distances:
                row |= cost
            results["distances"] += measured.distances
            results["kernel_distances"] += measured.kernel_distances
            results["scores"] += measured.scores
            missing = [{"what": what, "why": why} for what, why in measured.not_measured.items()]
            results["not_measured"] += [row | {"images": name, "network": network} for row in missing]
    if config.has_fdr6:
        results["fdr6"] = measure_fdr6(config, results["distances"], records, statistics, extractors)
    if config.memorisation:
        results["memorisation"] = measure_memorisation(config, records, extractors)
    if config.nearest_neighbours is not None:
        results["near_duplicates"], picture = count_near_duplicates(config, sources, records, extractors)
        write_picture(Path(config.nearest_neighbours), picture)
    write_results(config.output, "generation", config, results)
    print_results(results)
    for name, spool in spools.items():  # last: a second copy on a full disk must not cost the results
        spool.pack(settings=np.array(json.dumps(sources[name][0].settings)))
    for spool in spools.values():  # together: the same command is refused where one is there
        spool.publish()
    print_end_of_evaluation(config.output, config.nearest_neighbours, config.save_images)


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    asks = bool({"-h", "--help"} & set(words))  # `compare` and `reach` have the help of the program itself
    if words[:1] == ["compare"] and not asks:
        print("\n".join(compare_files(words[1:])))
        return
    if words[:1] == ["reach"] and not asks:
        print(reach_line(words[1:]))
        return
    makes_reference = words[:1] == ["reference"]
    if words and not makes_reference and not asks and not words[0].startswith("-"):
        raise unknown_word(words[0], "no part of this program, nor an option", SUBCOMMANDS)
    kind = ReferenceConfig if makes_reference else GenerationConfig
    config = parse_config(kind, words[1:] if makes_reference else words, __doc__)
    accelerator = join_processes() if this_process()[1] > 1 else None
    if accelerator is not None:
        config = replace(config, device=str(accelerator.device))
    if makes_reference:
        make_reference(config)
    else:
        evaluate(config, (lambda: None) if accelerator is None else accelerator.wait_for_everyone)
    if accelerator is not None:
        accelerator.end_training()


if __name__ == "__main__":
    run(main)
