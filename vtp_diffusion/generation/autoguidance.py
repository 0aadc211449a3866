"""Autoguidance (arXiv:2406.02507) of a trained pipeline: by early EMA weights of the run, or by a weaker network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..runtime.config import Settings, setting
from .transformer_config import different_settings

if TYPE_CHECKING:
    from ..models.transformer_lightning_dit import LightningDiTTransformer2DModel
    from ..training.run_folder import RunFolder

GUIDE = "guidance_transformer"  # name of the component, and of its folder in the run folder until the run ends


@dataclass(kw_only=True)
class GuideConfig(Settings):
    """Which network becomes the pipeline's guide; none by default."""

    step: int | None = setting(None, "guide by the EMA weights of this step of the run", at_least=1)
    transformer: str | None = setting(None, "guide by a transformer trained elsewhere: its folder")

    def __post_init__(self):
        super().__post_init__()
        if self.step is not None and self.transformer is not None:
            raise ValueError(f"guide.step is {self.step}, guide.transformer {self.transformer}, expected one of them")

    @property
    def text(self) -> str:
        """How the pipeline is guided, for the model card."""
        if self.step is not None:
            return f"by its own EMA weights of step {self.step} (autoguidance, arXiv:2406.02507)"
        if self.transformer is not None:
            return "by a weaker transformer (autoguidance, arXiv:2406.02507)"
        return "classifier-free"


def check_guide(config: GuideConfig, folder: RunFolder, transformer: LightningDiTTransformer2DModel) -> None:
    """Refuse a guide before training, rather than when the pipeline is saved.

    Raises: ValueError if the guide has other latents or classes or is a few-step student, or if the run has passed
        `step` without saving it.
    """
    from ..models.transformer_lightning_dit import LightningDiTTransformer2DModel

    checkpoints = folder.checkpoints() if config.step is not None else []
    if checkpoints and checkpoints[-1][0] >= config.step and not (folder.path / GUIDE).is_dir():
        raise ValueError(
            f"guide.step is {config.step}, but the run goes on after step {checkpoints[-1][0]} and has no {GUIDE}/: "
            "give a checkpoint's transformer_ema/ as guide.transformer"
        )
    if config.transformer is not None:
        expected = {key: transformer.config[key] for key in ("sample_size", "in_channels", "num_classes")}
        found = LightningDiTTransformer2DModel.load_config(config.transformer)
        if found.get("student") is not None:
            raise ValueError(f"guide.transformer {config.transformer} is a few-step student, expected another network")
        if different := different_settings(found, expected):
            raise ValueError(f"guide.transformer {config.transformer} does not fit: {different}")


def open_guide(config: GuideConfig, folder: RunFolder) -> LightningDiTTransformer2DModel | None:
    """Load the guide, after the run has reached `step`; None if none is configured."""
    from ..models.loading import load_saved
    from ..models.transformer_lightning_dit import LightningDiTTransformer2DModel

    if config.transformer is None and config.step is None:
        return None
    return load_saved(LightningDiTTransformer2DModel, config.transformer or folder.path / GUIDE)
