"""Options of sampling a saved pipeline, the same for every program that does."""

from dataclasses import dataclass
from typing import Any, Literal

from ..runtime.config import Settings, setting


@dataclass(kw_only=True)
class SamplerConfig(Settings):
    """How images are sampled; a program adds what is sampled and where it goes.

    Raises: ValueError naming an option outside its bounds.
    """

    num_inference_steps: int = setting(50, "evaluations of the network an image", at_least=1)
    guidance_scale: float = setting(1.0, "1 is no guidance", at_least=0)
    guidance_interval: tuple[float, float] = setting(
        (0.0, 1.0), "times between which guidance is on, 0 is noise and 1 is data", at_least=0, at_most=1
    )
    guidance_channels: int | None = setting(
        None, "guide only the first so many latent channels; 3 is upstream's rule", at_least=1
    )
    seed: int = setting(0, "of labels and noise; the noise of image k follows from seed and k", at_least=0)
    batch_size: int = setting(8, "images sampled at once, in each process", at_least=1)
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "precision of the pipeline")

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.guidance_interval
        if low > high:
            raise ValueError(f"guidance_interval is {low}, {high}, expected the lower time first")

    @property
    def sampler(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call."""
        names = ("num_inference_steps", "guidance_scale", "guidance_interval", "guidance_channels")
        return {name: getattr(self, name) for name in names}
