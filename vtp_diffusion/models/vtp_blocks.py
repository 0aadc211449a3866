"""The networks inside a VTP autoencoder (arXiv:2512.13687): encoder, pixel decoder and their parts."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import nn

ROTARY_BASE = 100.0
ROTARY_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class VTPTransformer(nn.Module):
    """Base of encoder and decoder: pre-norm blocks and a final norm, over patches with axial rotary embedding.

    Raises: ValueError: when the size of a head is not a whole multiple of 4 (two axes, pairs of channels).
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        qk_norm: bool,
        rope_dtype: torch.dtype,
        norm: Callable,
        block: type["VTPBlock"],
    ):
        super().__init__()
        if hidden_size % num_heads or (hidden_size // num_heads) % 4:
            raise ValueError(
                f"{type(self).__name__}: hidden size {hidden_size} with {num_heads} attention heads, "
                "the size of a head must be a whole multiple of 4."
            )
        self.head_dim = hidden_size // num_heads
        self.rope_dtype = rope_dtype
        self.blocks = nn.ModuleList(
            block(hidden_size, num_heads, qk_norm, norm(hidden_size), norm(hidden_size)) for _ in range(num_layers)
        )
        self.norm = norm(hidden_size)
        self.gradient_checkpointing, self.checkpointed_blocks = False, num_layers  # the first ones

    def run_blocks(
        self,
        hidden_states: torch.Tensor,
        grid: tuple[int, int],
        prefix_tokens: int = 0,
        num_layers: int = 1,
        kept: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Tokens (B, prefix + h·w, D) -> the outputs of the last layers (B, prefix + h·w, D), each final-normed.

        Args: `kept`: (layers, 2, K) samples that stochastic depth keeps in each layer's attention and MLP.
        """
        if kept is not None and kept.shape[:2] != (len(self.blocks), 2):
            raise ValueError(f"kept has shape {tuple(kept.shape)}, expected ({len(self.blocks)}, 2, samples)")
        cos, sin = rotary_tables(*grid, self.head_dim, self.rope_dtype, hidden_states.device)  # (h·w, head_dim)
        # Prefix tokens are not rotated: angle zero, cosine 1 and sine 0.
        cos = F.pad(cos, (0, 0, prefix_tokens, 0), value=1.0)
        sin = F.pad(sin, (0, 0, prefix_tokens, 0), value=0.0)
        outputs = []
        for index, block in enumerate(self.blocks):
            samples = (None, None) if kept is None else kept[index].unbind(0)
            if torch.is_grad_enabled() and self.gradient_checkpointing and index < self.checkpointed_blocks:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, cos, sin, *samples)
            else:
                hidden_states = block(hidden_states, cos, sin, *samples)
            if index >= len(self.blocks) - num_layers:
                outputs.append(self.norm(hidden_states))
        return outputs


class VTPEncoder(VTPTransformer):
    """Vision transformer with a class token and RMSNorm."""

    def __init__(self, in_channels: int, patch_size: int, hidden_size: int, *transformer):
        super().__init__(hidden_size, *transformer, norm=VTPRMSNorm, block=VTPBlock)
        self.patch_size = patch_size
        self.embeddings = VTPEmbeddings(in_channels, patch_size, hidden_size)

    def forward(
        self,
        images: torch.Tensor,
        num_layers: int = 1,
        masks: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """ImageNet-normalised images (B, 3, H, W) -> tokens (B, 1 + N, D) of the last layers, each final-normed.

        Args: `masks`: (B, N) bool, patches that the mask token replaces; `kept`: as of `run_blocks`.
        """
        grid = tuple(side // self.patch_size for side in images.shape[-2:])
        return self.run_blocks(self.embeddings(images, masks), grid, 1, num_layers, kept)


class VTPDecoder(VTPTransformer):
    """Pixel decoder with LayerNorm: linear in, linear out to the pixels of each patch."""

    def __init__(self, latent_channels: int, out_channels: int, patch_size: int, hidden_size: int, *transformer):
        super().__init__(hidden_size, *transformer, norm=partial(nn.LayerNorm, eps=1e-6), block=VTPDecoderBlock)
        self.patch_size = patch_size
        self.proj_in = nn.Linear(latent_channels, hidden_size)
        self.proj_out = nn.Linear(hidden_size, out_channels * patch_size**2)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Raw latents (B, C, h, w) -> ImageNet-normalised images (B, 3, h·p, w·p)."""
        height, width = latents.shape[-2:]
        tokens = self.proj_in(latents.flatten(2).transpose(1, 2))  # (B, N, D)
        (tokens,) = self.run_blocks(tokens, (height, width))
        # Per patch the pixels are ordered channel, row, column.
        pixels = self.proj_out(tokens).transpose(1, 2).unflatten(2, (height, width))  # (B, 3·p·p, h, w)
        return F.pixel_shuffle(pixels, self.patch_size)


class VTPEmbeddings(nn.Module):
    """Patches as tokens, after the class token. The mask token replaces patches in masked-image modelling only.

    The class token keeps its weight's dtype. Under autocast it is float32 beside bfloat16 patches, so that the joined
    tokens, and with them the encoder's residual stream, are float32, as in VTP's own code.
    """

    def __init__(self, in_channels: int, patch_size: int, hidden_size: int):
        super().__init__()
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.mask_token = nn.Parameter(torch.empty(1, hidden_size))
        self.products = None  # `LargeProducts` in compiled training

    def forward(self, images: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        """Images (B, 3, H, W), masks (B, N) of the patches to hide -> tokens (B, 1 + N, D)."""
        patches = self.embed_patches(images)  # (B, N, D)
        if masks is not None:
            if masks.shape != patches.shape[:2]:
                raise ValueError(f"masks have shape {tuple(masks.shape)}, expected {tuple(patches.shape[:2])}")
            patches = torch.where(masks[:, :, None], self.mask_token.to(patches.dtype), patches)
        cls_token = self.cls_token.expand(patches.shape[0], -1, -1)
        return torch.cat([cls_token, patches], dim=1)

    def embed_patches(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> (B, N, D)."""
        if self.products is not None:
            return self.products.embed_patches(self, images)
        return self.patch_embed(images).flatten(2).transpose(1, 2)


class VTPBlock(nn.Module):
    """Pre-norm transformer block: rotary self-attention and SwiGLU."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool, norm1: nn.Module, norm2: nn.Module):
        super().__init__()
        self.norm1 = norm1
        self.attn = VTPAttention(hidden_size, num_heads, qk_norm=qk_norm)
        self.norm2 = norm2
        self.mlp = VTPSwiGLU(hidden_size)
        self.products = None  # `LargeProducts` in compiled training

    def forward(
        self,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kept_in_attention: torch.Tensor | None = None,
        kept_in_mlp: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens (B, S, D) with rotary tables (S, head_dim) -> tokens (B, S, D).

        Args: `kept_in_attention`, `kept_in_mlp`: (K,) samples whose branch is computed; None: all of them.
        """
        hidden_states = self._update(
            hidden_states, self.norm1, lambda x: self.attn(x, rotary=(cos, sin)), kept_in_attention
        )
        return self._update(hidden_states, self.norm2, self.mlp, kept_in_mlp)

    def _update(
        self, hidden_states: torch.Tensor, norm: nn.Module, branch: Callable, kept: torch.Tensor | None
    ) -> torch.Tensor:
        if self.products is not None:
            return self.products.update(hidden_states, norm, branch, kept)
        if kept is not None:
            return self._update_kept(hidden_states, norm, branch, kept)
        return hidden_states + branch(norm(hidden_states))

    def _update_kept(self, hidden_states, norm: nn.Module, branch: Callable, kept: torch.Tensor) -> torch.Tensor:
        # a method of its own, as is `_causal_mask`, so that generation/export.py can leave it out
        return residual_update(hidden_states, lambda x: branch(norm(x)), kept)


class VTPDecoderBlock(VTPBlock):
    """The decoder's block, with a `forward` of its own: torch.compile keeps compiled code by function, and the
    encoder's blocks have another norm, width and number of tokens."""

    def forward(self, hidden_states: torch.Tensor, *args) -> torch.Tensor:
        return super().forward(hidden_states, *args)


class VTPAttentionProcessor:
    """Self-attention through diffusers' attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "VTPAttention",
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        query, key, value = attn.project(hidden_states, rotary)  # (B, S, H, D)
        # Under autocast the norms above leave float32; attention needs one dtype.
        query, key = query.to(value.dtype), key.to(value.dtype)
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=self._causal_mask(hidden_states.shape[1], hidden_states.device) if attn.is_causal else None,
            is_causal=attn.is_causal,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        hidden_states = attn.to_out[0](hidden_states.flatten(2))  # (B, S, H·D)
        return attn.to_out[1](hidden_states)

    def _causal_mask(self, length: int, device: torch.device) -> torch.Tensor | None:
        # diffusers' flex backend looks at is_causal only where there is a mask; the others refuse to take both.
        backend = self._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        if backend != AttentionBackendName.FLEX:
            return None
        return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()


class VTPAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with biases, laid out as diffusers' attention tools expect."""

    _default_processor_cls = VTPAttentionProcessor
    _available_processors = [VTPAttentionProcessor]

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False, is_causal: bool = False):
        super().__init__()
        self.heads, self.is_causal = num_heads, is_causal
        self.inner_dim = self.cross_attention_dim = hidden_size
        self.use_bias, self.is_cross_attention, self.added_kv_proj_dim = True, False, None
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.norm_q = VTPRMSNorm(hidden_size // num_heads) if qk_norm else None
        self.norm_k = VTPRMSNorm(hidden_size // num_heads) if qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size), nn.Dropout(0.0)])
        self.set_processor(VTPAttentionProcessor())
        self.products = None  # `LargeProducts` in compiled training

    def forward(
        self, hidden_states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Tokens (B, S, D) -> tokens (B, S, D); `rotary` is the pair of tables (S, head_dim)."""
        return self.processor(self, hidden_states, rotary=rotary)

    def project(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (B, S, D) -> queries and keys, normed and rotated, and values, each (B, S, H, head_dim)."""
        if self.fused_projections:
            query, key, value = self.to_qkv(x).chunk(3, dim=-1)
        elif self.products is not None:
            if (rotated := self.products.rotated_projections(self, x, rotary)) is not None:
                return rotated
            query, key, value = self.products.projections(self, x)
        else:
            query, key, value = self.to_q(x), self.to_k(x), self.to_v(x)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in (query, key, value))
        if self.norm_q is not None:
            query, key = self.norm_q(query), self.norm_k(key)
        if rotary is not None:
            query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        return query, key, value


class VTPSwiGLU(nn.Module):
    """w3(silu(w1 x) · w2 x) with 2/3 · 4 times the width, rounded up to a multiple of 8 (arXiv:2002.05202)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        inner = -(-int(hidden_size * 8 / 3) // 8) * 8
        self.w1 = nn.Linear(hidden_size, inner)
        self.w2 = nn.Linear(hidden_size, inner)
        self.w3 = nn.Linear(inner, hidden_size)
        self.products = None  # `LargeProducts` in compiled training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.products.swiglu(self, x) if self.products is not None else F.silu(self.w1(x)) * self.w2(x)
        return self.w3(inner)


class VTPRMSNorm(nn.Module):
    """Root-mean-square norm in float32, cast back before the scale, as the released weights expect it."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `VTPRMSNorm`, over the last dimension."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def rotary_periods(head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Periods 100^(2i / (head_dim/2)), i < head_dim/4, of the rotary embedding: (head_dim/4,) in dtype; released
    checkpoints hold those in bfloat16."""
    step = _rounding(dtype)
    exponents = step(2.0 * torch.arange(head_dim // 4, dtype=torch.float32, device=device) / (head_dim // 2))
    return step(ROTARY_BASE**exponents).to(dtype)


def rotary_tables(
    height: int, width: int, head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the axial rotary embedding (RoPE, arXiv:2104.09864) of a grid of patches, each
    (height · width, head_dim), row by row.

    Patch centres are scaled to [-1, 1] per side; the angles are 2π · coordinate / period, heights then widths, tiled
    twice for the half-split rotation. `dtype` is of the tables and of the arithmetic: in bfloat16 every step is
    rounded, as when the released weights were trained.
    """
    step = _rounding(dtype)
    periods = rotary_periods(head_dim, dtype, device).float()  # (head_dim/4,)
    rows, columns = (
        step(step(torch.arange(side, dtype=torch.float32, device=device) + 0.5) / side) for side in (height, width)
    )
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2)
    angles = step(step(2.0 * math.pi * step(2.0 * grid - 1.0))[:, :, None] / periods)  # (N, 2, head_dim/4)
    angles = angles.flatten(1).tile(2)  # (N, head_dim)
    return step(angles.cos()).to(dtype), step(angles.sin()).to(dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split rotation of x (B, S, H, D) by tables (S, D), in the arithmetic of the tables' dtype: with bfloat16
    tables x and every step are rounded, whatever the dtype of x, as when the released weights were trained."""
    cos, sin = cos[:, None], sin[:, None]  # (S, 1, D)
    if cos.dtype == x.dtype:
        return x * cos + _rotate_half(x) * sin
    step = _rounding(cos.dtype)
    cos, sin = cos.float(), sin.float()
    rounded = step(x.float())
    return step(step(rounded * cos) + step(_rotate_half(rounded) * sin)).to(x.dtype)


def round_to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to the nearest bfloat16 value, ties to even, kept in float32; the gradient passes unchanged.

    torch.compile drops a cast to bfloat16 and back inside a fused kernel, which changes the rotary angles by up to
    0.016 rad. Integer arithmetic on the bits is never dropped.
    """
    bits = x.detach().view(torch.int32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)
    # The difference is exact in float32, so the sum is the rounded value; a NaN stays one.
    return x + (rounded - x).detach()


def _rounding(dtype: torch.dtype) -> Callable:
    return round_to_bfloat16 if dtype == torch.bfloat16 else torch.Tensor.float


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def residual_update(hidden_states: torch.Tensor, branch: Callable, kept: torch.Tensor | None = None) -> torch.Tensor:
    """hidden_states + branch(hidden_states), or with stochastic depth (drop path, arXiv:1603.09382) of a subset of the
    batch: only the K kept samples go through the branch, and its output times B / K is added to them. Over uniformly
    drawn subsets this has the whole update as its mean. DINOv2 (arXiv:2304.07193, section 5) saves time in this way.

    Args: `hidden_states`: (B, S, D); `branch`: (K, S, D) -> (K, S, D); `kept`: (K,) int64 without repetition, or None.
    """
    if kept is None:
        return hidden_states + branch(hidden_states)
    place = places_of(kept, len(hidden_states))
    update = branch(_KeptSamples.apply(hidden_states, kept, place))
    return AddedUpdate.apply(hidden_states, update.to(hidden_states.dtype), kept, place)


def places_of(kept: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) int64: the index of each of `count` samples in `kept` (K,), or K if it is not kept."""
    return kept.new_full((count,), len(kept)).scatter(0, kept, torch.arange(len(kept), device=kept.device))


def _spread(samples: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """(K, S, D) and `places_of` (B,) -> (B, S, D), zero where the place is K."""
    rows = samples.index_select(0, place.clamp(max=len(samples) - 1))
    return torch.where((place < len(samples))[:, None, None], rows, 0)


# Autograd would use a scatter-add here. A kept sample occurs only once, so both functions below gather rows instead,
# which torch.compile fuses with the operations around them.


class _KeptSamples(torch.autograd.Function):
    """x[kept]."""

    @staticmethod
    def forward(ctx, x, kept, place):
        ctx.save_for_backward(place)
        return x.index_select(0, kept)

    @staticmethod
    def backward(ctx, grad):
        return _spread(grad, *ctx.saved_tensors), None, None


class AddedUpdate(torch.autograd.Function):
    """x, with B / K times the update added to its kept samples."""

    @staticmethod
    def forward(ctx, x, update, kept, place):
        ctx.save_for_backward(kept)
        ctx.factor = len(x) / len(kept)
        return x + ctx.factor * _spread(update, place)

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return grad, ctx.factor * grad.index_select(0, kept), None, None


def initialise_weights(module: nn.Module) -> None:
    """Truncated normal of standard deviation 0.02 and zero biases: our choice, the paper does not publish one."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, VTPEmbeddings):
        nn.init.trunc_normal_(module.cls_token, std=0.02)
        nn.init.zeros_(module.mask_token)
