"""LightningDiT: the latent diffusion transformer of "Reconstruction vs. Generation" (Yao et al., arXiv:2501.01423).

DiT (Peebles and Xie, arXiv:2212.09748) with RMSNorm, SwiGLU, rotary position embedding beside the fixed sin-cos one,
and optional QK-norm. It predicts the velocity data - noise; time runs from 0 (noise) to 1 (data).
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .rotary_lightning_dit import lightning_dit_rotary_tables, rotate_interleaved
from .strict_loading import StrictLoadingMixin

# Published sizes (arXiv:2501.01423 and the VTP repository); they fix neither the patch size nor the latent shape.
LIGHTNING_DIT_SIZES = {
    "B": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},  # 130.6 M
    "XL": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},  # 675.3 M
    "1p0B": {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64},  # 1029.5 M
}

MIN_TIME_LEFT = 0.05  # smallest 1 - t by which a prediction of the data is divided to get the velocity


class LightningDiTTransformer2DModel(
    StrictLoadingMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CacheMixin
):
    """Class-conditional velocity network v(x_t, t, label).

    Args:
        sample_size: side of the square latents, in latent pixels.
        patch_size: side of a patch, in latent pixels; must divide `sample_size`.
        in_channels: latent channels.
        num_layers, num_attention_heads, attention_head_dim: the width is heads x head dimension.
        num_classes: number of classes; the label `num_classes` means "no class".
        class_dropout_prob: probability with which `forward` replaces a label by "no class" in training mode.
        qk_norm: RMSNorm on queries and keys of each head, before the rotation.
        prediction: what the output layer predicts, "velocity" or "data"; `forward` returns the velocity in both cases.
        base_head_layer: the block, counted from 1, after which a second output layer makes the weaker prediction of
            internal guidance (RAEv2, arXiv:2605.18324); None: no such layer.
        student: for a few-step student (train_dit/distill.py), what it was trained for: {"steps": numbers of steps,
            "shift": the scheduler's, "guidance": the pipeline's guidance arguments that it imitates, or None}. A
            student takes a second time and predicts the mean velocity between the two times.
    Raises: ValueError if `patch_size` does not divide `sample_size`, the head dimension is not a multiple of 4, or the
    dropout probability is outside [0, 1].
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["LightningDiTBlock"]
    _repeated_blocks = ["LightningDiTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "time_embed", "interval_embed", "class_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        patch_size: int = 1,
        in_channels: int = 64,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        qk_norm: bool = False,
        prediction: str = "velocity",
        base_head_layer: int | None = None,
        student: dict[str, Any] | None = None,
    ):
        super().__init__()
        if prediction not in ("velocity", "data"):
            raise ValueError(f"prediction is {prediction!r}, expected velocity or data")
        if base_head_layer is not None and base_head_layer not in range(1, num_layers):
            raise ValueError(f"base_head_layer is {base_head_layer}, expected a block before the last, {num_layers}")
        if patch_size < 1 or sample_size % patch_size:
            raise ValueError(f"patch_size must divide sample_size, got {patch_size} and {sample_size}")
        if attention_head_dim % 4:
            raise ValueError(f"attention_head_dim must be a multiple of 4 (two rotary axes), got {attention_head_dim}")
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1], got {class_dropout_prob}")
        width = num_attention_heads * attention_head_dim
        grid = sample_size // patch_size
        self.patch_embed = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)
        # Loaded from checkpoints, never recomputed: the released tables have drifted by rounding in the EMA.
        self.register_buffer("pos_embed", sincos_position_embedding(width, grid)[None])  # (1, N, D)
        self.time_embed = LightningDiTTimeEmbedding(width)
        if student is not None:  # zero at first, so that a student starts equal to its teacher
            self.interval_embed = LightningDiTTimeEmbedding(width)
            nn.init.zeros_(self.interval_embed.linear_2.weight)
            nn.init.zeros_(self.interval_embed.linear_2.bias)
        self.class_embed = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(
            [LightningDiTBlock(width, num_attention_heads, attention_head_dim, qk_norm) for _ in range(num_layers)]
        )
        self.norm_out = nn.RMSNorm(width, eps=1e-6)
        self.modulation_out = LightningDiTModulation(width, 2)
        self.proj_out = nn.Linear(width, patch_size**2 * in_channels)
        if base_head_layer is not None:
            self.base_norm_out = nn.RMSNorm(width, eps=1e-6)
            self.base_modulation_out = LightningDiTModulation(width, 2)
            self.base_proj_out = nn.Linear(width, patch_size**2 * in_channels)
        self.gradient_checkpointing = False

    @classmethod
    def from_released(cls, checkpoint: str | Path, **architecture) -> "LightningDiTTransformer2DModel":
        """Load an upstream `.pt` checkpoint `{"model", "ema", "opt", "config"}`, using its EMA weights.

        Args: `checkpoint`: the file; `architecture`: this class's constructor keywords.
        Raises: ValueError if the file is not such a checkpoint, or its weights have missing, extra or mis-shaped keys.
        """
        from .conversion import load_strict
        from .conversion_lightning_dit import convert_lightning_dit_state_dict, read_lightning_dit_checkpoint

        with torch.device("meta"):
            model = cls(**architecture)
        released, source = read_lightning_dit_checkpoint(checkpoint), str(checkpoint)
        state_dict = convert_lightning_dit_state_dict(released, model.config, source)
        return load_strict(model, state_dict, source).eval()

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        return_dict: bool = True,
        return_base: bool = False,
        next_timestep: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor, ...]:
        """Predict the velocity data - noise.

        Args:
            hidden_states: noisy latents x_t (B, C, H, W) with H = W = `sample_size`.
            timestep: t in [0, 1], 0 = noise and 1 = data; (B,) or a scalar.
            class_labels: (B,) integers in [0, num_classes]; `num_classes` is "no class".
            return_base: also return the base head's prediction, from the tokens after block `base_head_layer`.
            next_timestep: for a student, the time r >= t, (B,) or a scalar: the prediction is (x_r - x_t) / (r - t).
                None: r = t.
        Returns: an output with `.sample` (B, C, H, W), or a tuple: the sample and, if asked, the base prediction.
        Raises: ValueError on latents or labels that do not fit, or `next_timestep` without student.
        """
        if return_base and self.config.base_head_layer is None:
            raise ValueError("return_base is True, but this network has no base head (base_head_layer)")
        tokens, conditioning = self.embed(hidden_states, timestep, class_labels, next_timestep)
        grid = self.config.sample_size // self.config.patch_size
        rotary = lightning_dit_rotary_tables(grid, self.config.attention_head_dim, tokens.device)
        more = []
        for number, block in enumerate(self.blocks, start=1):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, conditioning, rotary)
            else:
                tokens = block(tokens, conditioning, rotary)
            if return_base and number == self.config.base_head_layer:
                shift, scale = self.base_modulation_out(conditioning)
                base = self.base_proj_out(modulate(self.base_norm_out(tokens), shift, scale))
                more.append(self.to_velocity(base, hidden_states, timestep))
        shift, scale = self.modulation_out(conditioning)
        output = self.proj_out(modulate(self.norm_out(tokens), shift, scale))  # (B, N, p·p·C)
        sample = self.to_velocity(output, hidden_states, timestep)
        return Transformer2DModelOutput(sample=sample) if return_dict and not more else (sample, *more)

    def to_velocity(self, output: torch.Tensor, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """A head's output (B, N, p·p·C) -> velocity (B, C, H, W). With `prediction` "data" the output is x, and the
        velocity (x - x_t) / max(1 - t, 0.05), in float32 (JiT, arXiv:2511.13720)."""
        sample = self.unpatchify(output)
        if self.config.prediction == "velocity":
            return sample
        t = torch.as_tensor(timestep, device=sample.device).float().expand(len(sample))
        return (sample.float() - hidden_states.float()) / (1 - t).clamp(min=MIN_TIME_LEFT)[:, None, None, None]

    def target_scale(self, timestep: torch.Tensor) -> torch.Tensor:
        """(B,) times -> factor on data - noise, the target of `forward`: 1, or (1 - t) / 0.05 where `to_velocity`
        divides by 0.05 instead of 1 - t."""
        if self.config.prediction == "velocity":
            return torch.ones_like(timestep)
        return ((1 - timestep) / MIN_TIME_LEFT).clamp(max=1)

    def embed(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        next_timestep: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks' inputs, from the arguments of `forward`: tokens (B, N, D), conditioning (B, D)."""
        config = self.config
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if hidden_states.ndim != 4 or tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(
                f"expected latents (B, {', '.join(map(str, expected))}), got {tuple(hidden_states.shape)}"
            )
        batch = hidden_states.shape[0]
        if class_labels.shape != (batch,) or class_labels.is_floating_point():
            raise ValueError(
                f"expected integer class_labels ({batch},), got {class_labels.dtype} {tuple(class_labels.shape)}"
            )
        if self.training and config.class_dropout_prob > 0:
            dropped = torch.rand(batch, device=class_labels.device) < config.class_dropout_prob
            class_labels = torch.where(dropped, config.num_classes, class_labels)
        hidden_states = hidden_states.to(self.pos_embed.dtype)  # a buffer: weights may be stored in 8 bits
        tokens = self.patch_embed(hidden_states).flatten(2).transpose(1, 2)  # (B, N, D)
        tokens = tokens + self.pos_embed  # under autocast this makes the residual stream float32, as published
        timestep = torch.as_tensor(timestep, device=tokens.device).expand(batch)
        conditioning = self.time_embed(timestep, tokens.dtype) + self.class_embed(class_labels)
        if config.student is not None:
            later = timestep if next_timestep is None else torch.as_tensor(next_timestep, device=tokens.device)
            conditioning = conditioning + self.interval_embed(later - timestep, tokens.dtype)
        elif next_timestep is not None:
            raise ValueError("next_timestep is given, but this model is not a student: expected none")
        return tokens, conditioning

    def enable_cache(self, config: Any) -> None:
        """As diffusers' own. Raises: ValueError on FasterCache, which splits guided batches itself."""
        if type(config).__name__ == "FasterCacheConfig":
            raise ValueError("FasterCache does not fit LightningDiT: expected FirstBlockCache, MagCache or TaylorSeer")
        super().enable_cache(config)

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, p·p·C) -> latents (B, C, H, W)."""
        patch, channels = self.config.patch_size, self.config.in_channels
        grid = self.config.sample_size // patch
        tokens = tokens.unflatten(2, (patch, patch, channels)).unflatten(1, (grid, grid))  # (B, h, w, p, p, C)
        return tokens.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)

    def replace_classes(self, num_classes: int) -> None:
        """Replace the classes: their embeddings are drawn as in `initialize_weights`, "no class" keeps its own."""
        table = nn.Embedding(num_classes + 1, self.class_embed.embedding_dim)
        nn.init.normal_(table.weight, std=0.02)
        with torch.no_grad():
            table.weight[-1] = self.class_embed.weight[-1]
        self.class_embed = table.to(self.class_embed.weight)
        self.register_to_config(num_classes=num_classes)

    def initialize_weights(self) -> None:
        """DiT's published initialisation, to call before training from scratch: xavier, N(0, 0.02) for the class table
        and the time MLP, and zeros for the modulations and the output, so that every block starts as the identity
        (arXiv:2212.09748, section 3.2).

        The constructor leaves torch's defaults, as diffusers models do. After this call the output is zero until the
        first training step.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, LightningDiTAttention):
                # xavier's bound of the fused (3·D, D) matrix that the published code draws
                bound = math.sqrt(6 / (4 * module.inner_dim))
                for projection in (module.to_q, module.to_k, module.to_v):
                    nn.init.uniform_(projection.weight, -bound, bound)
            if isinstance(module, LightningDiTModulation):
                nn.init.zeros_(module.linear.weight)
        for table in (self.class_embed, self.time_embed.linear_1, self.time_embed.linear_2):
            nn.init.normal_(table.weight, std=0.02)
        for head in [self.proj_out] + ([] if self.config.base_head_layer is None else [self.base_proj_out]):
            nn.init.zeros_(head.weight)


