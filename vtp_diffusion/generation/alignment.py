"""Alignment of a generator's tokens with the features of its own tokenizer (REPA, arXiv:2410.06940).

The features are the frozen encoder's patch tokens of the clean image, before the bottleneck. Shards of latents do not
hold them: they are D / C times as large as the latents, for VTP-Large on ImageNet 1.3 TB in float16 beside 84 GB,
mirror images included. Nor do they follow from the latents, which keep C of their D dimensions; from decoded images
they would cost a decoder and an encoder pass in every step. In online training one encoder pass gives both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..models.latent_space import has_features
from ..runtime.config import Settings, setting

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from ..models.transformer_lightning_dit import LightningDiTTransformer2DModel


@dataclass(kw_only=True)
class AlignmentConfig(Settings):
    """Settings of the alignment."""

    weight: float = setting(0.0, "weight of 1 - cosine similarity, 0.5 in REPA; 0 is no alignment", at_least=0)
    until_step: int | None = setting(None, "number of steps with alignment, from the first; none: all", at_least=1)
    layer: int | None = setting(
        None, "block, counted from 1, whose tokens are compared; none: the one at a third of the depth", at_least=1
    )
    projector_width: int = setting(2048, "hidden channels of the projector, which only training has", at_least=1)

    def active(self, step: int) -> bool:
        """Whether a step, counted from 0, is aligned."""
        return self.weight > 0 and (self.until_step is None or step < self.until_step)

    @property
    def ends(self) -> bool:
        """Whether alignment is used, but only up to `until_step`."""
        return self.weight > 0 and self.until_step is not None

    @property
    def text(self) -> str:
        """The alignment in words, for the model card."""
        steps = "" if self.until_step is None else f" in the first {self.until_step} steps"
        return f"tokens aligned with the encoder's features (REPA, arXiv:2410.06940), weight {self.weight}{steps}"

    def block(self, num_layers: int) -> int:
        """The number of the block that is compared. Raises: ValueError if there are fewer blocks."""
        if self.layer is None:
            return max(1, num_layers // 3)
        if self.layer > num_layers:
            raise ValueError(f"alignment.layer is {self.layer}, expected a block from 1 to the last, {num_layers}")
        return self.layer

    def check(self, latents: str | None, num_layers: int) -> None:
        """Check that a run can be aligned.

        Args: `latents`: folder of its shards, None: it trains online; `num_layers`: blocks of its transformer.
        Raises: ValueError if it learns from shards, or if there is no block `layer`.
        """
        if self.weight > 0 and latents is not None:
            raise ValueError(
                f"alignment.weight is {self.weight}, but the shards in {latents} hold no features to align with: "
                "expected --latents none with data.source and data.resolution (train online), or weight 0"
            )
        if self.weight > 0:
            self.block(num_layers)

    def check_autoencoder(self, vae: ModelMixin) -> None:
        """Raises: ValueError if the autoencoder has no features to align with."""
        if self.weight > 0 and not has_features(vae):
            raise ValueError(
                f"alignment.weight is {self.weight}, but {type(vae).__name__} has no features to align with: expected "
                "an AutoencoderVTP, or weight 0"
            )


class Alignment(nn.Module):
    """1 - cosine similarity of projected tokens and features; the projector is an MLP of three layers with SiLU.

    A token of a transformer with larger patches is compared with the mean of the features in its patch.

    Raises: ValueError if the autoencoder has no features, or the transformer no such block.
    """

    def __init__(self, config: AlignmentConfig, transformer: LightningDiTTransformer2DModel, vae: ModelMixin):
        super().__init__()
        config.check_autoencoder(vae)
        shape, hidden = transformer.config, config.projector_width
        self.weight, self.layer = config.weight, config.block(shape.num_layers)
        self.patch_size, self.side = shape.patch_size, shape.sample_size // shape.patch_size
        self.projector = nn.Sequential(
            nn.Linear(shape.num_attention_heads * shape.attention_head_dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, vae.config.encoder_hidden_size),
        )

    def forward(self, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The mean over samples and tokens. Args: `tokens`: (B, N, width); `features`: (B, h·w, D), one for every
        position of the latents, row by row."""
        side, patch = self.side, self.patch_size
        features = features.float().unflatten(1, (side, patch, side, patch)).mean((2, 4)).flatten(1, 2)  # (B, N, D)
        return 1 - F.cosine_similarity(self.projector(tokens).float(), features, dim=-1).mean()
