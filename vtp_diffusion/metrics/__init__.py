"""What evaluation measures: feature networks, Fréchet distances with their floor, near-duplicates, PSNR."""

from .extraction import (
    FEATURE_NETWORKS,
    Extractor,
    exact_float32,
    extract_features,
    feature_network,
    network_name,
    weight_files,
)
from .inception import InceptionFeatures
from .neighbours import near_duplicate_threshold, nearest_neighbours, neighbour_grid, shifted_or_flipped
from .networks import FeatureNetwork
from .pixels import psnr
from .scores import density_coverage, inception_score, kernel_distance, precision_recall
from .statistics import (
    Floor,
    GaussianStatistics,
    floor_of_halves,
    floor_of_images,
    frechet_distance,
    jackknife_deviation,
)
from .weights import export_trunk, file_sha256

__all__ = [
    "Extractor",
    "FEATURE_NETWORKS",
    "FeatureNetwork",
    "Floor",
    "GaussianStatistics",
    "InceptionFeatures",
    "density_coverage",
    "exact_float32",
    "export_trunk",
    "extract_features",
    "feature_network",
    "file_sha256",
    "floor_of_halves",
    "floor_of_images",
    "frechet_distance",
    "inception_score",
    "jackknife_deviation",
    "kernel_distance",
    "near_duplicate_threshold",
    "nearest_neighbours",
    "neighbour_grid",
    "network_name",
    "precision_recall",
    "psnr",
    "shifted_or_flipped",
    "weight_files",
]