class LightningDiTBlock(nn.Module):
    """x + gate·attention(modulated norm), then the same with the SwiGLU MLP (adaLN-Zero, arXiv:2212.09748)."""

    def __init__(self, width: int, num_heads: int, head_dim: int, qk_norm: bool):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attn = LightningDiTAttention(width, num_heads, head_dim, qk_norm)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.mlp = LightningDiTSwiGLU(width, int(2 / 3 * 4 * width))
        self.modulation = LightningDiTModulation(width, 6)
        self.fused = None  # a `FusedBlock` in training on a GPU, see `fuse_training`

    def forward(
        self, hidden_states: torch.Tensor, conditioning: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        if self.fused is not None and torch.is_grad_enabled():
            return self.fused(self, hidden_states, conditioning, rotary)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.modulation(conditioning)
        normed = modulate(self.norm1(hidden_states), shift_attn, scale_attn)
        hidden_states = hidden_states + gate_attn * self.attn(normed, rotary=rotary)
        normed = modulate(self.norm2(hidden_states), shift_mlp, scale_mlp)
        return hidden_states + gate_mlp * self.mlp(normed)


class LightningDiTAttnProcessor:
    """Self-attention with rotated queries and keys through diffusers' attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "LightningDiTAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in (query, key, value))  # (B, N, heads, d)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if rotary is not None:
            query, key = rotate_interleaved(query, *rotary), rotate_interleaved(key, *rotary)
        attended = dispatch_attention_fn(
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )  # (B, N, heads, d)
        hidden_states = attn.to_out[0](attended.flatten(2))
        return attn.to_out[1](hidden_states)


class LightningDiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention; `to_q`, `to_k`, `to_v` can be fused with `fuse_qkv_projections`."""

    _default_processor_cls = LightningDiTAttnProcessor
    _available_processors = [LightningDiTAttnProcessor]

    def __init__(self, width: int, num_heads: int, head_dim: int, qk_norm: bool):
        super().__init__()
        self.heads = num_heads
        self.head_dim = head_dim
        self.inner_dim = num_heads * head_dim
        self.use_bias = True
        self.is_cross_attention = False
        self.cross_attention_dim = None
        self.added_kv_proj_dim = None
        self.to_q = nn.Linear(width, self.inner_dim)
        self.to_k = nn.Linear(width, self.inner_dim)
        self.to_v = nn.Linear(width, self.inner_dim)
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([nn.Linear(self.inner_dim, width), nn.Dropout(0.0)])
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.processor(self, hidden_states, **kwargs)


class LightningDiTSwiGLU(nn.Module):
    """w3(silu(a)·b) with a, b = w12(x) (Shazeer, arXiv:2002.05202); one fused input projection, as released."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, value = self.w12(hidden_states).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LightningDiTModulation(nn.Module):
    """SiLU, then a linear layer to `chunks` vectors of the width: shift, scale and gate, (B, 1, D) each."""

    def __init__(self, width: int, chunks: int):
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(width, chunks * width)

    def forward(self, conditioning: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.linear(F.silu(conditioning))[:, None].chunk(self.chunks, dim=-1)


class LightningDiTTimeEmbedding(nn.Module):
    """Sinusoids of t itself in [0, 1] (not of 1000·t), cosines first, then a two-layer MLP. (B,) -> (B, D).

    The sinusoids are computed in float32 and cast to `dtype`, since weights may be stored in another dtype.
    """

    def __init__(self, width: int, num_frequencies: int = 128):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.linear_1 = nn.Linear(2 * num_frequencies, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        exponents = torch.arange(self.num_frequencies, dtype=torch.float32, device=timestep.device)
        frequencies = torch.exp(-math.log(10000) * exponents / self.num_frequencies)
        angles = timestep.float()[:, None] * frequencies  # (B, num_frequencies)
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        return self.linear_2(F.silu(self.linear_1(embedding)))


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """adaLN: (B, N, D) scaled by 1 + scale and shifted, both (B, 1, D)."""
    return hidden_states * (1 + scale) + shift


def sincos_position_embedding(width: int, grid: int) -> torch.Tensor:
    """DiT's fixed table (grid², width), as in MAE (arXiv:2111.06377).

    The first half of the width encodes the column, the second the row; sines come before cosines within each.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width / 4))
    angles = np.arange(grid, dtype=np.float64)[:, None] * frequencies  # (grid, width / 4)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, width / 2)
    rows, columns = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    table = np.concatenate([axis[columns.ravel()], axis[rows.ravel()]], axis=1)
    return torch.tensor(table, dtype=torch.float32)  # unlike from_numpy, on the device of a `with torch.device`


# FirstBlockCache, MagCache and TaylorSeer need to know what a block returns.
TransformerBlockRegistry.register(
    LightningDiTBlock,
    TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
)
