"""The transformer of a training run, from its configuration and the latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ..runtime.config import Settings, setting
from ..runtime.processes import print_once

if TYPE_CHECKING:
    from ..models.transformer_lightning_dit import LightningDiTTransformer2DModel


@dataclass(kw_only=True)
class ModelConfig(Settings):
    """Architecture of the transformer; what the latents decide (channels, size) is taken from them."""

    num_classes: int | None = setting(None, "classes; none: as many as the training data names", at_least=1)
    patch_size: int = setting(1, "side of a token in latent pixels", at_least=1)
    num_layers: int = setting(28, "blocks", at_least=1)
    num_attention_heads: int = setting(16, "heads; the width is heads x head dimension", at_least=1)
    attention_head_dim: int = setting(72, "channels of a head", at_least=1)
    qk_norm: bool = setting(False, "RMSNorm on queries and keys")
    prediction: Literal["velocity", "data"] = setting("velocity", "what the output layer predicts")
    base_head_layer: int | None = setting(
        None, "block with a second output layer after it, for internal guidance; none: no such layer", at_least=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.base_head_layer is not None and self.base_head_layer >= self.num_layers:
            raise ValueError(
                f"model.base_head_layer is {self.base_head_layer}, expected a block before the last, "
                f"{self.num_layers} (model.num_layers)"
            )


def build_transformer(
    config: ModelConfig,
    latent_shape: tuple[int, int, int],
    num_classes: int,
    class_dropout_prob: float,
    initial_transformer: str | None = None,
    empty: bool = False,
) -> LightningDiTTransformer2DModel:
    """A transformer with the published initialisation, or a saved one to start from.

    Args:
        latent_shape: (C, h, w) of the latents.
        num_classes: classes, without the null class.
        class_dropout_prob: written into the transformer's configuration.
        initial_transformer: folder of the saved one. If it has another number of classes, its class embeddings are
            initialised anew, except that of "no class"; everything else is kept, and a line says so.
        empty: leave the weights uninitialised, because a checkpoint replaces them: saves seconds for a large model.
    Raises: ValueError if the saved one has another architecture than the configuration and the latents ask for.
    """
    from ..models.loading import load_saved
    from ..models.transformer_lightning_dit import LightningDiTTransformer2DModel

    architecture = {"sample_size": latent_shape[-1], "in_channels": latent_shape[0]}
    architecture |= vars(config) | {"num_classes": num_classes, "student": None}  # train_dit/distill.py makes those
    if initial_transformer is None:
        with torch.device("meta" if empty else "cpu"):
            transformer = LightningDiTTransformer2DModel(**architecture, class_dropout_prob=class_dropout_prob)
        if empty:
            return transformer.to_empty(device="cpu")
        transformer.initialize_weights()
        return transformer
    transformer = load_saved(LightningDiTTransformer2DModel, initial_transformer)
    before = transformer.config.num_classes
    if different := different_settings(transformer.config, architecture | {"num_classes": before}):
        raise ValueError(f"initial_transformer {initial_transformer} does not fit: {different}")
    if before != num_classes:
        transformer.replace_classes(num_classes)
        done = f"{before} classes are replaced by {num_classes} others"
    else:
        done = f"its {before} classes are kept, each by its index: are they the same?"
    print_once(f"initial_transformer {initial_transformer}: {done}")
    transformer.register_to_config(class_dropout_prob=class_dropout_prob)
    return transformer


def different_settings(found: dict, expected: dict) -> str:
    """What differs, as "NAME found instead of expected, ..."; empty if nothing does."""
    return ", ".join(f"{k} {found.get(k)} instead of {v}" for k, v in expected.items() if found.get(k) != v)
