"""VTPModel: the autoencoder, the text tower and the CLIP projections, as released checkpoints hold them
(arXiv:2512.13687, section 3; text tower as OpenCLIP's)."""

import math
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from .autoencoder_vtp import AutoencoderVTP
from .strict_loading import StrictLoadingMixin
from .vtp_blocks import VTPAttention, initialise_weights


@dataclass
class VTPOutput(BaseOutput):
    """Scaled cosine similarities: `logits_per_image` (B_image, B_text) and its transpose `logits_per_text`."""

    logits_per_image: torch.Tensor
    logits_per_text: torch.Tensor | None = None  # never None; see `AutoencoderVTPOutput.latent`


class VTPModel(StrictLoadingMixin, ModelMixin, AttentionMixin, ConfigMixin):
    """VTP with both towers: images in [-1, 1] and token ids -> features in one space (arXiv:2512.13687).

    The configuration is flat: the keywords of `AutoencoderVTP`, which build `.autoencoder`, and those of the text
    tower. The defaults of the text tower are those of every released size.

    Args:
        text_hidden_size, text_num_layers, text_num_attention_heads: the text tower.
        text_context_length: number of token ids of every text, padding included.
        text_vocab_size: size of the vocabulary.
        projection_dim: size E of the common space.
        The others: see `AutoencoderVTP`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = [*AutoencoderVTP._no_split_modules, "VTPTextBlock"]
    _repeated_blocks = [*AutoencoderVTP._repeated_blocks, "VTPTextBlock"]
    _skip_layerwise_casting_patterns = [*AutoencoderVTP._skip_layerwise_casting_patterns, "token_embedding"]
    _group_offload_block_modules = [
        *AutoencoderVTP._group_offload_block_modules, "autoencoder", "visual_projection", "text_model",
    ]  # fmt: skip

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
        text_hidden_size: int = 768,
        text_num_layers: int = 12,
        text_num_attention_heads: int = 12,
        text_context_length: int = 77,
        text_vocab_size: int = 49408,
        projection_dim: int = 768,
    ):
        super().__init__()
        if text_hidden_size % text_num_attention_heads:
            raise ValueError(
                f"text_hidden_size={text_hidden_size} is not a multiple of "
                f"text_num_attention_heads={text_num_attention_heads}."
            )
        # the configuration is registered already, by the decorator
        self.autoencoder = AutoencoderVTP(**{name: self.config[name] for name in signature(AutoencoderVTP).parameters})
        self.visual_projection = nn.Linear(encoder_hidden_size, projection_dim, bias=False)
        initialise_weights(self.visual_projection)
        width, depth, heads = text_hidden_size, text_num_layers, text_num_attention_heads
        self.text_model = VTPTextModel(width, depth, heads, text_context_length, text_vocab_size, projection_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options) -> "VTPModel":
        """Load a saved model. Raises: ValueError for a released folder, and what diffusers raises."""
        from .conversion_vtp import refuse_released

        refuse_released(pretrained_model_name_or_path, cls.__name__)
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_released(cls, folder_or_hub_id: str, rope_dtype: str | None = None) -> "VTPModel":
        """Load a released VTP checkpoint (`config.json` + `model.safetensors`), strictly: see
        `AutoencoderVTP.from_released`, which takes a part of it."""
        from .conversion import load_strict
        from .conversion_vtp import read_released_vtp

        config, state = read_released_vtp(folder_or_hub_id, rope_dtype)
        with torch.device("meta"):
            model = cls(**config)
        return load_strict(model, state, source=str(folder_or_hub_id)).eval()

    def save_config(self, *args, **kwargs) -> None:
        """Save the configuration, with the latent statistics that the autoencoder has now: it owns them."""
        owned = ("latents_mean", "latents_std", "block_out_channels")
        # `from_config(model.config)` drops the keys in this list, which had their defaults at first
        defaults = sorted(set(self.config.get("_use_default_values", ())) - set(owned))
        self.register_to_config(**{k: self.autoencoder.config[k] for k in owned}, _use_default_values=defaults)
        super().save_config(*args, **kwargs)

    def get_image_features(self, images: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> features (B, E) of the class token, of length 1 when normalised."""
        features = self.visual_projection(self.autoencoder.encode_features(images).cls_token)
        return F.normalize(features, dim=-1) if normalize else features

    def get_text_features(self, token_ids: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """Token ids (B, context length) -> features (B, E), of length 1 when normalised.

        Raises:
            ValueError: for ids that are not integers (B, context length), and on a CPU for ids outside the vocabulary.
        """
        features = self.text_model(token_ids)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(
        self, images: torch.Tensor, token_ids: torch.Tensor, return_dict: bool = True
    ) -> VTPOutput | tuple[torch.Tensor, torch.Tensor]:
        """Similarity of every image (B_image, 3, H, W) with every text (B_text, context length), times the scale."""
        image_features = self.get_image_features(images)
        text_features = self.get_text_features(token_ids)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.T  # (B_image, B_text)
        if not return_dict:
            return logits_per_image, logits_per_image.T
        return VTPOutput(logits_per_image=logits_per_image, logits_per_text=logits_per_image.T)


class VTPTextModel(nn.Module):
    """OpenCLIP's text transformer: causal, pooled at the end-of-text token, the largest id of a text."""

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        context_length: int,
        vocab_size: int,
        projection_dim: int,
    ):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, hidden_size))
        self.blocks = nn.ModuleList(VTPTextBlock(hidden_size, num_attention_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-5)
        # Stored (width, out), used as x @ text_projection: a square one loads transposed without an error.
        self.text_projection = nn.Parameter(torch.empty(hidden_size, projection_dim))
        self.gradient_checkpointing, self.checkpointed_blocks = False, num_layers  # the first ones
        self.apply(initialise_weights)
        # OpenCLIP's initialisation of these two.
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=hidden_size**-0.5)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, context length) -> features (B, E)."""
        self._check_token_ids(token_ids)
        token_embedding = self.token_embedding(token_ids)  # (B, L, D)
        hidden_states = token_embedding + self.positional_embedding.to(token_embedding.dtype)
        for index, block in enumerate(self.blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing and index < self.checkpointed_blocks:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        hidden_states = self.norm(hidden_states)
        rows = torch.arange(token_ids.shape[0], device=token_ids.device)
        pooled = hidden_states[rows, token_ids.argmax(dim=-1)]  # (B, D)
        return pooled @ self.text_projection

    def _check_token_ids(self, token_ids: torch.Tensor) -> None:
        length, vocab_size = self.positional_embedding.shape[0], self.token_embedding.num_embeddings
        if token_ids.ndim != 2 or token_ids.shape[1] != length:
            raise ValueError(f"Token ids have shape {tuple(token_ids.shape)}, expected (B, {length}).")
        if token_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"Token ids are {token_ids.dtype}, expected int64 or int32.")
        # Reading values would stall a GPU, and break the graph of a compiled model.
        if token_ids.device.type == "cpu" and not torch.compiler.is_compiling() and token_ids.numel():
            low, high = token_ids.min().item(), token_ids.max().item()
            if low < 0 or high >= vocab_size:
                raise ValueError(f"Token ids lie in [{low}, {high}], expected [0, {vocab_size - 1}].")


class VTPTextBlock(nn.Module):
    """Pre-norm block of OpenCLIP's text transformer: causal self-attention, then an MLP with the exact GELU."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-5)
        self.attn = VTPAttention(hidden_size, num_heads, is_causal=True)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-5)
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L, D) -> tokens (B, L, D)."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.fc2(F.gelu(self.fc1(self.norm2(hidden_states))))
