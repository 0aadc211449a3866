"""What evaluation measures: feature networks, Fréchet distances with their floor, near-duplicates, PSNR."""

from .neighbours import near_duplicate_threshold, nearest_neighbours, neighbour_grid, shifted_or_flipped
from .networks import FEATURE_NETWORKS, FeatureNetwork, extract_features, feature_network, weight_files
from .pixels import psnr
from .statistics import Floor, GaussianStatistics, floor_of_halves, floor_of_images, frechet_distance
from .weights import export_trunk, file_sha256

__all__ = [
    "FEATURE_NETWORKS",
    "FeatureNetwork",
    "Floor",
    "GaussianStatistics",
    "export_trunk",
    "extract_features",
    "feature_network",
    "file_sha256",
    "floor_of_halves",
    "floor_of_images",
    "frechet_distance",
    "near_duplicate_threshold",
    "nearest_neighbours",
    "neighbour_grid",
    "psnr",
    "shifted_or_flipped",
    "weight_files",
]
