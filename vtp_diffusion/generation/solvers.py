"""Solvers of the flow by name: diffusers' schedulers with the settings that follow it, and the adaptive method of
Dormand and Prince by torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..runtime.optional_packages import require
from .flow_matching import scheduler_shift
from .pipeline_checks import check_call, is_guided

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ABSOLUTE_TOLERANCE = 1e-6
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# The name -> class and settings; those with settings call the shift `flow_shift`.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", FLOW),
    "dpm++": ("DPMSolverMultistepScheduler", FLOW),
}


def use_solver(pipe: DiffusionPipeline, solver: str, time_shift: float | None = None) -> None:
    """Give a pipeline the scheduler of a solver.

    Args:
        solver: "euler", "heun" (two evaluations a step), "unipc" (arXiv:2302.04867), "dpm++" (arXiv:2211.01095);
            "pipeline" and "dopri5", which needs no scheduler, keep the pipeline's scheduler.
        time_shift: s, as in training; None keeps that of the pipeline.
    Raises: ValueError on an unknown solver or an invalid shift, and on any change to a few-step student.
    """
    if pipe.transformer.config.get("student") is not None and (solver not in ("pipeline", "euler") or time_shift):
        raise ValueError(
            f"solver is {solver} and time_shift {time_shift}, expected pipeline and none: a few-step student has "
            "learned its own steps"
        )
    if solver == "dopri5" or (solver == "pipeline" and time_shift is None):
        return
    import diffusers

    given = pipe.scheduler.config
    shift = given.get("flow_shift", given.get("shift")) if time_shift is None else scheduler_shift(time_shift)
    if solver == "pipeline":
        name = "flow_shift" if "flow_shift" in given else "shift"
        pipe.scheduler = type(pipe.scheduler).from_config(given, **{name: shift})
        return
    if solver not in SCHEDULERS:
        raise ValueError(f"solver {solver!r} is unknown; known: pipeline, {', '.join(SCHEDULERS)}, dopri5")
    scheduler, settings = SCHEDULERS[solver]
    pipe.scheduler = getattr(diffusers, scheduler)(**settings, **{"flow_shift" if settings else "shift": shift})


@torch.no_grad()
def solve_adaptively(
    pipe: DiffusionPipeline,
    labels: Sequence[int],
    latents: torch.Tensor,
    tolerance: float = 1e-3,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: int | None = None,
    guidance: str = "auto",
    on_evaluation: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Latents (B, C, h, w) that noise flows to, by Dormand and Prince's method of order 5 (torchdiffeq's dopri5).

    The images of a batch share their steps, so that each depends a little on the others. At a bound of
    `guidance_interval` inside (0, 1) the velocity jumps, and the steps become small.

    Args: `latents`: the noise; `tolerance`: relative error of a step, beside an absolute one of 1e-6; the rest as of
        `LightningDiTPipeline.__call__`.
    Raises: ImportError without torchdiffeq. ValueError on guidance that the pipeline does not have.
    """
    check_call(pipe, 1, guidance_scale, guidance_interval, guidance_channels, 1, "latent", None, None, guidance)
    odeint = require("torchdiffeq", "solvers").odeint
    ids = torch.tensor(labels, device=latents.device)

    def velocity(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        scale = guidance_scale if is_guided(t.item(), guidance_interval) else 1.0
        if on_evaluation is not None:
            on_evaluation()
        return pipe._velocity(x, t.item(), ids, scale, guidance_channels, guidance)

    ends = torch.tensor([0.0, 1.0], device=latents.device)
    return odeint(velocity, latents, ends, rtol=tolerance, atol=ABSOLUTE_TOLERANCE, method="dopri5")[-1]
