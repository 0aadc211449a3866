"""Several processes that share one work: who they are, and what each of them has, gathered."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

# How long a process waits for others: one may list a folder, evaluate or write meanwhile, which NCCL would give up
# after ten minutes. Where one dies, launchers end the others long before.
PATIENCE = timedelta(hours=1)


def join_processes(**settings: Any) -> Any:
    """The accelerator of this process, once it is sure that all processes share the work. They wait for each other for
    `PATIENCE`.

    Args: `settings`: of accelerate.Accelerator.
    Raises: ValueError: more processes were launched than accelerate joined; each would do everything, over the others.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    handlers = [*settings.pop("kwargs_handlers", ()), InitProcessGroupKwargs(timeout=PATIENCE)]
    accelerator, launched = Accelerator(kwargs_handlers=handlers, **settings), this_process()[1]
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched but accelerate joined {accelerator.num_processes}: where there is no "
            "accelerator, torchrun needs ACCELERATE_USE_CPU=true in the environment"
        )
    return accelerator


def check_alone(program: str) -> None:
    """Raises: ValueError if several processes were launched of a program that does not share its work."""
    if (launched := this_process()[1]) > 1:
        raise ValueError(
            f"{launched} processes of {program} were launched, expected 1: it does not share its work, each would do "
            "all of it and write the same file. Start it with python"
        )


def check_device(name: str) -> None:
    """Raises: ValueError if a device is none of torch's, or one that this machine lacks. Nothing is put on it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda, cuda:INDEX or mps, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"device is {name}, but torch {torch.__version__} finds {found} CUDA GPUs")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device is {name}, but torch {torch.__version__} finds no such GPU")


def reading_processes(limit: int = 32) -> int:
    """How many processes should read images beside this one: its share of the CPUs that it may run on, of which it
    keeps one for itself; at least 1 and at most `limit`, since each takes some 30 ms to start."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(limit, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def gather_objects(value: Any) -> list[Any]:
    """`value` of every process, in the order of their ranks, on every process. Tensors must lie on the CPU."""
    if this_process()[1] == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def from_main(compute: Callable[[], Result]) -> Result:
    """What the main process computes, handed on to the others, which wait; so is an error about input. To be called by
    every process, before they have joined too."""
    if this_process()[1] == 1:
        return compute()
    device_of_process()
    if not dist.is_initialized():  # on a CPU, where accelerate was not told to join: `join_processes` refuses that
        return compute()
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [(compute(), None)]
        except (ValueError, OSError) as error:
            found = [(None, error)]
    dist.broadcast_object_list(found)
    value, error = found[0]
    if error is not None:
        raise error
    return value


def device_of_process() -> torch.device:
    """The device that accelerate gives this process, which joins the others, as Accelerator would have it do later."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE).device


def this_process() -> tuple[int, int]:
    """Rank of this process, and how many there are: those that joined, before that as the launcher says."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_everyone() -> None:
    """Until every process that joined has come here."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
