"""Released weights -> ours: explicit renames, checked to account for every key in both directions."""

import json
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from .rotary import ROTARY_DTYPES, lightning_dit_rotary_tables, rotary_periods

StateDict = dict[str, torch.Tensor]
# Released name -> our names; several names share the rows of the tensor equally, in this order.
RenameTable = dict[str, tuple[str, ...]]

# ---------------------------------------------------------------------------------------------------------------------
# VTP: configuration

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
# Released options with the one value that these models compute.
VTP_FIXED_OPTIONS = {
    "model_type": "vtp",
    "train_clip": True,
    "train_reconstruction": True,
    "vision_bottleneck_ae_only": True,
    "vision_clip_feat": "cls",
    "vision_ffn_layer": "swiglu",
    "vision_init_values": None,
    "vision_mlp_ratio": 4.0,
    "vision_norm_layer": "rmsnorm",
    "decoder_ffn_layer": "swiglu",
    "decoder_init_values": None,
    "decoder_norm_layer": "layernorm",
    "init_logit_bias": None,
    "nonscalar_logit_scale": False,
    "text_embed_cls": False,
    "text_ls_init_value": None,
    "text_mlp_ratio": 4.0,
    "text_no_causal_mask": False,
    "text_output_tokens": False,
    "text_pool_type": "argmax",
    "text_proj_bias": False,
    "text_proj_type": "linear",
    "text_quick_gelu": False,
}
# Without effect on a loaded model: the scale is in the weights, padding is not masked, the rest is bookkeeping.
VTP_IGNORED_OPTIONS = {
    "init_logit_scale",
    "text_pad_id",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
}


def convert_vtp_config(
    released: Mapping[str, Any], rope_dtype: str | None = None, source: str = "VTP configuration"
) -> dict[str, Any]:
    """Configuration keywords of `VTPModel` from a released `config.json`.

    Args:
        released: the content of `config.json`.
        rope_dtype: None for "bfloat16", which the released weights were trained with; or "float32".
        source: what the message calls the configuration.

    Raises:
        ValueError: naming every option that is missing, unknown, or set to something these models do not compute.
    """
    problems = []
    unknown = sorted(set(released) - set(VTP_OPTIONS) - set(VTP_FIXED_OPTIONS) - VTP_IGNORED_OPTIONS)
    if unknown:
        problems.append(f"unknown options {unknown}")
    missing = sorted((set(VTP_OPTIONS) | set(VTP_FIXED_OPTIONS)) - set(released))
    if missing:
        problems.append(f"missing options {missing}")
    for option, supported in VTP_FIXED_OPTIONS.items():
        if option in released and not _same_option(released[option], supported):
            problems.append(f"{option}={released[option]!r} is not supported (only {supported!r})")
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
    # The common space of both towers has the width of the text tower.
    config["projection_dim"] = released["text_embed_dim"]
    return config


def _same_option(given: Any, supported: Any) -> bool:
    # 1 and True are equal in Python, not in a configuration; 4 and 4.0 are the same number.
    return given == supported and isinstance(given, bool) == isinstance(supported, bool)


# ---------------------------------------------------------------------------------------------------------------------
# VTP: weights


