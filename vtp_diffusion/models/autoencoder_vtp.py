"""VTP, a vision transformer autoencoder whose latents carry meaning ("Towards Scalable Pre-training of Visual
Tokenizers for Generation", arXiv:2512.13687): encoder, linear bottleneck, pixel decoder, latent statistics, features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .strict_loading import StrictLoadingMixin
from .vtp_blocks import ROTARY_DTYPES, VTPDecoder, VTPEncoder, initialise_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class VTPSize:
    """Width, depth and heads of encoder and decoder, with the scores published for the released weights.

    Sources: arXiv:2512.13687v2 for ImageNet rFID, zero-shot and linear-probe accuracy (%); v1 for the gFID-50K of
    LightningDiT-XL after 80 epochs without guidance.
    """

    hidden_size: int
    num_layers: int
    num_attention_heads: int
    rfid: float
    zero_shot: float
    linear_probe: float
    gfid: float

    def architecture(self) -> dict[str, int]:
        """Constructor keywords of `AutoencoderVTP` for this size."""
        parts = {}
        for part in ("encoder", "decoder"):
            parts[f"{part}_hidden_size"] = self.hidden_size
            parts[f"{part}_num_layers"] = self.num_layers
            parts[f"{part}_num_attention_heads"] = self.num_attention_heads
        return parts


VTP_SIZES = {
    #                width depth heads  rFID  zero  probe gFID
    "Small": VTPSize(384, 12, 6, 0.98, 66.7, 77.5, 5.46),
    "Base": VTPSize(768, 12, 12, 0.74, 73.2, 81.0, 3.88),
    "Large": VTPSize(1024, 24, 16, 0.36, 78.2, 85.7, 2.81),
}


@dataclass
class AutoencoderVTPOutput(BaseOutput):
    """Result of `AutoencoderVTP.encode`.

    Attributes:
        latent_dist: deterministic distribution, `sample()` and `mode()` both equal `latent` (as in AutoencoderKL).
        latent: normalised latents (B, C, H/p, W/p) (as in AutoencoderRAE).
    """

    latent_dist: DiagonalGaussianDistribution
    # None by default: accelerate rebuilds outputs from one dict, which diffusers unpacks if the other fields are None.
    latent: torch.Tensor | None = None


@dataclass
class VTPFeatures(BaseOutput):
    """Final-normed encoder features before the bottleneck: `cls_token` (B, D) and `patch_tokens` (B, N, D)."""

    cls_token: torch.Tensor
    patch_tokens: torch.Tensor | None = None


class AutoencoderVTP(StrictLoadingMixin, ModelMixin, AttentionMixin, AutoencoderMixin, ConfigMixin):
    """Deterministic vision-transformer autoencoder (arXiv:2512.13687, section 3).

    Images are (B, in_channels, H, W) in [-1, 1], in and out; latents are (B, latent_channels, H/p, W/p). The ImageNet
    normalisation and the latent statistics are applied inside. New models are initialised with a truncated normal of
    standard deviation 0.02 and zero biases; the paper does not publish its initialisation.

    Args:
        in_channels: image channels; ImageNet statistics exist for 3 only.
        sample_size: side of training images in pixels (for information: any multiple of the patch size is accepted).
        patch_size: side of a patch in pixels.
        latent_channels: width of the bottleneck.
        encoder_hidden_size, encoder_num_layers, encoder_num_attention_heads: the encoder.
        decoder_hidden_size, decoder_num_layers, decoder_num_attention_heads: the pixel decoder.
        encoder_qk_norm, decoder_qk_norm: RMSNorm of queries and keys per head, before the rotation.
        rope_dtype: "bfloat16", as the released weights were trained, or "float32".
        latents_mean, latents_std: one value per latent channel; `encode` returns (z - mean) / std, `decode` undoes it.
        scaling_factor: always 1.0, present because pipelines read it.
        block_out_channels: computed if None; pipelines derive the downsampling 2 ** (length - 1) from it.

    Raises:
        ValueError: for a configuration that cannot be built.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["VTPEmbeddings", "VTPBlock", "VTPDecoderBlock"]
    _repeated_blocks = ["VTPBlock", "VTPDecoderBlock"]
    _skip_layerwise_casting_patterns = ["embeddings", "norm", "bottleneck", "proj_in", "proj_out"]
    _group_offload_block_modules = ["encoder", "bottleneck", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        sample_size: int = 256,
        patch_size: int = 16,
        latent_channels: int = 64,
        encoder_hidden_size: int = 1024,
        encoder_num_layers: int = 24,
        encoder_num_attention_heads: int = 16,
        decoder_hidden_size: int = 1024,
        decoder_num_layers: int = 24,
        decoder_num_attention_heads: int = 16,
        encoder_qk_norm: bool = False,
        decoder_qk_norm: bool = False,
        rope_dtype: str = "bfloat16",
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        scaling_factor: float = 1.0,
        block_out_channels: list[int] | None = None,
    ):
        super().__init__()
        if in_channels != len(IMAGENET_MEAN):
            raise ValueError(f"in_channels={in_channels}: the ImageNet normalisation inside needs 3 channels.")
        if rope_dtype not in ROTARY_DTYPES:
            raise ValueError(f"rope_dtype={rope_dtype!r} is not one of {sorted(ROTARY_DTYPES)}.")
        if scaling_factor != 1.0:
            raise ValueError(f"scaling_factor={scaling_factor}: only 1.0; latents_mean and latents_std set the scale.")
        mean, std = _latent_statistics(latents_mean, latents_std, latent_channels)
        block_out_channels = _block_out_channels(block_out_channels, patch_size, encoder_hidden_size)
        self.register_to_config(latents_mean=mean, latents_std=std, block_out_channels=block_out_channels)

        self.spatial_compression_ratio = patch_size
        self.latent_channels = latent_channels
        self.use_slicing = False

        dtype = ROTARY_DTYPES[rope_dtype]
        encoder = (encoder_hidden_size, encoder_num_layers, encoder_num_attention_heads, encoder_qk_norm, dtype)
        decoder = (decoder_hidden_size, decoder_num_layers, decoder_num_attention_heads, decoder_qk_norm, dtype)
        self.encoder = VTPEncoder(in_channels, patch_size, *encoder)
        self.bottleneck = nn.Linear(encoder_hidden_size, latent_channels, bias=False)
        self.decoder = VTPDecoder(latent_channels, in_channels, patch_size, *decoder)
        self.apply(initialise_weights)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options) -> "AutoencoderVTP":
        """Load a saved model. Raises: ValueError for a released folder, and what diffusers raises."""
        from .conversion_vtp import refuse_released

        refuse_released(pretrained_model_name_or_path, cls.__name__)
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_released(cls, folder_or_hub_id: str, rope_dtype: str | None = None) -> "AutoencoderVTP":
        """Load the autoencoder's part of a released VTP checkpoint (`config.json` + `model.safetensors`), strictly.

        Args:
            folder_or_hub_id: local folder, hub repository id, or a short name such as VTP-Large-f16d64.
            rope_dtype: None keeps "bfloat16", which the released weights were trained with; or "float32".

        Returns:
            The model in eval mode, without latent statistics.

        Raises:
            ValueError: for a file that is missing or truncated, an option that is not supported, or a checkpoint
                whose keys or shapes differ from what its configuration asks for.
        """
        from .conversion import load_strict
        from .conversion_vtp import autoencoder_part, read_released_vtp

        config, state = autoencoder_part(*read_released_vtp(folder_or_hub_id, rope_dtype))
        with torch.device("meta"):
            model = cls(**config)
        return load_strict(model, state, source=str(folder_or_hub_id)).eval()

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderVTPOutput | tuple:
        """Encode images.

        Args:
            x: images (B, 3, H, W) in [-1, 1]; H and W multiples of the patch size.
            return_dict: False gives the tuple `(latent_dist,)`.

        Returns:
            Normalised latents (B, C, H/p, W/p) as `.latent`, and as the deterministic `.latent_dist`.

        Raises:
            ValueError: for a wrong number of channels or sides that are not multiples of the patch size.
        """
        self._check_images(x)
        if self.use_slicing and x.shape[0] > 1:
            latent = torch.cat([self._encode(image) for image in x.split(1)])
        else:
            latent = self._encode(x)
        posterior = DiagonalGaussianDistribution(torch.cat([latent, torch.zeros_like(latent)], 1), deterministic=True)
        if not return_dict:
            return (posterior,)
        return AutoencoderVTPOutput(latent_dist=posterior, latent=latent)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple:
        """Decode normalised latents.

        Args:
            z: latents (B, C, h, w) as `encode` returns them.
            return_dict: False gives the tuple `(sample,)`.
            generator: accepted because pipelines pass it; decoding is deterministic.

        Returns:
            `.sample`, images (B, 3, h·p, w·p) around [-1, 1], not clamped.

        Raises:
            ValueError: for latents that are not (B, C, h, w).
        """
        if z.ndim != 4 or z.shape[1] != self.latent_channels:
            raise ValueError(f"Latents are {tuple(z.shape)}, expected (B, {self.latent_channels}, height, width).")
        if self.use_slicing and z.shape[0] > 1:
            sample = torch.cat([self._decode(latent) for latent in z.split(1)])
        else:
            sample = self._decode(z)
        if not return_dict:
            return (sample,)
        return DecoderOutput(sample=sample)

    @apply_forward_hook
    def encode_features(self, images: torch.Tensor, num_layers: int | None = None) -> VTPFeatures | list[VTPFeatures]:
        """Features before the bottleneck, as used by CLIP, probes and self-supervision.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            num_layers: None for the last layer; n for a list of the last n layers, shallow to deep, each normed by
                the final norm.

        Returns:
            `.cls_token` (B, D) and `.patch_tokens` (B, N, D) with N = H/p · W/p, row by row.

        Raises:
            ValueError: for images that do not fit or a number of layers the encoder does not have.
        """
        self._check_images(images)
        depth = self.config.encoder_num_layers
        if num_layers is not None and not 1 <= num_layers <= depth:
            raise ValueError(f"num_layers={num_layers}, expected 1 to {depth}, the encoder's number of layers.")
        layers = self.encoder(normalize_images(images), num_layers=num_layers or 1)  # (B, 1 + N, D) each
        features = [VTPFeatures(cls_token=tokens[:, 0], patch_tokens=tokens[:, 1:]) for tokens in layers]
        return features[0] if num_layers is None else features

    def enable_tiling(self) -> None:
        """Raises: NotImplementedError: every patch attends to all others, so tiles would not fit together."""
        raise NotImplementedError("AutoencoderVTP has no tiling, its patches attend to all others: use enable_slicing")

    def with_latent_statistics(self, mean: Sequence[float], std: Sequence[float]) -> "AutoencoderVTP":
        """Set the latent statistics, one value per latent channel, and return this model.

        Raises:
            ValueError: for a wrong number of values, or values that are not finite with a positive deviation.
        """
        mean, std = _latent_statistics(mean, std, self.latent_channels)
        self.register_to_config(latents_mean=mean, latents_std=std)
        return self

    def register_to_config(self, **values) -> None:
        """As in diffusers, but also for latent statistics that are set after the model was built."""
        given = {name for name in ("latents_mean", "latents_std") if values.get(name) is not None}
        if given:  # `from_config(model.config)` drops the keys in this list, which had their defaults at first
            known = {**getattr(self, "_internal_dict", {}), **values}
            values["_use_default_values"] = sorted(set(known.get("_use_default_values", ())) - given)
        super().register_to_config(**values)
        self._statistics = {}

    def normalize_latents(self, raw: torch.Tensor) -> torch.Tensor:
        """(raw - mean) / std per channel, (B, C, h, w); the identity without statistics."""
        if self.config.latents_mean is None:
            return raw
        mean, std = self._statistics_on(raw.device)
        return ((raw.float() - mean) / std).to(raw.dtype)

    def denormalize_latents(self, z: torch.Tensor) -> torch.Tensor:
        """z · std + mean per channel, (B, C, h, w): the raw latents; the identity without statistics."""
        if self.config.latents_mean is None:
            return z
        mean, std = self._statistics_on(z.device)
        return (z.float() * std + mean).to(z.dtype)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple:
        """Reconstruct images (B, 3, H, W) in [-1, 1]; sampling the posterior or taking its mode is the same."""
        posterior = self.encode(sample, return_dict=False)[0]
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def encode_tokens(
        self, images: torch.Tensor, masks: torch.Tensor | None = None, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encoder tokens for training objectives: images (B, 3, H, W) in [-1, 1] -> (B, 1 + N, D), class token first.

        Args:
            masks: (B, N) bool, patches whose embedding is replaced by the mask token (masked-image modelling).
            kept: (layers, 2, K) indices of the samples whose residual branches are computed (stochastic depth, see
                `residual_update`).

        Raises:
            ValueError: images, masks or kept samples that do not fit.
        """
        self._check_images(images)
        return self.encoder(normalize_images(images), masks=masks, kept=kept)[0]

    def latents_of(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Tokens (B, 1 + h·w, D) as `encode_tokens` gives them -> normalised latents (B, C, h, w)."""
        return self.normalize_latents(self._raw_latents(tokens, height, width))

    @apply_forward_hook
    def encode_raw(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> raw latents (B, C, H/p, W/p), not normalised by the statistics."""
        height, width = (side // self.spatial_compression_ratio for side in images.shape[-2:])
        return self._raw_latents(self.encode_tokens(images), height, width)

    def _raw_latents(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        latents = self.bottleneck(tokens[:, 1:])  # (B, N, C)
        return latents.transpose(1, 2).unflatten(2, (height, width)).contiguous()

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        height, width = (side // self.spatial_compression_ratio for side in images.shape[-2:])
        return self.latents_of(self.encode_tokens(images), height, width)

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        z = self.denormalize_latents(z).to(self.decoder.proj_in.bias.dtype)  # a pipeline's latents are float32
        return denormalize_images(self.decoder(z))

    def _check_images(self, images: torch.Tensor) -> None:
        channels, patch = self.config.in_channels, self.spatial_compression_ratio
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"Images have shape {tuple(images.shape)}, expected (B, {channels}, height, width).")
        height, width = images.shape[-2:]
        if height % patch or width % patch or not height or not width:
            raise ValueError(f"Images are {height}x{width} (height x width), expected multiples of the patch {patch}.")

    def _statistics_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (1, C, 1, 1), float32. Copied to a device once, since copies synchronise."""
        # Not buffers: non-persistent ones get lost on the meta device, and are rounded together with the weights.
        if device in self._statistics:
            return self._statistics[device]
        with torch.inference_mode(False):  # training may use the cached tensors later
            mean, std = (
                torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
                for values in (self.config.latents_mean, self.config.latents_std)
            )
        if not torch.compiler.is_compiling():
            self._statistics[device] = mean, std
        return mean, std


def normalize_images(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> ImageNet-normalised, (B, 3, H, W), computed in float32."""
    mean, std = _imagenet_statistics(images.device)
    return ((images.float() * 0.5 + 0.5 - mean) / std).to(images.dtype)


def denormalize_images(images: torch.Tensor) -> torch.Tensor:
    """ImageNet-normalised -> [-1, 1], (B, 3, H, W), computed in float32, not clamped."""
    mean, std = _imagenet_statistics(images.device)
    return ((images.float() * std + mean) * 2.0 - 1.0).to(images.dtype)


def _imagenet_statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # Filled on the device: a copy from the host would make every training step wait for the GPU.
    mean, std = (
        torch.stack([torch.full((1, 1), value, device=device) for value in values])  # (3, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return mean, std


def _latent_statistics(mean, std, channels: int) -> tuple[list[float] | None, list[float] | None]:
    """Statistics as lists for a JSON configuration, or (None, None). Raises: ValueError if they do not fit."""
    if (mean is None) != (std is None):
        raise ValueError("latents_mean and latents_std: give both or neither.")
    if mean is None:
        return None, None
    mean, std = ([float(value) for value in values] for values in (mean, std))
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"latents_mean and latents_std have {len(mean)} and {len(std)} values, expected latent_channels={channels}"
        )
    if not all(math.isfinite(m) and math.isfinite(s) and s > 0 for m, s in zip(mean, std, strict=True)):
        raise ValueError("latents_mean must be finite and latents_std finite and positive.")
    return mean, std


def _block_out_channels(given: list[int] | None, patch_size: int, width: int) -> list[int] | None:
    """A list of log2(patch_size) + 1 entries, or None if the patch size is not a power of two."""
    expected = None if patch_size & (patch_size - 1) else [width] * patch_size.bit_length()
    if given is None:
        return expected
    if expected is None or len(given) != len(expected):
        raise ValueError(
            f"block_out_channels={given}: pipelines read 2 ** (length - 1) from it, expected patch_size={patch_size}."
        )
    return list(given)
