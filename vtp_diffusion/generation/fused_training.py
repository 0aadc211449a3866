"""Fused kernels and CUDA graphs of a generator's training: the options, and whether the kernels can be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..runtime.config import Settings, setting
from ..runtime.processes import device_of_process

if TYPE_CHECKING:
    from ..training.loop import TrainingRun


@dataclass(kw_only=True)
class FusedConfig(Settings):
    """Settings of fused blocks and CUDA graphs, for a configuration that also has `compile`."""

    fused: bool | None = setting(
        None, "fused kernels in the blocks, forward and backward; none: on a GPU, without compile", may_change=True
    )
    recompute: bool = setting(
        False,
        "fused blocks recompute norms and activations in the backward pass: a fifth less memory",
        may_change=True,
    )
    cuda_graphs: bool | None = setting(
        None,
        "replay the passes of a step as CUDA graphs; none: on one GPU, without micro-steps and compile. Graphs keep "
        "their memory during validation too",
        may_change=True,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.recompute and self.fused is False:
            raise ValueError("recompute is on and fused is off: only fused blocks recompute")


def wanted_graphs(config: FusedConfig, compiled: bool) -> bool | None:
    """`cuda_graphs` as a `TrainingRun` takes it: compiled passes are only recorded if that is asked for."""
    return False if compiled and config.cuda_graphs is None else config.cuda_graphs


def why_blocks_are_plain(config: FusedConfig, compiled: bool) -> str | None:
    """Why blocks do not run in fused kernels; None if they do. Raises: ValueError if they were asked for."""
    from ..models.fused_lightning_dit import why_no_kernels

    if config.fused is False:
        return "fused is off"
    reason = "compile is on" if compiled else why_no_kernels(device_of_process())
    if (config.fused or config.recompute) and reason:
        raise ValueError(f"{'fused' if config.fused else 'recompute'} is on, but {reason}")
    return reason


def use_fused_blocks(config: FusedConfig, run: TrainingRun, reason: str | None) -> None:
    """Use fused kernels in the blocks, unless there is a reason against it, and print which it is."""
    from ..models.fused_lightning_dit import fuse_training

    if reason is None:
        fuse_training(run.model, config.recompute)
        run.accelerator.print("blocks run in fused kernels (fused)")
    elif config.fused is None and run.device.type == "cuda":
        run.accelerator.print(f"blocks run without fused kernels: {reason}")