def convert_vtp_state_dict(
    released: Mapping[str, torch.Tensor], config: Mapping[str, Any], source: str = "VTP checkpoint"
) -> StateDict:
    """State dict of `VTPModel` from a released one.

    The fused qkv is split into its three parts and the 1x1 convolutions of the pixel decoder become matrices. The
    rotary periods, which are computed here and not stored, must equal the ones of the checkpoint bit for bit.

    Args:
        released: tensors of `model.safetensors`.
        config: configuration keywords of `VTPModel`, from `convert_vtp_config`.
        source: what the message calls the checkpoint.

    Raises:
        ValueError: naming keys that are missing or left over, or periods that differ.
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
        # Only sides of 1 are dropped, so that a larger kernel fails the shape check of `load_strict`.
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
    return table | _with_kinds(modules)


# ---------------------------------------------------------------------------------------------------------------------
# VTP: files


def read_released_vtp(folder_or_hub_id: str | Path, rope_dtype: str | None = None) -> tuple[dict[str, Any], StateDict]:
    """Configuration and state dict of `VTPModel` from a released `config.json` and `model.safetensors`.

    Args:
        folder_or_hub_id: local folder or hub repository id.
        rope_dtype: None for "bfloat16", which the released weights were trained with; or "float32".

    Raises:
        ValueError: for a missing or unreadable file, or a checkpoint that these models do not compute.
    """
    if rope_dtype is not None and rope_dtype not in ROTARY_DTYPES:
        raise ValueError(f"rope_dtype={rope_dtype!r} is not None or one of {sorted(ROTARY_DTYPES)}.")
    config_file = _released_file(folder_or_hub_id, "config.json")
    try:
        released = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_file} is not valid JSON: {error}") from error
    if not isinstance(released, dict):
        raise ValueError(f"{config_file} holds {type(released).__name__}, expected an object of options.")
    config = convert_vtp_config(released, rope_dtype, source=str(config_file))
    weights_file = _released_file(folder_or_hub_id, "model.safetensors")
    return config, convert_vtp_state_dict(read_safetensors(weights_file), config, source=str(weights_file))


def autoencoder_part(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], StateDict]:
    """Configuration and state dict of `AutoencoderVTP` out of those of `VTPModel`."""
    prefix = "autoencoder."
    return (
        {key: value for key, value in config.items() if not key.startswith("text_") and key != "projection_dim"},
        {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)},
    )


def _released_file(folder_or_hub_id: str | Path, name: str) -> Path:
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; a released checkpoint is config.json and model.safetensors.")
        return folder / name
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(folder_or_hub_id)):
        raise ValueError(f"{folder_or_hub_id} is neither a folder nor a hub repository id like 'owner/name'.")
    return Path(hf_hub_download(str(folder_or_hub_id), name))


# ---------------------------------------------------------------------------------------------------------------------
# LightningDiT


def read_lightning_dit_checkpoint(checkpoint: str | Path) -> StateDict:
    """The EMA weights of an upstream `.pt` file `{"model", "ema", "opt", "config"}`.

    Raises:
        ValueError: the file is missing, cannot be read, or holds no "ema".
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint} is no file; a LightningDiT checkpoint is a .pt file with weights under 'ema'.")
    try:
        # mapped, because "model" and "opt" make three quarters of the file and are not wanted
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{checkpoint} cannot be read as a PyTorch checkpoint: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("ema"), dict):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{checkpoint} holds no 'ema' weights: expected a dictionary with 'ema', found {found}.")
    return {name: tensor.clone() for name, tensor in content["ema"].items()}


# Upstream's option -> our constructor keyword.
LIGHTNING_DIT_OPTIONS = {
    "input_size": "sample_size",
    "patch_size": "patch_size",
    "in_channels": "in_channels",
    "depth": "num_layers",
    "num_heads": "num_attention_heads",
    "num_classes": "num_classes",
}
# Upstream's options with the one value that this model computes, and what upstream takes when they are absent.
LIGHTNING_DIT_FIXED_OPTIONS = {
    "use_swiglu": (True, False),
    "use_rope": (True, False),
    "use_rmsnorm": (True, False),
    "mlp_ratio": (4.0, 4.0),
    "learn_sigma": (False, False),
    "wo_shift": (False, False),
}


def convert_lightning_dit_config(
    released: Mapping[str, Any], source: str = "LightningDiT configuration"
) -> dict[str, Any]:
    """Constructor keywords of `LightningDiTTransformer2DModel` from upstream's.

    Args:
        released: upstream's constructor keywords: "input_size", "depth", "hidden_size", "use_qknorm", ...
        source: what the message calls the configuration.

    Raises:
        ValueError: naming every option that is missing, unknown, or set to something this model does not compute.
    """
    optional = {"use_qknorm", "class_dropout_prob", "use_checkpoint"}
    required = set(LIGHTNING_DIT_OPTIONS) | {"hidden_size"}
    problems = []
    if unknown := sorted(set(released) - required - set(LIGHTNING_DIT_FIXED_OPTIONS) - optional):
        problems.append(f"unknown options {unknown}")
    if missing := sorted(required - set(released)):
        problems.append(f"missing options {missing}")
    for option in sorted(required & set(released)):
        if type(released[option]) is not int or released[option] < 1:
            problems.append(f"{option}={released[option]!r} is not a positive integer")
    for option, (supported, absent) in LIGHTNING_DIT_FIXED_OPTIONS.items():
        if not _same_option(released.get(option, absent), supported):
            problems.append(f"{option}={released.get(option, absent)!r} is not supported (only {supported!r})")
    if not problems and released["hidden_size"] % released["num_heads"]:
        problems.append(f"hidden_size={released['hidden_size']} is no multiple of num_heads={released['num_heads']}")
    if problems:
        raise ValueError(f"{source}: {'; '.join(problems)}.")
    config = {ours: released[option] for option, ours in LIGHTNING_DIT_OPTIONS.items()}
    config["attention_head_dim"] = released["hidden_size"] // released["num_heads"]
    return config | {"qk_norm": bool(released.get("use_qknorm", False))}


