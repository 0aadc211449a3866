"""Options of sampling with a saved pipeline, the same in every program."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from ..runtime.config import Settings, setting

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

Solver = Literal["pipeline", "euler", "heun", "unipc", "dpm++", "dopri5"]


@dataclass(kw_only=True)
class GuidanceConfig(Settings):
    """How sampling is guided."""

    guidance_scale: float = setting(1.0, "1 is no guidance", at_least=1.0)
    guidance: Literal["auto", "classifier_free", "autoguidance", "internal"] = setting(
        "auto", "kind of guidance; auto: by the pipeline's guidance transformer, else classifier-free"
    )
    guidance_interval: tuple[float, float] = setting(
        (0.0, 1.0), "times between which guidance is on, 0 is noise, 1 is data", at_least=0, at_most=1, ordered=True
    )

    def check_pipeline(self, pipe: "DiffusionPipeline", steps: int, channels: int | None = None) -> None:
        """Check that a pipeline can be called so. Args: `steps`, `channels`: its other settings.

        Raises: ValueError naming the first setting that it does not take, or one of guidance without a scale.
        """
        from .pipeline_checks import check_call

        scale, kind = self.guidance_scale, self.guidance
        check_call(pipe, steps, scale, self.guidance_interval, channels, 1, "latent", None, None, kind)
        unused = self.changed_guidance | ({} if channels is None else {"guidance_channels": channels})
        if scale == 1 and unused:
            name, value = next(iter(unused.items()))
            raise ValueError(
                f"{name} is {value!r} with guidance_scale 1, which is no guidance: expected another, or no {name}"
            )

    @property
    def guidance_arguments(self) -> dict[str, Any]:
        """Keyword arguments of a pipeline's call."""
        kind = {} if self.guidance == "auto" else {"guidance": self.guidance}
        return {"guidance_scale": self.guidance_scale, "guidance_interval": self.guidance_interval} | kind

    @property
    def changed_guidance(self) -> dict[str, Any]:
        """The settings of guidance that differ from their defaults."""
        given = ((field, getattr(self, field.name)) for field in fields(GuidanceConfig))
        return {field.name: value for field, value in given if value != field.default}

    @property
    def guidance_words(self) -> str:
        """`changed_guidance` as options of a program."""
        listed = {k: v if isinstance(v, tuple) else (v,) for k, v in self.changed_guidance.items()}
        return "".join(f" --{name} {' '.join(map(str, values))}" for name, values in listed.items())

    @property
    def guidance_text(self) -> str:
        """The same in words."""
        if self.guidance_scale == 1:
            return "no guidance"
        kind = "" if self.guidance == "auto" else f" ({self.guidance})"
        times = "" if self.guidance_interval == (0, 1) else " at times from {} to {}".format(*self.guidance_interval)
        return f"guidance of scale {self.guidance_scale}{kind}{times}"


@dataclass(kw_only=True)
class SamplerConfig(GuidanceConfig):
    """How images are sampled; a program adds what is sampled and where it goes.

    Raises: ValueError naming an option outside its bounds.
    """

    num_inference_steps: int | None = setting(
        None,
        "steps of the solver, each one evaluation of the network (heun: two); none: the pipeline's own, 50 or the "
        "most that a few-step student learned",
        at_least=1,
    )
    solver: Solver = setting(
        "pipeline", "solver; pipeline: the pipeline's scheduler; dopri5: adaptive, ignores num_inference_steps"
    )
    time_shift: float | None = setting(None, "shift s of the sampling times; none: the pipeline's", above=0)
    tolerance: float = setting(1e-3, "relative error of a step of dopri5", above=0)
    guidance_channels: int | None = setting(
        None, "number of latent channels to guide, from the first; 3 is upstream's rule; none: all", at_least=1
    )
    seed: int = setting(0, "seed of labels and noise; the noise of image k follows from seed and k", at_least=0)
    batch_size: int = setting(8, "images sampled at once, in each process", at_least=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "precision of the pipeline; auto: bfloat16 on a GPU that has it, else float32"
    )
    fast: bool | None = setting(None, "fused kernels and CUDA graphs; none: where possible")
    fp8: bool = setting(False, "large products in float8, on a GPU that has it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver == "dopri5" and self.time_shift is not None:
            raise ValueError(f"time_shift is {self.time_shift}, but solver dopri5 chooses its times: expected none")
        if self.solver != "dopri5" and self.tolerance != SamplerConfig.tolerance:
            raise ValueError(f"tolerance is {self.tolerance}, but only solver dopri5 has one, solver is {self.solver}")
        if self.fp8 and self.fast is False:
            raise ValueError("fp8 is on and fast is off: float8 products are part of fast sampling")

    def torch_dtype(self, device: "torch.device") -> "torch.dtype":
        """The precision of a pipeline on this device."""
        import torch

        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32

    @property
    def precision(self) -> dict[str, bool]:
        """What else decides the images, besides the pipeline, its dtype and the arguments of its call."""
        return {"fp8": True} if self.fp8 else {}

    @property
    def sampler(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call."""
        adaptive = {"solver": self.solver, "tolerance": self.tolerance} if self.solver == "dopri5" else {}
        others = {"num_inference_steps": self.num_inference_steps, "guidance_channels": self.guidance_channels}
        return others | self.guidance_arguments | adaptive
