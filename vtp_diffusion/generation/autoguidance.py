"""Autoguidance (arXiv:2406.02507) of a trained pipeline: by early EMA weights of the run, or by a weaker network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..runtime.config import Settings, setting
from ..runtime.disk import read_json, write_json
from .transformer_config import different_settings

if TYPE_CHECKING:
    from ..models.transformer_lightning_dit import LightningDiTTransformer2DModel
    from ..training.loop import TrainingRun
    from ..training.run_folder import RunFolder

GUIDE = "guidance_transformer"  # name of the component, and of its folder in the run folder until the run ends
GUIDE_STEP = f"{GUIDE}.json"  # in the run folder: the step that the guide is of; older folders lack it


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
        `step` without saving it, or has saved another step since.
    """
    from ..models.transformer_lightning_dit import LightningDiTTransformer2DModel

    checkpoints = folder.checkpoints() if config.step is not None else []
    if checkpoints and checkpoints[-1][0] >= config.step:
        record = folder.path / GUIDE_STEP
        saved = read_json(record).get("step") if record.is_file() else config.step
        if saved != config.step or not (folder.path / GUIDE).is_dir():
            found = f"its {GUIDE}/ is of step {saved}" if saved != config.step else f"has no {GUIDE}/"
            raise ValueError(
                f"guide.step is {config.step}, but the run goes on after step {checkpoints[-1][0]} and {found}: "
                "give a checkpoint's transformer_ema/ as guide.transformer"
            )
    if config.transformer is not None:
        expected = {key: transformer.config[key] for key in ("sample_size", "in_channels", "num_classes")}
        found = LightningDiTTransformer2DModel.load_config(config.transformer)
        if found.get("student") is not None:
            raise ValueError(f"guide.transformer {config.transformer} is a few-step student, expected another network")
        if different := different_settings(found, expected):
            raise ValueError(f"guide.transformer {config.transformer} does not fit: {different}")


def save_guide(run: TrainingRun, step: int) -> None:
    """Write the EMA weights as the guide, of `step`; an earlier one is replaced. Every process has to call this."""
    from ..training.checkpoints import export_averaged

    if run.is_main:  # first: if the weights are not written any more, no others pass for those of this step
        write_json(run.folder.path / GUIDE_STEP, {"step": step})
    export_averaged(run.model, run.optimisation.average, run.folder.path / GUIDE)


def open_guide(config: GuideConfig, folder: RunFolder) -> LightningDiTTransformer2DModel | None:
    """Load the guide, after the run has reached `step`; None if none is configured."""
    from ..models.loading import load_saved
    from ..models.transformer_lightning_dit import LightningDiTTransformer2DModel

    if config.transformer is None and config.step is None:
        return None
    return load_saved(LightningDiTTransformer2DModel, config.transformer or folder.path / GUIDE)