def lightning_dit_architecture(
    released: Mapping[str, torch.Tensor], source: str = "LightningDiT checkpoint"
) -> dict[str, Any]:
    """Constructor keywords of `LightningDiTTransformer2DModel` as the shapes of a released state dict tell them.

    Args:
        released: the tensors under "ema". The rotary table among them has the width of a head.
        source: what the message calls the checkpoint.

    Raises:
        ValueError: naming the keys that are missing.
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

    The fused qkv is split; the rotary tables, which are computed here and not stored, must equal the checkpoint's.

    Args:
        released: the tensors under "ema".
        config: configuration keywords of the model.
        source: what the message calls the checkpoint.

    Raises:
        ValueError: naming keys that are missing or left over, or rotary tables of another grid, head size or base.
    """
    grid, head_dim = config["sample_size"] // config["patch_size"], config["attention_head_dim"]
    rotary = dict(
        zip(("feat_rope.freqs_cos", "feat_rope.freqs_sin"), lightning_dit_rotary_tables(grid, head_dim), strict=True)
    )
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
    return table | _with_kinds(modules)


# ---------------------------------------------------------------------------------------------------------------------
# Shared by every conversion


def _with_kinds(modules: RenameTable) -> RenameTable:
    """Renames of modules -> renames of their weights and biases."""
    return {
        f"{theirs}.{kind}": tuple(f"{name}.{kind}" for name in ours)
        for theirs, ours in modules.items()
        for kind in ("weight", "bias")
    }


def rename_strictly(state: Mapping[str, torch.Tensor], table: RenameTable, what: str) -> StateDict:
    """Rename every tensor of `state` by `table`; tensors with several names are split along their rows.

    Raises:
        ValueError: starting with `what`, naming the keys that are missing and those the table does not know.
    """
    problems = []
    if missing := sorted(set(table) - set(state)):
        problems.append(f"missing keys {missing}")
    if extra := sorted(set(state) - set(table)):
        problems.append(f"unexpected keys {extra}")
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems)}.")
    renamed = {}
    for theirs, ours in table.items():
        if len(ours) == 1:
            renamed[ours[0]] = state[theirs]
        else:
            # Copies: parameters must not share storage.
            parts = (part.clone() for part in state[theirs].tensor_split(len(ours)))
            renamed |= dict(zip(ours, parts, strict=True))
    return renamed


def load_strict(model: torch.nn.Module, state: Mapping[str, torch.Tensor], source: str) -> Any:
    """`model` with the tensors of `state` as its parameters, after checking every key and shape.

    The tensors take the place of the parameters, so that a model built on the meta device (nothing is initialised only
    to be overwritten) is complete afterwards.

    Args:
        model: without buffers outside its state dict, which the meta device would leave without values.
        state: keys and shapes of `model.state_dict()`.
        source: where the weights come from, for the message.

    Raises:
        ValueError: naming keys that are missing, left over, mis-shaped or not floating point.
    """
    expected = model.state_dict()
    problems = [f"missing key {name}" for name in sorted(set(expected) - set(state))]
    problems += [f"unexpected key {name}" for name in sorted(set(state) - set(expected))]
    for name in sorted(set(expected) & set(state)):
        if state[name].shape != expected[name].shape:
            problems.append(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}")
        elif not state[name].is_floating_point():
            problems.append(f"{name} is {state[name].dtype}, expected floating point")
    if problems:
        raise ValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}.")
    model.load_state_dict(dict(state), strict=True, assign=True)
    return model


def read_safetensors(path: str | Path) -> StateDict:
    """Tensors of a safetensors file; ValueError with its path when it is truncated or no such file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
