"""What is measured of generated images on one network: every distance with its real-vs-real baseline ("floor") and
spread, and every score."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import torch

from ..metrics.fdr6 import SIX
from ..metrics.features import Extractor, FeatureNetwork
from ..metrics.frechet import (
    JACKKNIFE_GROUPS,
    Floor,
    GaussianStatistics,
    floor_of_halves,
    floor_of_images,
    frechet_distance,
    jackknife_deviation,
)
from ..metrics.mind import PROJECTIONS, SLICED_MINIMUM, sliced_distance
from ..metrics.networks import network_name
from ..metrics.scores import (
    DENSITY_NEIGHBOURS,
    INCEPTION_SPLITS,
    KERNEL_MINIMUM,
    PRECISION_NEIGHBOURS,
    SUBSET_RULE,
    density_coverage,
    inception_score,
    kernel_distance,
    precision_recall,
)
from ..runtime.config import setting
from ..runtime.reproducibility import exact_float32, random_stream
from .one_pass import FeaturesConfig, ImageRecord, Wanted
from .sources import check_real_images

MEASURED = ("generated", "control")
DECODED_FLOOR, DECODED_REFERENCE = "decoded_floor", "decoded_reference"  # see `copies.decoded_sources`
FEATURES_ALONE = ("variants", DECODED_FLOOR, DECODED_REFERENCE)  # sets in which neighbours are looked for, and no more
REFERENCE_IMAGES = 10_000  # whose features are kept for precision, recall and the rest, as in ADM's files
FLOOR_SUBSETS = 10  # of the kernel distance, in each of the floor's repetitions


@dataclass(kw_only=True)
class JudgesConfig(FeaturesConfig):
    """Settings of what is measured beside the distances and scores of every network."""

    floor_images: str | None = setting(None, "real images outside the reference: npz, folder or collection")
    metrics: list[Literal["mind", "memorisation"]] = setting(
        default_factory=list,
        help="further metrics: mind, the sliced Wasserstein distance; memorisation, the share of images nearer to the "
        "reference than floor_images are",
    )
    fdr6_constants: Literal["published", "computed"] = setting(
        "published", "divisors of FDr6: published, or computed as the distances of floor_images to the reference"
    )
    reference_statistics: list[str] = setting(
        default_factory=list,
        help="NETWORK=FILE.npz: statistics of the reference for a network, made by `eval/generation.py reference`",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.floor_images is not None:
            check_real_images(self.floor_images, "floor_images")
        _ = self.statistics_files  # raises ValueError for words that are no NETWORK=FILE
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

    @property
    def statistics_files(self) -> dict[str, str]:
        """Network -> npz of the reference's statistics: from `reference_statistics`, else `reference` if it is an npz.

        Raises: ValueError: a word that is no NETWORK=FILE, or one for a network that is not measured.
        """
        files = dict.fromkeys(self.feature_network, self.reference) if self.reference.endswith(".npz") else {}
        for word in self.reference_statistics:
            name, _, file = word.partition("=")
            if not file or network_name(name) not in self.feature_network:
                known = ", ".join(self.feature_network)
                raise ValueError(f"reference_statistics must be NETWORK=FILE.npz with one of {known}, got {word!r}")
            files[network_name(name)] = file
        return files


def wanted_outputs(network: FeatureNetwork, part: str, all_features: bool = False) -> dict[str, Wanted]:
    """What to record of a set of images on one network: output -> `Wanted`.

    Args:
        part: the set. "generated" or "control": everything; "reference": statistics, and features of 10,000 as in
            ADM's files; "floor": features of 10,000; those of `FEATURES_ALONE`: all features.
        all_features: keep all features of the reference too, to look for neighbours among them.
    """
    if part in FEATURES_ALONE:
        return {"features": Wanted(0, None)}
    groups = {"reference": 1, "floor": 0}.get(part, JACKKNIFE_GROUPS)
    limit = None if part in MEASURED or all_features else REFERENCE_IMAGES
    wanted = {"features": Wanted(groups, limit)}
    if "spatial" in network.output_dims:
        wanted["spatial"] = Wanted(groups, REFERENCE_IMAGES)
    if "logits" in network.output_dims and part in MEASURED:
        wanted["logits"] = Wanted(0, None)
    return wanted


def wanted_of(
    config: JudgesConfig, part: str, extractors: dict[str, Extractor], neighbours: str | None
) -> dict[str, dict[str, Wanted]]:
    """What to record of a set of images: network -> output -> `Wanted`.

    Args: `neighbours`: the network whose features near-duplicates are found with; None: they are not counted.
    """
    all_features = {name for name in extractors if name == neighbours or config.memorisation}
    wanted = {
        name: wanted_outputs(extractor.network, part, all_features=name in all_features)
        for name, extractor in extractors.items()
        if part not in FEATURES_ALONE or name in all_features
    }
    if part == "floor" and config.computes_constants:
        for name in SIX:
            wanted[name]["features"].groups = 1
    return wanted


class Measurement:
    """Measures one set of generated images on one network.

    Args:
        network: whose features the records hold.
        name: "generated" or "control".
        records: of "generated" and "control", and of "reference" and "floor" if there are images of them.
        statistics: of the reference, output -> statistics, if a file holds them; else its record has them.
        seed: decides random parts.
        device: to compute on.
    Attributes: `distances`, `kernel_distances`, `scores`: rows for result files; `not_measured`: metric -> reason.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        name: str,
        records: dict[str, ImageRecord],
        statistics: dict[str, GaussianStatistics],
        seed: int,
        device: torch.device | str,
    ):
        self.network, self.name, self.records, self.seed, self.device = network, name, records, seed, device
        self.file_statistics = statistics
        self.distances: list[dict] = []
        self.kernel_distances: list[dict] = []
        self.scores: list[dict] = []
        self.not_measured: dict[str, str] = {}

    def run(self) -> "Measurement":
        with exact_float32():
            self._frechet("features", self.network.distance_name)
            if "spatial" in self.network.output_dims:
                self._frechet("spatial", "sFID")
            self._inception_score()
            if "reference" in self.records:
                self._kernel_distance()
                self._neighbour_scores()
            else:
                missing = [self.network.kernel_distance_name, "precision", "recall", "density", "coverage", "floors"]
                self.not_measured |= dict.fromkeys(missing, "the reference holds statistics but no images")
        return self

    def _record(self, part: str, output: str):
        return self.records[part].outputs[self.network.name][output]

    def _features(self, part: str, output: str = "features") -> torch.Tensor:
        """Features (N, D) on the device; at most 10,000 of the reference."""
        features = self._record(part, output).features
        if part == "reference" and len(features) > REFERENCE_IMAGES:
            order = torch.from_numpy(random_stream("kept reference", self.seed).permutation(len(features)))
            features = features[order[:REFERENCE_IMAGES]]
        return features.to(self.device)

    def _reference(self, output: str) -> tuple[GaussianStatistics, int | None]:
        """Statistics of the reference, and their number of images (None if they come from a file)."""
        if output in self.file_statistics:
            return self.file_statistics[output], None
        statistics = self._record("reference", output).statistics
        return statistics, statistics.count

    def _floor(self, output: str, minimum: int = 2, **distance) -> Floor | None:
        """The real-vs-real baseline; None if one of its sides would have fewer images than `minimum`."""
        if "reference" not in self.records:
            return None
        features, reference = self._features(self.name, output), self._features("reference", output)
        if "floor" in self.records:
            floor = self._features("floor", output)
            if min(len(features), len(floor)) < minimum:
                return None
            return floor_of_images(features, reference, floor, self.seed, **distance)
        if min(len(features), len(reference) // 2) < minimum:
            return None
        return floor_of_halves(features, reference, self.seed, **distance)

    def _frechet(self, output: str, title: str) -> None:
        record = self._record(self.name, output)
        if self.file_statistics and output not in self.file_statistics:
            self.not_measured[title] = "the reference file holds no statistics of these features"
            return
        reference, num_reference = self._reference(output)
        groups = [group for group in record.groups if group.count]
        prepare = partial(GaussianStatistics.of, device=reference.device)
        value = frechet_distance(reference, record.statistics)
        spread = {"kind": f"jackknife of {len(groups)} random groups", "value": jackknife_deviation(groups, reference)}
        row = self._row(title, value, spread, num_reference, self._floor(output, prepare=prepare))
        self.distances.append(row | {"num_features": len(reference.mean)})

    def _kernel_distance(self) -> None:
        generated, reference = self._features(self.name), self._features("reference")
        title = self.network.kernel_distance_name
        if min(len(generated), len(reference)) < KERNEL_MINIMUM:
            why = f"{len(generated)} and {len(reference)} images, expected at least {KERNEL_MINIMUM}"
            self.not_measured[title] = why
            return
        found = kernel_distance(generated, reference)

        def distance(x: torch.Tensor, y: torch.Tensor) -> float:
            return kernel_distance(y, x, subsets=FLOOR_SUBSETS).value

        spread = f"standard deviation of {found.subsets} subsets of {found.subset_size}"
        floor = self._floor("features", KERNEL_MINIMUM, prepare=lambda features: features, distance=distance)
        row = self._row(title, found.value, {"kind": spread, "value": found.deviation}, len(reference), floor)
        subsets = {"subsets": found.subsets, "subset_size": found.subset_size, "subset_rule": SUBSET_RULE}
        self.kernel_distances.append(row | subsets)

    def measure_mind(self) -> None:
        """Add the sliced Wasserstein distance to the distances, at the number of images of the smaller set."""
        title = self.network.score_name("MIND")
        if "reference" not in self.records:
            self.not_measured[title] = "the reference holds statistics but no images"
            return
        generated, reference = self._features(self.name), self._features("reference")
        if min(len(generated), len(reference)) < SLICED_MINIMUM:
            why = f"{len(generated)} and {len(reference)} images, expected at least {SLICED_MINIMUM}"
            self.not_measured[title] = why
            return

        def distance(real: torch.Tensor, others: torch.Tensor) -> float:
            return sliced_distance(others, real, self.seed, groups=0).value

        with exact_float32():
            found = sliced_distance(generated, reference, self.seed)
            floor = self._floor("features", SLICED_MINIMUM, prepare=lambda features: features, distance=distance)
        if floor is not None:  # of the larger set so many are taken
            floor = replace(floor, sizes=(min(floor.sizes),) * 2)
        spread = {"kind": f"jackknife of {found.groups} random groups of both sets", "value": found.deviation}
        row = self._row(title, found.value, spread, found.num_images, floor)
        self.distances.append(row | {"num_images": found.num_images, "projections": PROJECTIONS})

    def _row(self, title: str, value: float, spread: dict, num_reference: int | None, floor: Floor | None) -> dict:
        return {
            "distance": title,
            "network": self.network.name,
            "images": self.name,
            "value": value,
            "spread": spread,
            "num_images": len(self._record(self.name, "features").kept),
            "num_reference": num_reference,
            "floor": None if floor is None else asdict(floor),
        }

    def _score(self, title: str, value: float, **settings) -> None:
        count = len(self._record(self.name, "features").kept)
        row = {"score": title, "network": self.network.name, "images": self.name, "value": value, "num_images": count}
        self.scores.append(row | settings)

    def _inception_score(self) -> None:
        if "logits" not in self.network.output_dims:
            return
        logits = self._record(self.name, "logits").features.to(self.device)
        if len(logits) < INCEPTION_SPLITS:
            self.not_measured["Inception score"] = f"{len(logits)} images are fewer than its {INCEPTION_SPLITS} splits"
            return
        score = inception_score(logits)
        spread = {"kind": f"standard deviation of {score.splits} splits", "value": score.deviation}
        self._score("Inception score", score.value, spread=spread, **score.settings())

    def _neighbour_scores(self) -> None:
        generated, reference = self._features(self.name), self._features("reference")
        pairs = (
            (("precision", "recall"), precision_recall, PRECISION_NEIGHBOURS),
            (("density", "coverage"), density_coverage, DENSITY_NEIGHBOURS),
        )
        for names, measure, neighbours in pairs:
            if min(len(generated), len(reference)) <= neighbours:
                why = f"{len(generated)} and {len(reference)} images, expected more than {neighbours} neighbours"
                self.not_measured |= dict.fromkeys(names, why)
                continue
            for name, value in zip(names, measure(generated, reference), strict=True):
                title = self.network.score_name(name)
                self._score(title, value, num_reference=len(reference), neighbours=neighbours)
