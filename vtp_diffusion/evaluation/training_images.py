"""Search among a generator's training images for the one nearest to each generated image."""

import math

import torch
from tqdm.auto import tqdm

from ..data.image_datasets import DataConfig
from ..metrics.features import extract_features
from ..metrics.neighbours import NEIGHBOUR_NETWORK, nearest_neighbours
from ..metrics.networks import feature_network
from .sources import image_batches, open_reference

BATCH = 64


class TrainingImages:
    """The training images of a reference and their features, which are computed once.

    Args:
        reference: npz, folder, openmoji or a `datasets` collection, see `open_reference`.
        size: height and width of the images.
        network: name of a feature network, see `feature_network`.
    Raises: ValueError if the reference has no images of this size.
    """

    def __init__(self, reference: str, size: tuple[int, int], device: str, network: str = NEIGHBOUR_NETWORK):
        opened = open_reference(DataConfig(), reference, "train", size)
        if opened is None:
            raise ValueError(f"reference {reference} holds statistics only, expected images to find neighbours among")
        self.images, self.device, self.network = opened[0], device, feature_network(network)
        count = len(self.images)
        read = tqdm(image_batches(self.images, range(count), BATCH), total=math.ceil(count / BATCH), desc="reference")
        self.features = extract_features(self.network, read, device)

    def nearest(self, images: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
        """The nearest training image of each of uint8 (B, 3, H, W), and their cosine distances."""
        distances, found = nearest_neighbours(extract_features(self.network, [images], self.device), self.features)
        return self.images.read(found.tolist()), distances.tolist()
