"""The Inception network of 2015-12-05, whose features define FID, sFID and the Inception score.

The definition and the loading of the weights are torch-fidelity's (`FeatureExtractorInceptionV3`). This file reads all
three outputs from one forward pass, adds sFID's features, which torch-fidelity lacks, and folds the batch norms.
"""

import io
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..runtime.disk import file_sha256
from ..runtime.optional_packages import require
from .features import FeatureNetwork

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256_PREFIX = "6726825d"
SIDE = 299
BLOCKS = (
    "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2",
    "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a",
    "Mixed_7b", "Mixed_7c",
)  # fmt: skip
SPATIAL_CHANNELS = 7  # Nash et al., arXiv:2103.03841: as many as give about 2048 features


def resize_like_tensorflow1(images: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Bilinear resize as TensorFlow 1 does it: no antialiasing, and output pixel i lies at input i·size/side, so that
    the picture moves by a fraction of a pixel. Bit for bit what torch-fidelity computes with twice the work.

    Args: `images`: float (B, C, H, W).
    Returns: (B, C, side, side).
    """
    for axis in (3, 2):
        size = images.shape[axis]
        place = torch.arange(side, device=images.device, dtype=torch.float32) * torch.tensor(
            size / side, dtype=torch.float32, device=images.device
        )
        low = place.long()
        fraction = place - low.float()
        high = (low + 1).clamp_max(size - 1)
        first, second = images.index_select(axis, low), images.index_select(axis, high)
        images = first + (second - first) * (fraction if axis == 3 else fraction[:, None])
    return images


def flatten_spatial(activation: torch.Tensor) -> torch.Tensor:
    """sFID's features (B, 2023) of the activation of `mixed_6/conv` (B, 192, 17, 17).

    The first 7 channels, flattened as TensorFlow stores them: height, width, channel. Reference statistics are in this
    order. In another order distances between two sets of images would be right, but those to a file wrong.
    """
    return activation[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


class InceptionFeatures(FeatureNetwork):
    """torch-fidelity's Inception with three outputs of one forward pass: pool_3 (2048 features, those of the FID), the
    spatial features of sFID (2023) and the 1008 logits without bias of the Inception score.

    Args: `file`: its state dict. `feature_network` checks the hash, this class doesn't: tests use random weights.
    """

    name, distance_name, dim = "inception", "FID", 2048
    preprocessing = "bilinear as TensorFlow 1 resizes, to 299x299; (x - 128) / 128 (torch-fidelity)"

    def __init__(self, file: str | Path):
        super().__init__()
        module = require("torch_fidelity.feature_extractor_inceptionv3", extra="eval")
        self.file = Path(file)
        try:
            self.model = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file)
            )
        except RuntimeError as error:
            raise ValueError(f"{file} does not hold torch-fidelity's Inception network: {error}") from error
        for block in self.model.modules():
            if isinstance(block, module.BasicConv2d):
                _fold_batch_norm(block)
        self.requires_grad_(False).eval()
        self._spatial: torch.Tensor | None = None
        self.model.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    @property
    def output_dims(self) -> dict[str, int]:
        return {"features": self.dim, "spatial": SPATIAL_CHANNELS * 17 * 17, "logits": 1008}

    def _keep_spatial(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self._spatial = output

    def outputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = (resize_like_tensorflow1(images.float()) - 128) / 128
        hidden = hidden.contiguous(memory_format=self.memory_format)
        for name in BLOCKS:
            hidden = getattr(self.model, name)(hidden)
        spatial, self._spatial = self._spatial, None
        features = hidden.float().mean((2, 3))  # (B, 2048)
        with torch.autocast(features.device.type, enabled=False):
            logits = features @ self.model.fc.weight.T  # (B, 1008)
        return {"features": features, "spatial": flatten_spatial(spatial).float(), "logits": logits}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.outputs(images)["features"]


def _fold_batch_norm(block: nn.Module) -> None:
    """Fold a batch norm into the convolution before it, in float64: that saves a third of the memory traffic."""
    conv, norm = block.conv, block.bn
    weight, bias = fuse_conv_bn_weights(
        conv.weight.double(), None, norm.running_mean.double(), norm.running_var.double(), norm.eps,
        norm.weight.double(), norm.bias.double(),
    )  # fmt: skip
    conv.weight, conv.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())
    block.bn = nn.Identity()


def open_inception(source: str | Path | None) -> InceptionFeatures:
    """Inception from its file; None = the place where torch-fidelity stores its own download.

    Raises: ValueError: no file there (says where it belongs), or one with another SHA-256: that would give no FID.
    """
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


def save_random_inception(path: str | Path, seed: int) -> Path:
    """A file of random Inception weights, for tests and benchmarks: what is computed with them is no FID.

    Variances are kept from layer to layer and batch norms are not the identity, so that features differ from image to
    image and no part of the network is without effect.
    """
    module = require("torch_fidelity.feature_extractor_inceptionv3", extra="eval")

    class Unloaded(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            """Called by the constructor with the empty file; the random weights stay."""

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    model = Unloaded("random", ["2048"], feature_extractor_weights_path=empty)
    generator = torch.Generator().manual_seed(seed)
    for block in model.modules():
        if isinstance(block, module.BasicConv2d):
            nn.init.kaiming_normal_(block.conv.weight, generator=generator)
            block.bn.running_mean.normal_(0, 0.1, generator=generator)
            block.bn.running_var.uniform_(0.7, 1.4, generator=generator)
            block.bn.weight.uniform_(0.9, 1.3, generator=generator)
            block.bn.bias.normal_(0, 0.2, generator=generator)
    nn.init.normal_(model.fc.weight, std=0.2, generator=generator)
    torch.save(model.state_dict(), path)
    return Path(path)
