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
    """The accelerate.Accelerator of a run. Processes, DDP and FSDP2 are what `accelerate launch` says they are.

    Under FSDP2 the shards stay float32 and products run under autocast, as without it: accelerate's own policy would
    round the times that the network is conditioned on to bfloat16.

    Args:
        block_names: classes whose instances FSDP2 shards one by one, unless the launcher names others.
        in_parts: the backward passes of a step do not all reach the same parameters, see `TrainingRun`.
    Raises: ValueError: processes that did not find each other, FSDP of version 1 or without accelerators, a batch that
        the processes cannot share.
    """
    import accelerate

    # DDP sums gradients up in the last backward pass of a step: also those of parameters which only others reached,
    # if it is told to look for them
    ddp = accelerate.DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=in_parts)
    tracker = None if config.report_to == "none" else config.report_to
    if tracker is not None:
        require(tracker, "wandb" if tracker == "wandb" else "train")
    accelerator = join_processes(
        mixed_precision=config.mixed_precision,
        log_with=tracker,
        project_dir=str(project_dir),
        kwargs_handlers=[ddp],
        # else a number in the launcher's environment would divide the losses once more
        gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(num_steps=1),
    )
    _set_up_sharding(accelerate, accelerator, block_names)
    config.micro_batch_size(accelerator.num_processes)  # for its ValueError
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
            f"{accelerator.num_processes} x {accelerator.device.type}: it shards over two or more accelerators only"
        )
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"FSDP version {plugin.fsdp_version} was asked for, expected 2: --fsdp_version 2")
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    plugin.cpu_ram_efficient_loading = False  # every process has the whole weights already
    if plugin.auto_wrap_policy is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = block_names


def tracker_settings(report_to: str, folder: Path, first_step: int, config: dict[str, str]) -> dict[str, Any]:
    """Arguments of accelerate's `init_trackers`: its one name is wandb's project, but tensorboard's folder, where a
    resumed run has to find it.

    Resumed, tensorboard forgets what a killed run logged after its checkpoint, and has the configuration already.
    wandb goes on with the run whose id lies in the folder; of steps that it has it keeps what it has.

    Args: `report_to`: the tracker; `folder`: of the run, whose name the run has in wandb; `first_step`: steps done.
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

    Launchers and schedulers send a signal several times and to every process, so that repeating it changes nothing;
    SIGQUIT (Ctrl-\\) and SIGKILL stop at once. Only the main thread can handle signals: in others nothing is
    remembered.
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
