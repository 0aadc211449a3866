"""The golden sets of LightningDiT: tiny upstream checkpoints with their expected outputs."""

import json
from pathlib import Path

import torch

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
