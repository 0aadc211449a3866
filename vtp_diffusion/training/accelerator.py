"""Set-up of accelerate for a training run: processes, DDP, FSDP2, precision, trackers; and signals that stop it."""

import os
import signal
import threading
import uuid
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..runtime.optional_packages import require
from ..runtime.processes import join_processes
from .config import TrainingConfig


def make_accelerator(config: TrainingConfig, project_dir: Path, block_names: list[str], in_parts: bool = False) -> Any:
    """The accelerate.Accelerator of a run. `accelerate launch` decides on the processes and between DDP and FSDP2.

    Under FSDP2 too the weights stay float32, and matrix products run under autocast: accelerate's own policy would
    also round the times, which condition the network, to bfloat16.

    Args:
        block_names: classes whose instances FSDP2 shards one by one, unless the launcher names others.
        in_parts: the backward passes of a step do not all reach the same parameters, see `TrainingRun`.
    Raises: ValueError: the launched processes did not join, FSDP has version 1 or no accelerators, or the batch cannot
        be divided among the processes.
    """
    import accelerate

    # DDP reduces gradients in the last backward pass of a step. A parameter that only earlier passes of the step
    # reached is included if DDP looks for unused parameters.
    ddp = accelerate.DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=in_parts)
    tracker = None if config.report_to == "none" else config.report_to
    if tracker is not None:
        require(tracker, "wandb" if tracker == "wandb" else "train")
    accelerator = join_processes(
        mixed_precision=config.mixed_precision,
        log_with=tracker,
        project_dir=str(project_dir),
        kwargs_handlers=[ddp],
        # else accelerate takes a number from the launcher's environment, and divides the losses a second time
        gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(num_steps=1),
    )
    _set_up_sharding(accelerate, accelerator, block_names)
    config.micro_batch_size(accelerator.num_processes)  # raises if the processes cannot share a batch
    return accelerator


def sharding_asked() -> bool:
    """Whether the launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _set_up_sharding(accelerate: Any, accelerator: Any, block_names: list[str]) -> None:
    if not sharding_asked():
        return
    if accelerator.distributed_type != accelerate.DistributedType.FSDP:
        raise ValueError(
            f"FSDP was asked for, but accelerate runs {accelerator.distributed_type.value} on "
            f"{accelerator.num_processes} x {accelerator.device.type}: expected two or more accelerators"
        )
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP version {plugin.fsdp_version} was asked for, expected 2: give accelerate launch --fsdp_version 2"
        )
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    plugin.cpu_ram_efficient_loading = False  # every process has the whole weights already
    if plugin.auto_wrap_policy is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = block_names


def tracker_settings(report_to: str, folder: Path, first_step: int, config: dict[str, str]) -> dict[str, Any]:
    """Arguments of accelerate's `init_trackers`. Its `project_name` is a project of wandb, a folder of tensorboard.

    When a run is resumed, tensorboard drops what was logged after the checkpoint, and has the configuration already.
    wandb continues the run whose id is in the folder, and keeps the values that it has for a step.

    Args: `report_to`: the tracker; `folder`: the run folder, whose name wandb shows; `first_step`: steps done.
    """
    if report_to == "wandb":
        file = folder / "wandb_id.txt"
        if not file.is_file():
            file.write_text(uuid.uuid4().hex, encoding="utf-8")
        settings = {"name": folder.resolve().name, "dir": str(folder), "resume": "allow"}
        settings["id"] = file.read_text(encoding="utf-8")
        return {"project_name": "vtp-diffusion", "config": config, "init_kwargs": {"wandb": settings}}
    settings = {"purge_step": first_step + 1 if first_step else 0}
    known = {"config": config} if first_step == 0 else {}
    return {"project_name": "logs", "init_kwargs": {"tensorboard": settings}} | known


def is_sharded(parameters: list[torch.nn.Parameter]) -> bool:
    """Whether every process holds only a shard of each weight (FSDP2)."""
    return any(isinstance(parameter, DTensor) for parameter in parameters)


class StopRequest:
    """Inside this context SIGTERM and SIGINT are remembered instead of ending the process.

    Launchers and schedulers send a signal several times and to every process, so a repeated signal changes nothing;
    SIGQUIT (Ctrl-\\) and SIGKILL stop at once. Python handles signals in the main thread only: in any other thread
    this context does nothing.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def _remember(self, number: int, frame: Any) -> None:
        self.signal = signal.Signals(number)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._remember) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
