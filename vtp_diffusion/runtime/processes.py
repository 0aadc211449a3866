"""Distributed processes: joining them, their ranks, gathering and broadcasting values."""

import itertools
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

if dist.is_available():
    # Imported before a process group exists: a default argument of its functions is the group of all processes at the
    # time of the import. Imported later, by torch._dynamo, they would keep the group's threads alive, and one that
    # drops a tensor while the interpreter ends aborts the process ("terminate called without an active exception").
    import torch.distributed.nn.functional  # noqa: F401

Result = TypeVar("Result")

# How long a process waits for the others: one may list a folder, evaluate or write for longer than NCCL's default of
# ten minutes. If one dies, the launcher ends the others long before.
PATIENCE = timedelta(hours=1)
POLL = 0.2  # seconds between two looks of a process that waits in `main_alone`
_calls = itertools.count()  # of `main_alone`, which every process calls as often


def join_processes(**settings: Any) -> Any:
    """This process's Accelerator, whose collectives time out after `PATIENCE`.

    Args: `settings`: of accelerate.Accelerator.
    Raises: ValueError: more processes were launched than accelerate joined. Each would do all of the work, and
        overwrite the others' files.
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
    """Raises: ValueError if several processes were launched of a program that cannot divide its work."""
    if (launched := this_process()[1]) > 1:
        raise ValueError(
            f"{launched} processes of {program} were launched, expected 1: it cannot divide its work, each would do "
            "all of it and write the same file. Start it with python"
        )


def check_device(name: str) -> None:
    """Raises: ValueError if torch has no such device, or this machine lacks it. Nothing is allocated on it."""
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
    """Number of workers that should read images for this process: its share of the CPUs it may run on, less one for
    itself. At least 1 and at most `limit`, since each takes some 30 ms to start."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(limit, cpus // local_processes() - 1))


def gather_objects(value: Any) -> list[Any]:
    """`value` of every process, in the order of their ranks, on every process. Tensors must lie on the CPU."""
    if this_process()[1] == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def from_main(compute: Callable[[], Result]) -> Result:
    """Call `compute` in the main process and return its result in every process. A ValueError or OSError of it is
    raised in every process too. Every process has to call this; it works before `join_processes` too."""
    if this_process()[1] == 1:
        return compute()
    device_of_process()
    if not dist.is_initialized():  # on a CPU without ACCELERATE_USE_CPU: `join_processes` refuses that
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


def main_alone(work: Callable[[], None]) -> None:
    """Call `work` in the main process, for which the others wait however long it takes: not in a collective, which
    would time out. Every process has to call this, after `join_processes`. If `work` fails, the launcher ends the
    others."""
    rank, processes = this_process()
    if processes == 1:
        return work()
    store, key = dist.distributed_c10d._get_default_store(), f"vtp_diffusion/main_alone/{next(_calls)}"
    if rank == 0:
        work()
        store.set(key, "done")
    while not store.check([key]):
        time.sleep(POLL)


def device_of_process() -> torch.device:
    """The device that accelerate gives this process. Joins the processes, as an Accelerator would do later."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE).device


def this_process() -> tuple[int, int]:
    """(rank, number of processes); before the processes have joined, as the launcher's environment variables say."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_processes() -> int:
    """Number of processes on this node, as the launcher's environment variable says; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def wait_for_everyone() -> None:
    """Wait until every process that joined has called this."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def print_once(line: str) -> None:
    """Print on the main process alone."""
    if this_process()[0] == 0:
        print(line)
