"""The golden sets of LightningDiT and VTP: tiny upstream checkpoints with their expected outputs."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from vtp_diffusion import LightningDiTTransformer2DModel

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
LIGHTNING_DIT_SETS = ["lightning_dit_released", "lightning_dit_qk_norm", "lightning_dit_patch2"]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest expected value."""
    return ((actual.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def lightning_dit_architecture(name: str) -> dict:
    config = json.loads((GOLDEN / name / "config.json").read_text())
    return {
        "sample_size": config["input_size"],
        "patch_size": config["patch_size"],
        "in_channels": config["in_channels"],
        "num_layers": config["depth"],
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["hidden_size"] // config["num_heads"],
        "num_classes": config["num_classes"],
        "qk_norm": config.get("use_qknorm", False),
    }


def load_lightning_dit(name: str) -> LightningDiTTransformer2DModel:
    return LightningDiTTransformer2DModel.from_released(
        GOLDEN / name / "0000100.pt", **lightning_dit_architecture(name)
    )


def vtp_golden(name: str, rope_dtype: str) -> dict[str, torch.Tensor]:
    """Inputs and outputs of a VTP with rotary tables of this type: what does not depend on it is kept once."""
    golden = load_file(GOLDEN / name / "golden.safetensors")
    return (
        golden if rope_dtype == "bfloat16" else golden | load_file(GOLDEN / name / "golden_float32_rope.safetensors")
    )
