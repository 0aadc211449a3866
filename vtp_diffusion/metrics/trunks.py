"""The convolutions of VGG16 and AlexNet, read at the five activations that LPIPS compares."""

from pathlib import Path

import torch
from torch import nn

from .network_weights import load_trunk

# (out channels, kernel, stride, padding); a pair is a max pool (kernel, stride). Simonyan and Zisserman,
# arXiv:1409.1556 (configuration D); Krizhevsky, arXiv:1404.5997.
_POOL = {"vgg": (2, 2), "alex": (3, 2)}
_LAYERS = {
    "vgg": [
        *[(64, 3, 1, 1)] * 2,
        _POOL["vgg"],
        *[(128, 3, 1, 1)] * 2,
        _POOL["vgg"],
        *[(256, 3, 1, 1)] * 3,
        _POOL["vgg"],
        *[(512, 3, 1, 1)] * 3,
        _POOL["vgg"],
        *[(512, 3, 1, 1)] * 3,
    ],
    "alex": [
        (64, 11, 4, 2),
        _POOL["alex"],
        (192, 5, 1, 2),
        _POOL["alex"],
        (384, 3, 1, 1),
        (256, 3, 1, 1),
        (256, 3, 1, 1),
    ],
}
# Index of the ReLU after which each of the five activations is read: relu1_2 ... relu5_3 of VGG16, relu1 ... relu5.
_TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}
CHANNELS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
MINIMUM_SIDE = {"vgg": 16, "alex": 32}

# LPIPS' own shift and scale of images in [-1, 1]: ImageNet's mean and standard deviation, rounded.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class ConvolutionalTrunk(nn.Module):
    """VGG16 or AlexNet without its classifier, frozen, weights float32.

    Args:
        network: "vgg" or "alex".

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

        Returns:
            The LPIPS heads, if the source holds them, else an empty dictionary.

        Raises:
            ValueError: the source does not hold exactly this network (and heads); or what `load_trunk` raises.
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
            raise ValueError(
                f"images of shape {tuple(images.shape)} given, expected (B, 3, H, W) with sides of at least {minimum}"
            )
        hidden = (images.to(self.shift.dtype) - self.shift) / self.scale
        activations = []
        for index, layer in enumerate(self.features):
            hidden = layer(hidden)
            if index in self.taps:
                activations.append(hidden)
                if len(activations) > last:
                    break
        return activations
