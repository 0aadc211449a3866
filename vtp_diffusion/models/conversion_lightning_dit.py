"""Released LightningDiT checkpoints -> architecture and state dict of `LightningDiTTransformer2DModel`."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..runtime.tensor_files import read_torch
from .conversion import RenameTable, StateDict, rename_strictly, with_kinds
from .rotary_lightning_dit import lightning_dit_rotary_tables


def read_lightning_dit_checkpoint(checkpoint: str | Path) -> StateDict:
    """The EMA weights of an upstream `.pt` file `{"model", "ema", "opt", "config"}`.

    Raises: ValueError: the file is missing, cannot be read, holds no "ema", or weights of other layers.
    """
    # mapped, because "model" and "opt" are three quarters of the file and not needed
    content = read_torch(checkpoint, mmap=True)
    if not isinstance(content, dict) or not isinstance(content.get("ema"), dict):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{checkpoint} holds no 'ema' weights: expected a dictionary with 'ema', found {found}.")
    _refuse_other_layers(content["ema"], checkpoint)
    return {name: tensor.clone() for name, tensor in content["ema"].items()}


def _refuse_other_layers(released: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Raises: ValueError naming the upstream options that make other layers, where later checks would list keys."""
    shapes = {name: tuple(tensor.shape) for name, tensor in released.items()}
    if "blocks.0.attn.qkv.weight" not in shapes or "x_embedder.proj.weight" not in shapes:
        return  # not a LightningDiT at all: a later check lists the missing keys
    signs = {
        "use_rope=False": not any(name.startswith("feat_rope.") for name in shapes),
        "use_rmsnorm=False": not any(name.endswith(".norm1.weight") for name in shapes),
        "use_swiglu=False": any(name.endswith(".mlp.fc1.weight") for name in shapes),
        "learn_sigma=True": shapes.get("final_layer.linear.bias")
        == (2 * math.prod(shapes["x_embedder.proj.weight"][1:]),),
    }
    if found := [option for option, seen in signs.items() if seen]:
        raise ValueError(
            f"{source} looks trained with {', '.join(found)}, which is not supported: expected rotary embedding, "
            "RMSNorm, SwiGLU and a velocity alone"
        )


def lightning_dit_architecture(
    released: Mapping[str, torch.Tensor], source: str = "LightningDiT checkpoint"
) -> dict[str, Any]:
    """Constructor keywords of `LightningDiTTransformer2DModel`, from the shapes of a released state dict.

    Args:
        released: the tensors under "ema". The head dimension is the width of their rotary table.
        source: the checkpoint's name in messages.
    Raises: ValueError naming the keys that are missing.
    """
    needed = ("x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight", "feat_rope.freqs_cos")
    if missing := [name for name in needed if name not in released]:
        raise ValueError(f"{source}: missing keys {missing}.")
    patch_embed, positions, classes, rotary = (released[name] for name in needed)
    width, in_channels, patch_size = patch_embed.shape[:3]
    blocks = {match[1] for name in released if (match := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "sample_size": math.isqrt(positions.shape[1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": len(blocks),
        "num_attention_heads": width // rotary.shape[-1],
        "attention_head_dim": rotary.shape[-1],
        "num_classes": classes.shape[0] - 1,
        "qk_norm": "blocks.0.attn.q_norm.weight" in released,
    }


def convert_lightning_dit_state_dict(
    released: Mapping[str, torch.Tensor], config: Mapping[str, Any], source: str = "LightningDiT checkpoint"
) -> StateDict:
    """State dict of `LightningDiTTransformer2DModel` from a released one.

    The fused qkv is split. Our model computes its rotary tables and does not store them; those of the checkpoint must
    be equal.

    Args:
        released: the tensors under "ema".
        config: configuration keywords of the model.
        source: the checkpoint's name in messages.
    Raises: ValueError naming missing or unknown keys, or rotary tables of another grid, head size or base.
    """
    grid, head_dim = config["sample_size"] // config["patch_size"], config["attention_head_dim"]
    names = "feat_rope.freqs_cos", "feat_rope.freqs_sin"
    rotary = dict(zip(names, lightning_dit_rotary_tables(grid, head_dim), strict=True))
    state = rename_strictly(released, _lightning_dit_rename_table(config) | {name: (name,) for name in rotary}, source)
    for name, expected in rotary.items():
        given = state.pop(name)
        tolerance = max(1e-4, torch.finfo(given.dtype).eps) if given.is_floating_point() else 0.0
        if given.shape != expected.shape or not torch.allclose(given.float(), expected, atol=tolerance):
            raise ValueError(
                f"{source}: {name} {tuple(given.shape)} is not the rotary table of a {grid}x{grid} "
                f"grid with heads of {head_dim} channels, expected {tuple(expected.shape)}: "
                "check the architecture given."
            )
    return state


def _lightning_dit_rename_table(config: Mapping[str, Any]) -> RenameTable:
    table = {
        "pos_embed": ("pos_embed",),
        "y_embedder.embedding_table.weight": ("class_embed.weight",),
        "final_layer.norm_final.weight": ("norm_out.weight",),
    }
    modules = {
        "x_embedder.proj": ("patch_embed",),
        "t_embedder.mlp.0": ("time_embed.linear_1",),
        "t_embedder.mlp.2": ("time_embed.linear_2",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("modulation_out.linear",),
    }
    for index in range(config["num_layers"]):
        block = f"blocks.{index}"
        modules |= {
            f"{block}.attn.qkv": tuple(f"{block}.attn.to_{x}" for x in "qkv"),
            f"{block}.attn.proj": (f"{block}.attn.to_out.0",),
            f"{block}.mlp.w12": (f"{block}.mlp.w12",),
            f"{block}.mlp.w3": (f"{block}.mlp.w3",),
            f"{block}.adaLN_modulation.1": (f"{block}.modulation.linear",),
        }
        table |= {f"{block}.{norm}.weight": (f"{block}.{norm}.weight",) for norm in ("norm1", "norm2")}
        if config["qk_norm"]:
            table |= {f"{block}.attn.{x}_norm.weight": (f"{block}.attn.norm_{x}.weight",) for x in "qk"}
    return table | with_kinds(modules)
