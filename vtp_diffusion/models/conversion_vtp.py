"""Released VTP checkpoints -> configuration and state dict of `VTPModel` or `AutoencoderVTP`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from ..runtime.disk import read_json
from ..runtime.tensor_files import read_safetensors
from .conversion import RenameTable, StateDict, rename_strictly, with_kinds
from .vtp_blocks import ROTARY_DTYPES, rotary_periods

# Released tokenizers, whose names may be given without the owner.
RELEASED = ("VTP-Small-f16d64", "VTP-Base-f16d64", "VTP-Large-f16d64")
RELEASED_BY = "MiniMaxAI"
# Released option -> our configuration key.
VTP_OPTIONS = {
    "image_size": "sample_size",
    "vision_patch_size": "patch_size",
    "vision_feature_bottleneck": "latent_channels",
    "vision_embed_dim": "encoder_hidden_size",
    "vision_depth": "encoder_num_layers",
    "vision_num_heads": "encoder_num_attention_heads",
    "vision_use_qk_norm": "encoder_qk_norm",
    "decoder_embed_dim": "decoder_hidden_size",
    "decoder_depth": "decoder_num_layers",
    "decoder_num_heads": "decoder_num_attention_heads",
    "decoder_use_qk_norm": "decoder_qk_norm",
    "text_embed_dim": "text_hidden_size",
    "text_depth": "text_num_layers",
    "text_num_heads": "text_num_attention_heads",
    "text_context_length": "text_context_length",
    "text_vocab_size": "text_vocab_size",
}
# Released options that do not show in names and shapes of weights, with the only value that our models support.
VTP_FIXED_OPTIONS = {
    "model_type": "vtp",
    "vision_bottleneck_ae_only": True,
    "vision_clip_feat": "cls",
    "vision_norm_layer": "rmsnorm",
    "decoder_norm_layer": "layernorm",
    "text_no_causal_mask": False,
    "text_output_tokens": False,
    "text_pool_type": "argmax",
    "text_quick_gelu": False,
}
# Layers that our models do not have. Strict loading would refuse their weights too, but by a list of all names.
VTP_LAYER_OPTIONS = {
    "vision_init_values": None,
    "decoder_init_values": None,
    "init_logit_bias": None,
    "nonscalar_logit_scale": False,
    "text_embed_cls": False,
    "text_ls_init_value": None,
    "text_proj_bias": False,
    "text_proj_type": "linear",
}
# Options that show in the names and shapes of weights, which strict loading checks, or do not affect a loaded model.
VTP_IGNORED_OPTIONS = set(
    """train_clip train_reconstruction vision_ffn_layer vision_mlp_ratio decoder_ffn_layer text_mlp_ratio
    init_logit_scale text_pad_id architectures auto_map dtype torch_dtype transformers_version _name_or_path""".split()
)


def convert_vtp_config(
    released: Mapping[str, Any], rope_dtype: str | None = None, source: str = "VTP configuration"
) -> dict[str, Any]:
    """Configuration keywords of `VTPModel` from a released `config.json`.

    Args:
        released: the content of `config.json`.
        rope_dtype: None for "bfloat16", which the released weights were trained with; or "float32".
        source: the configuration's name in messages.
    Raises: ValueError naming every option that is missing, unknown, or has a value that our models do not support.
    """
    problems = []
    fixed = VTP_FIXED_OPTIONS | VTP_LAYER_OPTIONS
    if unknown := sorted(set(released) - set(VTP_OPTIONS) - set(fixed) - VTP_IGNORED_OPTIONS):
        problems.append(f"unknown options {unknown}")
    missing = sorted((set(VTP_OPTIONS) | set(VTP_FIXED_OPTIONS)) - set(released))
    if missing:
        problems.append(f"missing options {missing}")
    for option, supported in fixed.items():
        given = released.get(option, supported)
        # also compare for booleans: 1 == True in Python
        if given != supported or isinstance(given, bool) != isinstance(supported, bool):
            problems.append(f"{option}={given!r} is not supported (only {supported!r})")
    for option in VTP_OPTIONS:
        kind = bool if option.endswith("qk_norm") else int
        # bool is a subclass of int in Python: a depth of True must not pass as 1.
        if option in released and (type(released[option]) is not kind or (kind is int and released[option] < 1)):
            problems.append(
                f"{option}={released[option]!r} is not a {'boolean' if kind is bool else 'positive integer'}"
            )
    if problems:
        raise ValueError(f"{source}: {'; '.join(problems)}.")
    config = {ours: released[option] for option, ours in VTP_OPTIONS.items()}
    config["rope_dtype"] = rope_dtype if rope_dtype is not None else "bfloat16"
    # The joint embedding space of both towers has the width of the text tower.
    config["projection_dim"] = released["text_embed_dim"]
    return config


def convert_vtp_state_dict(
    released: Mapping[str, torch.Tensor], config: Mapping[str, Any], source: str = "VTP checkpoint"
) -> StateDict:
    """State dict of `VTPModel` from a released one.

    The fused qkv is split into its three parts and the 1x1 convolutions of the pixel decoder become matrices. Our
    model computes its rotary periods and does not store them; those of the checkpoint must be equal bit for bit.

    Args:
        released: tensors of `model.safetensors`.
        config: configuration keywords of `VTPModel`, from `convert_vtp_config`.
        source: the checkpoint's name in messages.
    Raises: ValueError naming missing or unknown keys, or periods that differ.
    """
    periods = {"trunk.rope_embed.periods": "encoder", "pixel_decoder.rope_embed.periods": "decoder"}
    state = rename_strictly(released, _vtp_rename_table(config) | {name: (name,) for name in periods}, source)
    for name, part in periods.items():
        head_dim = config[f"{part}_hidden_size"] // config[f"{part}_num_attention_heads"]
        expected, given = rotary_periods(head_dim, torch.bfloat16), state.pop(name)
        if given.dtype != expected.dtype or not torch.equal(given, expected):
            raise ValueError(
                f"{source}: {name} is {given.tolist()} ({given.dtype}), expected {expected.tolist()} "
                f"(torch.bfloat16) for heads of {head_dim} channels."
            )
    for name in ("autoencoder.decoder.proj_in.weight", "autoencoder.decoder.proj_out.weight"):
        # squeeze drops only sides of 1, so that a larger kernel fails the shape check of `load_strict`
        state[name] = state[name].squeeze(-1).squeeze(-1)
    return state


def _vtp_rename_table(config: Mapping[str, Any]) -> RenameTable:
    encoder = "autoencoder.encoder"
    table = {
        "trunk.cls_token": (f"{encoder}.embeddings.cls_token",),
        "trunk.mask_token": (f"{encoder}.embeddings.mask_token",),
        "trunk.norm.weight": (f"{encoder}.norm.weight",),
        "trunk.feature_bottleneck.weight": ("autoencoder.bottleneck.weight",),
        "visual_proj.weight": ("visual_projection.weight",),
        "token_embedding.weight": ("text_model.token_embedding.weight",),
        "positional_embedding": ("text_model.positional_embedding",),
        "text_projection": ("text_model.text_projection",),
        "logit_scale": ("logit_scale",),
    }
    modules = {
        "trunk.patch_embed.proj": (f"{encoder}.embeddings.patch_embed",),
        "pixel_decoder.proj_in": ("autoencoder.decoder.proj_in",),
        "pixel_decoder.proj_out": ("autoencoder.decoder.proj_out",),
        "pixel_decoder.norm": ("autoencoder.decoder.norm",),
        "ln_final": ("text_model.norm",),
    }
    for theirs, part in (("trunk", "encoder"), ("pixel_decoder", "decoder")):
        for index in range(config[f"{part}_num_layers"]):
            block, ours = f"{theirs}.blocks.{index}", f"autoencoder.{part}.blocks.{index}"
            modules[f"{block}.attn.qkv"] = tuple(f"{ours}.attn.to_{x}" for x in "qkv")
            modules[f"{block}.attn.proj"] = (f"{ours}.attn.to_out.0",)
            modules |= {f"{block}.mlp.{w}": (f"{ours}.mlp.{w}",) for w in ("w1", "w2", "w3")}
            for norm in ("norm1", "norm2"):
                table[f"{block}.{norm}.weight"] = (f"{ours}.{norm}.weight",)
                if part == "decoder":
                    table[f"{block}.{norm}.bias"] = (f"{ours}.{norm}.bias",)
            if config[f"{part}_qk_norm"]:
                table |= {f"{block}.attn.{x}_norm.weight": (f"{ours}.attn.norm_{x}.weight",) for x in "qk"}
    for index in range(config["text_num_layers"]):
        block, ours = f"text_transformer.resblocks.{index}", f"text_model.blocks.{index}"
        for kind in ("weight", "bias"):
            table[f"{block}.attn.in_proj_{kind}"] = tuple(f"{ours}.attn.to_{x}.{kind}" for x in "qkv")
        modules |= {
            f"{block}.attn.out_proj": (f"{ours}.attn.to_out.0",),
            f"{block}.ln_1": (f"{ours}.norm1",),
            f"{block}.ln_2": (f"{ours}.norm2",),
            f"{block}.mlp.c_fc": (f"{ours}.fc1",),
            f"{block}.mlp.c_proj": (f"{ours}.fc2",),
        }
    return table | with_kinds(modules)


def read_released_vtp(folder_or_hub_id: str | Path, rope_dtype: str | None = None) -> tuple[dict[str, Any], StateDict]:
    """Configuration and state dict of `VTPModel` from a released `config.json` and `model.safetensors`.

    Args:
        folder_or_hub_id: local folder, hub repository id, or one of `RELEASED`.
        rope_dtype: None for "bfloat16", which the released weights were trained with; or "float32".
    Raises: ValueError: for a missing or unreadable file, or a checkpoint that our models do not support.
    """
    if rope_dtype is not None and rope_dtype not in ROTARY_DTYPES:
        raise ValueError(f"rope_dtype={rope_dtype!r} is not None or one of {sorted(ROTARY_DTYPES)}.")
    config_file = _released_file(folder_or_hub_id, "config.json")
    released = read_json(config_file)
    if (name := released.get("_class_name")) is not None:
        raise ValueError(
            f"{folder_or_hub_id} holds a saved {name}, expected a released checkpoint: use {name}.from_pretrained."
        )
    config = convert_vtp_config(released, rope_dtype, source=str(config_file))
    weights_file = _released_file(folder_or_hub_id, "model.safetensors")
    return config, convert_vtp_state_dict(read_safetensors(weights_file), config, source=str(weights_file))


def autoencoder_part(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], StateDict]:
    """Configuration and state dict of `AutoencoderVTP` from those of `VTPModel`."""
    prefix = "autoencoder."
    return (
        {key: value for key, value in config.items() if not key.startswith("text_") and key != "projection_dim"},
        {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)},
    )


def refuse_released(folder: Any, loader: str) -> None:
    """Raises: ValueError for a folder with a released `config.json`: it needs `from_released`."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        return
    content = read_json(file)
    if "_class_name" not in content and content.get("model_type") == "vtp":
        raise ValueError(
            f"{folder} holds a released checkpoint, expected a folder that save_pretrained wrote: load it with "
            f"{loader}.from_released."
        )


def _released_file(folder_or_hub_id: str | Path, name: str) -> Path:
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; a released checkpoint is config.json and model.safetensors.")
        return folder / name
    if str(folder_or_hub_id) in RELEASED:
        folder_or_hub_id = f"{RELEASED_BY}/{folder_or_hub_id}"
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(folder_or_hub_id)):
        raise ValueError(
            f"{folder_or_hub_id} is neither a folder nor a hub id like 'owner/name', nor one of {', '.join(RELEASED)}."
        )
    return Path(hf_hub_download(str(folder_or_hub_id), name))
