"""The five networks of FDr6 besides Inception: timm's, with the features that FD-loss uses (arXiv:2604.28190).

| name | weights in timm | input | features |
|---|---|---|---|
| `convnextv2_b` | convnextv2_base.fcmae_ft_in22k_in1k | 224 | last map averaged over positions, 1024 |
| `dinov2_l` | vit_large_patch14_dinov2.lvd142m | 256 | class token, 1024 |
| `mae_l` | vit_large_patch16_224.mae | 224 | class token, 1024 |
| `siglip2_so400m` | vit_so400m_patch16_siglip_256.v2_webli | 224 | attention pooling (it has no class token), 1152 |
| `clip_l` | vit_large_patch14_clip_224.openai | 256 | class token before the projection, 1024 |

Tokens are those after the last norm; ConvNeXt's map is the one before the norm of its head. Images are resized with
bicubic antialiasing. 256 pixels are 19 x 19 patches of 14, the last ones filled up with zeros, and timm resamples
position embeddings to that. Definitions follow the repository Jiawei-Yang/FD-Loss, which computes in bfloat16.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from ..runtime.optional_packages import require
from ..runtime.tensor_files import read_safetensors, read_torch
from .features import FeatureNetwork

TIMM_FILE = "model.safetensors"  # what timm's repositories on the Hub call their weights


@dataclass(frozen=True)
class TimmNetwork:
    """A network of timm and how its images are resized.

    Attributes:
        weights: timm's name of architecture and weights.
        label: the network's name in names of distances, "FD-LABEL".
        side: side of the input in pixels.
        architecture: arguments that change timm's architecture; tests make it small.
    """

    weights: str
    label: str
    side: int
    architecture: dict = field(default_factory=dict)


TIMM_NETWORKS = {
    "convnextv2_b": TimmNetwork("convnextv2_base.fcmae_ft_in22k_in1k", "ConvNeXtV2-B", 224),
    "dinov2_l": TimmNetwork("vit_large_patch14_dinov2.lvd142m", "DINOv2-L", 256),
    "mae_l": TimmNetwork("vit_large_patch16_224.mae", "MAE-L", 224),
    "siglip2_so400m": TimmNetwork("vit_so400m_patch16_siglip_256.v2_webli", "SigLIP2-So400M", 224),
    "clip_l": TimmNetwork("vit_large_patch14_clip_224.openai", "CLIP-L", 256),
}


def timm_model(name: str) -> nn.Module:
    """A network of the table without its classifier, with random weights."""
    timm, network = require("timm", extra="eval"), TIMM_NETWORKS[name]
    options = dict(network.architecture)
    if network.weights.startswith("vit"):
        options |= {"dynamic_img_size": True, "dynamic_img_pad": True}
    return timm.create_model(network.weights, pretrained=False, num_classes=0, **options)


def _load(name: str, file: Path) -> nn.Module:
    """The network with the weights of a file, strictly; timm renames those of older checkpoints."""
    model = timm_model(name)
    state = read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
    rename = sys.modules[type(model).__module__].checkpoint_filter_fn
    classifier = f"{model.pretrained_cfg['classifier']}."
    try:
        # timm would resample position embeddings of another input size, and so take another network's weights
        if "pos_embed" in state and state["pos_embed"].shape != model.pos_embed.shape:
            raise ValueError(f"pos_embed {tuple(state['pos_embed'].shape)}, not {tuple(model.pos_embed.shape)}")
        renamed = {key: value for key, value in rename(state, model).items() if not key.startswith(classifier)}
        model.load_state_dict(renamed, strict=True)
    except (RuntimeError, ValueError, LookupError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file} does not hold {name} (timm's {TIMM_NETWORKS[name].weights}): {reason}") from error
    return model


class TimmFeatures(FeatureNetwork):
    """Features of one of `TIMM_NETWORKS`.

    Args:
        name: its key there.
        model: made by `timm_model`.
        file: where its weights came from; None if they are random.
    """

    def __init__(self, name: str, model: nn.Module, file: Path | None = None):
        super().__init__()
        network = TIMM_NETWORKS[name]
        self.name, self.distance_name, self.side = name, f"FD-{network.label}", network.side
        self.model, self.file, self.dim = model, file, model.num_features
        mean, deviation = (model.pretrained_cfg[key] for key in ("mean", "std"))
        self.resize_rule = f"bicubic, antialiased, to {self.side}x{self.side}, float32, not rounded"
        self.preprocessing = f"{self.resize_rule}; (x / 255 - {mean}) / {deviation}; {_pooling(model)}"
        for key, values in (("mean", mean), ("deviation", deviation)):
            self.register_buffer(key, torch.tensor(values)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def resized(self, images: torch.Tensor) -> torch.Tensor:
        images = images.float()
        if images.shape[2:] == (self.side, self.side):
            return images
        return functional.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True)

    def forward(self, resized: torch.Tensor) -> torch.Tensor:
        tokens = self.model.forward_features((resized / 255 - self.mean) / self.deviation)
        if tokens.ndim == 4:
            return tokens.float().mean((2, 3))  # (B, D) of a map (B, D, h, w)
        return self.model.pool(tokens) if self.model.attn_pool is not None else tokens[:, 0]  # of (B, N, D)


def _pooling(model: nn.Module) -> str:
    if not hasattr(model, "attn_pool"):
        return "mean over positions"
    return "class token" if model.attn_pool is None else "attention pooling"


def open_timm(name: str, source: str | Path | None) -> TimmFeatures:
    """A network of the table from its file; None = from the cache of the Hugging Face Hub.

    Raises:
        ValueError: no file there, or one of another network; no weights in the cache (says where they belong).
    """
    file = _cached_weights(name) if source is None else Path(source)
    if not file.is_file():
        raise ValueError(f"weights of {name}: {file} is not a file")
    return TimmFeatures(name, _load(name, file), file)


def _cached_weights(name: str) -> Path:
    hub, repository = require("huggingface_hub", extra="eval"), f"timm/{TIMM_NETWORKS[name].weights}"
    try:
        return Path(hub.hf_hub_download(repository, TIMM_FILE, local_files_only=True))
    except hub.errors.LocalEntryNotFoundError as error:
        raise ValueError(
            f"the weights of {name} are not in {hub.constants.HF_HUB_CACHE}: fill it with `hf download {repository} "
            f"{TIMM_FILE}`, or name that file of https://huggingface.co/{repository} (--weights {name}=FILE)"
        ) from error
