"""Feature networks as metrics see them: their interface, and running one on a device."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ..runtime.disk import file_sha256
from ..runtime.reproducibility import exact_float32

FeatureMode = Literal["exact", "fast"]


class FeatureNetwork(nn.Module):
    """A frozen network that turns uint8 images (B, 3, H, W) into float32 features (B, D).

    Attributes:
        name: the one that `feature_network` accepts.
        distance_name: what a Fréchet distance of its features is called. Only Inception's is an FID.
        dim: number of features D.
        output_dims: width of each entry of `outputs`, "features" included.
        preprocessing: what happens to the pixels first, in words.
        file: where the weights came from.
        resize_rule: what `resized` does, in words; networks with the same rule share one resized batch. None: the
            network resizes by itself.
        memory_format: layout of activations, which an `Extractor` chooses.
    """

    memory_format = torch.channels_last
    name: str
    distance_name: str
    dim: int
    preprocessing: str
    file: Path
    resize_rule: str | None = None

    def resized(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, side, side) at the network's input size, if it has a resize_rule."""
        return images

    @property
    def output_dims(self) -> dict[str, int]:
        return {"features": self.dim}

    def outputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """All that metrics read from one forward pass, name -> float32 (B, D_name)."""
        return {"features": self(images)}

    @property
    def kernel_distance_name(self) -> str:
        """What a kernel distance of its features is called: KID for the FID's network, else KD."""
        return "KID" if self.distance_name == "FID" else self.distance_name.replace("FD", "KD", 1)

    def score_name(self, score: str) -> str:
        """A score's name in results: as it is on Inception's features, followed by the network on any other."""
        return score if self.name == "inception" else f"{score} ({self.distance_name.removeprefix('FD-')})"

    def weights_sha256(self) -> str:
        """SHA-256 of the file of the weights."""
        return file_sha256(self.file)

    def describe(self) -> dict:
        """What decides the numbers, for result files."""
        return {
            "name": self.name,
            "distance": self.distance_name,
            "features": self.dim,
            "preprocessing": self.preprocessing,
            "file": self.file.name,
            "sha256": self.weights_sha256(),
        }


# As fast as all ten with VGG16, 6 % slower with Inception, but 1 and .6 seconds a shape instead of 13 and 6 (H200).
TIMED_ALGORITHMS = 3


class Extractor:
    """A feature network ready to run on a device.

    Args:
        network: is moved to the device, and its weights to the memory layout that is fastest there.
        mode: "exact" computes with the precision of float32; "fast" computes convolutions and products in float16
            (resizing, averages over positions and all statistics stay float32 or better).
            `benchmarks/feature_extraction.py` prints how far that moves an FID. float16 rather than bfloat16, because
            it rounds 8 times finer; features that overflow are refused by the statistics.
        compile: `torch.compile` the network. Smaller batches are then padded, so that it is compiled only once.
        batch_size: the size that batches are padded to. Without compilation a GPU pads a batch to the largest one so
            far instead, since cuDNN spends seconds on timing its algorithms for every new shape.
    Raises: ValueError: an unknown mode; a compiled network without batch_size.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        device: torch.device | str,
        mode: FeatureMode = "exact",
        compile: bool = False,
        batch_size: int | None = None,
    ):
        if mode not in ("exact", "fast"):
            raise ValueError(f"feature mode {mode!r} is unknown; known: exact, fast")
        if compile and batch_size is None:
            raise ValueError("a compiled network needs the batch_size that smaller batches are padded to")
        self.network, self.device, self.mode = network, torch.device(device), mode
        # channels_last is faster, except for cuDNN's convolutions in float32 without TensorFloat-32
        channels_last = mode == "fast" or self.device.type != "cuda"
        network.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        network.to(self.device, memory_format=network.memory_format)
        self._pads = compile or self.device.type == "cuda"
        self._padded_size = batch_size if compile else 0
        # otherwise the compiler would choose the memory layout itself
        options = None if channels_last else {"layout_optimization": False}
        self._compiled = torch.compile(network.outputs, dynamic=False, options=options) if compile else None

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, shared: dict | None = None) -> dict[str, torch.Tensor]:
        """The network's outputs (B, D_name), float32 on its device, for uint8 images (B, 3, H, W) on any device.

        Args: `shared`: cache of this batch, copied to the device and resized. Several networks that see the same
            batch are given the same dictionary.
        """
        count, shared = len(images), {} if shared is None else shared
        if self._pads:
            self._padded_size = max(self._padded_size, count)
        placed = self.device, self._padded_size, self.network.memory_format
        if placed not in shared:
            shared[placed] = self._placed(images)
        if (rule := self.network.resize_rule) is not None and (*placed, rule) not in shared:
            shared[*placed, rule] = self.network.resized(shared[placed])
        images = shared[placed] if rule is None else shared[*placed, rule]
        # always the same memory layout: another one would be compiled again
        images = images.contiguous(memory_format=self.network.memory_format)
        fast = torch.autocast(self.device.type, dtype=torch.float16, enabled=self.mode == "fast")
        outputs = self._compiled or self.network.outputs
        with exact_float32(TIMED_ALGORITHMS), fast:
            return {name: output[:count].float() for name, output in outputs(images).items()}

    def _placed(self, images: torch.Tensor) -> torch.Tensor:
        """The batch on the device, padded."""
        images = images.to(self.device, non_blocking=True)
        if (missing := self._padded_size - len(images)) > 0:
            images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
        return images


def extract_features(
    network: FeatureNetwork, batches: Iterable[torch.Tensor], device: torch.device | str
) -> torch.Tensor:
    """Features (N, D), float32 on the CPU, of uint8 image batches (B, 3, H, W), computed without TensorFloat-32.

    Raises: ValueError: no images.
    """
    extractor = Extractor(network, device)
    features = [extractor(batch)["features"].cpu() for batch in batches]
    if not features:
        raise ValueError("no images were given, expected at least one")
    return torch.cat(features)
